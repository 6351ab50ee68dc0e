"""The status page in a real browser, Debian's Chromium without a network: what a postmaster sees and can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hapolicy_gevent import __version__
from tests.servers import checked
from tests.status import StatusProxy
from tests.support import (
    SCALE,
    Behaviour,
    Peer,
    ProxyProcess,
    echo,
    hang,
    hang_up,
    processes,
    request,
    stubs,
    wait_until,
)

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
if not (CHROMIUM and DRIVER):
    pytest.skip('chromium or chromium-driver is not installed', allow_module_level=True)
pytest.importorskip('selenium', reason='selenium is not installed')
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


class Browser:
    """A headless Chromium that reaches 127.0.0.1 alone and remembers what it asked for and complained about."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ''
        for argument in (
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-dev-shm-usage',
            '--disable-background-networking',
            '--no-first-run',
            '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
            f'--user-data-dir={self._profile.name}',
        ):
            options.add_argument(argument)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
        self.driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, url: str, width: int = 1200, height: int = 800) -> None:
        """Load the page in a window of so many CSS pixels and wait for its figures."""
        self.cdp('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.driver.get(url)
        self.sees('Services')

    def cdp(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(f'return {script}')

    @property
    def text(self) -> str:
        """All that can be seen."""
        return str(self.driver.find_element(By.TAG_NAME, 'body').text)

    def row(self, number: int) -> str:
        """Return the text of a service's row."""
        return str(self.driver.find_elements(By.CSS_SELECTOR, '#services tr')[number].text)

    def sees(self, text: str, seconds: float = 20) -> None:
        """Wait until a text can be seen."""
        wait_until(lambda: text in self.text, seconds, f'{text!r} on the page:\n{self.text}')

    def requested(self) -> set[str]:
        """Return every address that a page from the proxy asked for since the last call."""
        messages = [json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance')]
        return {
            message['params']['request']['url']
            for message in messages
            if message['method'] == 'Network.requestWillBeSent' and message['params']['documentURL'].startswith('http')
        }

    def complaints(self) -> list[str]:
        """Return what stands in the console since the last call."""
        return [entry['message'] for entry in self.driver.get_log('browser')]

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()
        self._profile.cleanup()


@pytest.fixture(scope='module')
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, on a page of its own that must not make it complain, nor ask anyone else for anything."""
    chromium.complaints()
    chromium.requested()
    yield chromium
    assert chromium.complaints() == []
    for url in chromium.requested():
        assert url.startswith(('http://127.0.0.1:', 'data:,')), url
    chromium.driver.get('about:blank')
    chromium.cdp('Emulation.setEmulatedMedia', features=[])


def ask(proxy: StatusProxy, times: int) -> int:
    with proxy.client() as client:
        for _ in range(times):
            client.ask(request())
    return times


def test_a_service_goes_down_and_returns_before_ones_eyes(browser: Browser) -> None:
    with stubs(echo, echo) as (a, b), StatusProxy('-s', a.service, '-s', b.service) as proxy:
        browser.open(proxy.url)
        browser.sees('2 of 2 services are up.')
        browser.run('window.loaded_once = true')
        row = browser.driver.find_elements(By.CSS_SELECTOR, '#services tr')[1]
        ask(proxy, 10)
        wait_until(lambda: 'ok 5' in row.text, 10, 'the answers')
        b.behaviour = checked(hang_up)
        ask(proxy, 2)
        wait_until(lambda: 'dropped 1' in row.text, 10, 'the failure')
        b.stop()
        browser.sees('B is down since')
        wait_until(lambda: 'down\nsince ' in row.text, 10, 'its state')
        assert ' ago)\nits check: refused, connection refused\n' in row.text
        assert 'refused, connection refused. B failed 1 of ' in browser.text
        assert '0 requests got the default action' in browser.text
        assert browser.driver.title == 'warning - hapolicy'
        b.behaviour = echo
        b.start()
        wait_until(lambda: ' ago)\nits check passed\n' in row.text, 20, 'up again, without a request')
        assert re.search(r'\nlast failure: .{15} \([\d.]+ m?s ago\): its check: refused, connection refused', row.text)
        browser.sees('2 of 2 services are up.')
        assert 'dropped 1' in row.text and 'ok 5' in row.text
        assert browser.run('window.loaded_once') is True
        assert browser.driver.find_element(By.ID, 'spoken').get_attribute('aria-live') == 'polite'


def test_what_waits_and_what_is_silent_stand_on_the_page(browser: Browser) -> None:
    with processes('AB') as (a, b), StatusProxy('-s', a.service, '-s', b.service + ':20') as proxy:
        with proxy.client() as client:
            client.ask(request())
            a.hang()
            started = time.monotonic()
            client.send(request())
            browser.open(proxy.url)
            browser.sees('1 requests are in flight, the oldest for ')
            wait_until(lambda: re.search('(up|stalled)\nwithout an answer since ', browser.row(0)), 10, 'its silence')
            wait_until(lambda: 'stalled\nwithout an answer since ' in browser.row(0), 10, 'its stall')
            assert time.monotonic() - started < 10 * SCALE
            assert '1 / 100' in browser.row(0) and browser.driver.title == 'warning - hapolicy'
            assert re.search(r'\np99 (6\.3|8|10|12\.5|16|20|25|31\.5) s\n', browser.row(0)), browser.row(0)
            assert 'In flight\n1\n' in browser.text


def test_the_page_says_where_it_runs_with_which_options_and_what_its_words_mean(browser: Browser) -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '--deadline=88.5', '-d', '451 wait') as proxy:
        browser.open(proxy.url, 390)
        assert browser.text.startswith(f'hapolicy {__version__} on {socket.gethostname()}\n')
        for text in ('deadline\n88.5\n', 'default\n451 wait\n', f'listen\n127.0.0.1:{proxy.port}\n', 'stall\n5\n'):
            assert text in browser.text
        terms = browser.run('[...document.querySelectorAll(".words dt")].map(node => node.textContent)')
        assert {'check', 'up', 'down', 'on trial', 'stalled', 'full', 'single use'} <= set(terms)
        meanings = browser.driver.find_elements(By.CSS_SELECTOR, '.words dd')
        assert len(meanings) == len(terms) and all(len(each.text) > 20 for each in meanings)


def test_the_loss_of_the_proxy_is_told_and_a_new_one_is_found(browser: Browser) -> None:
    with stubs(echo) as (a,):
        with StatusProxy('-s', a.service, '--name=spf') as proxy:
            browser.open(proxy.url)
            assert 'No answer from the proxy' not in browser.text
            assert 'name\nspf\n' in browser.text
            assert browser.driver.title == 'OK - spf'
        browser.sees('No answer from the proxy: this is of ')
        assert browser.driver.title == 'no answer - spf'
        port = f'--status=127.0.0.1:{proxy.status_port}'
        with ProxyProcess('-s', a.service, port):
            wait_until(lambda: 'No answer' not in browser.text, 10, 'the new one')
    assert all('ERR_CONNECTION' in line or 'ERR_EMPTY' in line for line in browser.complaints())


def test_hostile_names_are_text(browser: Browser) -> None:
    name = '<script>alert(1)</script><img/src><b>&amp;'
    with stubs(echo) as (a,), StatusProxy('-s', f'{name}=127.0.0.1:{a.port}', '-d', '451 <i>x</i>') as proxy:
        with proxy.client() as client:
            client.ask(b'nonsense\n\n')
        browser.open(proxy.url)
        browser.sees('<i>x</i>')
        assert name in browser.row(0)
        assert browser.run('document.querySelectorAll("img, i, b, main script").length') == 0


def test_it_is_worked_from_the_keyboard(browser: Browser) -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        browser.open(proxy.url)
        page = browser.driver.find_element(By.TAG_NAME, 'body')
        page.send_keys(Keys.TAB)
        focus = browser.driver.switch_to.active_element
        assert focus.get_attribute('id') == 'pause' and focus.get_attribute('aria-pressed') == 'false'
        assert browser.run('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
        focus.send_keys(Keys.SPACE)
        assert focus.get_attribute('aria-pressed') == 'true'
        browser.sees('paused; as of ')
        ask(proxy, 11)
        browser.run('new Promise(done => setTimeout(done, 3000))')
        assert 'ok 11' not in browser.row(0)
        focus.send_keys(Keys.SPACE)
        assert 'paused' not in browser.text
        browser.sees('ok 11')
        assert browser.driver.switch_to.active_element.get_attribute('id') == 'pause', 'the focus stays'
        focus.send_keys(Keys.TAB)
        assert browser.driver.switch_to.active_element.text == 'status.json'


@pytest.mark.parametrize('width', [320, 390, 768, 1200])
def test_no_width_scrolls_sideways(browser: Browser, width: int) -> None:
    name = 'A' * 64
    with stubs(echo) as (a,), StatusProxy('-s', f'{name}=127.0.0.1:{a.port}', '-s', 'B=127.0.0.1:1') as proxy:
        ask(proxy, 3)
        browser.open(proxy.url, width)
        browser.sees('B is down')
        assert browser.run('document.documentElement.scrollWidth') <= width


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colors as WCAG counts it."""

    def light(color: str) -> float:
        parts = [int(part) / 255 for part in color[color.index('(') + 1 : -1].split(',')[:3]]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, bright = sorted((light(first), light(second)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_light_and_dark_can_both_be_read(browser: Browser, scheme: str) -> None:
    browser.cdp('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '-s', 'B=127.0.0.1:1') as proxy:
        ask(proxy, 3)
        browser.open(proxy.url)
        browser.sees('B is down')
        back = browser.run('getComputedStyle(document.body).backgroundColor')
        assert (contrast(back, 'rgb(0,0,0)') > 10) == (scheme == 'light')
        for selector in ('body', '#headline', '.up .state', '.down .state', '#services .two', 'dt', 'a', 'th'):
            part = '::first-line' if '.state' in selector else ''
            color = browser.run(f'getComputedStyle(document.querySelector("{selector}"), "{part}").color')
            soft = browser.run('getComputedStyle(document.querySelector("#headline")).backgroundColor')
            assert min(contrast(color, back), contrast(color, soft)) >= 4.5, selector


def test_the_state_is_told_in_words_to_a_screen_reader(browser: Browser) -> None:
    with stubs(echo, checked(hang)) as (a, b):
        with StatusProxy('-s', a.service + ':20', '-s', b.service + ':10', '--stall=0.5') as proxy:
            with proxy.client() as client:
                client.send(request())
                browser.open(proxy.url)
                wait_until(lambda: '\nstalled\n' in browser.row(0), 10, 'the stall')
                assert browser.row(0).startswith('B'), 'in order of prio'
                roles = browser.run('[...document.querySelectorAll("#services tr:first-child > *")].map(e => e.role)')
                assert roles == ['cell'] * 8
                label = browser.run('document.querySelector("svg").getAttribute("aria-label")')
                assert label.startswith('Answers of the last ten minutes: top ')


@pytest.mark.skipif('STATUS_PICTURE' not in os.environ, reason='STATUS_PICTURE names no file to write')
def test_picture(browser: Browser) -> None:
    """Write the picture of the documentation: one of three services has gone down in traffic."""
    with stubs(varied(0), varied(0.004), varied(0.02)) as (a, b, c):
        a.name, b.name, c.name = 'GREY1', 'GREY2', 'GREY3'
        with StatusProxy('-s', a.service, '-s', b.service, '-s', c.service) as proxy:
            for second in range(200):
                if second == 140:
                    b.stop()
                ask(proxy, 40 + second % 23)
                time.sleep(0.5)
            browser.open(proxy.url, 1200, 620)
            browser.sees('GREY2 is down')
            browser.cdp('Emulation.setDeviceMetricsOverride', width=1200, height=picture_height(browser),
                        deviceScaleFactor=1, mobile=False)  # fmt: skip
            browser.driver.save_screenshot(os.environ['STATUS_PICTURE'])
            assert Path(os.environ['STATUS_PICTURE']).stat().st_size < 250_000


def picture_height(browser: Browser) -> int:
    return int(browser.run('document.documentElement.scrollHeight'))


def varied(seconds: float) -> Behaviour:
    """Answer after so many seconds, as a greylisting server does: most mails pass."""

    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(seconds)
        turn = len(peer.server.requests) % 36
        action = b'reject listed' if turn == 0 else b'defer_if_permit wait' if turn % 9 == 0 else b'dunno'
        peer.send(b'action=%b\n\n' % action)

    return behave

"""The proxy between a real Postfix, postgrey and postfwd, in both of its modes.

As a daemon that all smtpds share, and run by spawn(8) by the very line of the ancestor's man page.
In both the program is one file that was copied, run by Debian's own Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postfix import PYTHON, Postfix, arguments, missing_programs, postfwd, postgrey, processes, send_in
from tests.support import (
    MODULE,
    SCALE,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    answer,
    free_port,
    hang_up,
    new_instance,
    request,
    wait_until,
)

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason='not root, who alone can start a Postfix'),
    pytest.mark.skipif(bool(missing_programs()), reason=f'not installed: {missing_programs()}'),
]

#: The lines of hapolicy(1), its path and its addresses replaced.
SPAWN = """\
127.0.0.1:{proxy} inet    n       n       n       -       0       spawn
  user=nobody argv={directory}/hapolicy -l -s GREY1=127.0.0.1:{one}:10 -s GREY2=127.0.0.1:{two}:10{more}
"""

MODES = ('daemon', 'spawn')


class Site:
    """A Postfix whose every recipient is asked about through the proxy, which knows two services."""

    def __init__(self, mode: str, *options: str) -> None:
        self.mode, self.options = mode, options
        self.one, self.two, self.port = free_port(), free_port(), free_port()
        self.proxy: ProxyProcess | None = None
        master = ''
        settings = {}
        if mode == 'spawn':
            more = ''.join(f' {{{option}}}' if ' ' in option else f' {option}' for option in options)
            for name, value in {'proxy': self.port, 'one': self.one, 'two': self.two, 'more': more}.items():
                master = (master or SPAWN).replace('{%s}' % name, str(value))
            settings = {f'127.0.0.1:{self.port}_time_limit': '3600'}
        self.postfix = Postfix(f'check_policy_service inet:127.0.0.1:{self.port}', master, settings)
        self.program = self.postfix.directory / 'hapolicy'
        shutil.copyfile(MODULE, self.program)
        self.program.chmod(0o755)

    def start(self) -> None:
        """Start the proxy; in spawn mode Postfix does."""
        if self.mode == 'daemon':
            services = [f'-sGREY1=127.0.0.1:{self.one}:10', f'-sGREY2=127.0.0.1:{self.two}:10']
            self.proxy = ProxyProcess(*services, *self.options, port=self.port, python=PYTHON)

    def finds(self, *names: str) -> None:
        """Wait until the daemon has found these services up; a spawned one looks when it is asked."""
        for name in names if self.proxy is not None else ():
            assert self.proxy is not None
            place = {'GREY1': self.one, 'GREY2': self.two}[name]
            self.proxy.logged(f'[{name}] (127.0.0.1:{place}) is up: its check passed')

    @property
    def running(self) -> list[int]:
        """The processes of the proxy."""
        if self.proxy is not None:
            return [self.proxy.process.pid]
        return [pid for pid in processes(self.postfix.directory) if str(self.program) in arguments(pid)]

    def restart(self) -> None:
        """Stop the proxy as its user does, and start it again."""
        if self.proxy is not None:
            assert self.proxy.terminate() == 0
            self.start()
        else:
            assert self.running
            for pid in self.running:
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not self.running, what='the spawned ones end')

    def __enter__(self) -> Site:
        self.start()
        try:
            self.postfix.__enter__()
        except BaseException:
            self._stop(BaseException)
            raise
        return self

    def _stop(self, kind: object) -> None:
        if self.proxy is not None:
            self.proxy.__exit__(kind)

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.postfix.close()
        finally:
            self._stop(kind)
        # whatever happened to servers and proxy, Postfix has not noticed
        assert kind is not None or not self.postfix.complaints, self.postfix.complaints


@pytest.fixture(params=MODES)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Postfix and the proxy in one of its modes; no server runs yet."""
    with Site(request.param) as running:
        yield running


def test_the_program_runs_as_the_ancestors_man_page_has_it() -> None:
    """Spawn starts the copied file itself as user nobody, on Debian's Python, once Postfix asks."""
    with Site('spawn') as site, site.postfix.client() as client, PolicyServerStub(port=site.one):
        assert not site.running
        assert send_in(client)[0] == 250
        [pid] = site.running
        assert os.readlink(f'/proc/{pid}/exe') == os.path.realpath(PYTHON)
        assert re.search(r'^Uid:\t65534\t65534\t65534\t65534$', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE)


def test_postgrey_is_heard_through_the_proxy(site: Site) -> None:
    """A mail is put off, and taken when it is tried again later, with one header that says so."""
    with postgrey(site.one, delay=2), site.postfix.client() as client:
        site.finds('GREY1')
        begun = time.monotonic()
        code, text = send_in(client, 'alice@example.net', 'bob@example.org', 'carol@example.org')
        assert code == 450 and 'Greylisted' in text
        replies = []

        def taken() -> bool:
            replies.append(send_in(client, 'alice@example.net', 'bob@example.org', 'carol@example.org'))
            time.sleep(0.2)
            return replies[-1][0] == 250

        wait_until(taken, what='the mail is taken')
        assert time.monotonic() - begun >= 2
        assert {code for code, _ in replies[:-1]} <= {450}
        wait_until(lambda: site.postfix.delivered == 2, what='both recipients have it')
        assert len(site.postfix.headers('X-Greylist')) == 1


def test_a_verdict_of_postfwd_reaches_the_smtp_client(site: Site) -> None:
    """Who is to be rejected is rejected in the server's words, in whatever order; all others pass."""
    rules = 'id=R1; sender==mallory@example.net; action=554 5.7.1 no mail from mallory\n'
    with postfwd(site.one, rules), postfwd(site.two, rules), site.postfix.client() as client:
        site.finds('GREY1', 'GREY2')
        for _ in range(5):
            code, text = send_in(client, 'mallory@example.net')
            assert code == 554 and 'no mail from mallory' in text
            assert send_in(client, 'alice@example.net')[0] == 250
    wait_until(lambda: site.postfix.delivered == 5, what='the mails that passed are delivered')


def test_no_mail_is_put_off_or_lost_when_a_server_is_killed_in_mid_load(site: Site) -> None:
    """Of two equal servers one is killed with requests in flight: all mails are taken at once and delivered."""
    mails = 400
    rule = 'id=R1; action=PREPEND X-Policy: %s\n'
    with postfwd(site.one, rule % 'one') as one, postfwd(site.two, rule % 'two'):
        site.finds('GREY1', 'GREY2')
        with site.postfix.load(mails) as load:
            headers = site.postfix.headers
            wait_until(lambda: {'X-Policy: one', 'X-Policy: two'} <= set(headers('X-Policy')), what='both answer')
            wait_until(lambda: len(headers('X-Policy')) > mails // 10, what='the load runs')
            one.kill()
            before = len(headers('X-Policy'))
            assert load.poll() is None and before < mails, 'the server was killed too late'
        wait_until(lambda: site.postfix.delivered == mails, what='all mails are delivered')
    assert 'reject:' not in site.postfix.log
    served = [header.split()[-1] for header in headers('X-Policy')]
    assert len(served) == mails, 'each mail had one verdict'
    assert {'one', 'two'} == set(served[: before // 2]), 'both had served'


def test_mail_passes_when_all_servers_are_down(site: Site) -> None:
    """The default action lets mail pass, from the first request on and at once."""
    with site.postfix.client() as client:
        begun = time.monotonic()
        for _ in range(5):
            assert send_in(client)[0] == 250
        assert time.monotonic() - begun < 10 * SCALE
    wait_until(lambda: site.postfix.delivered == 5, what='all are delivered')


@pytest.mark.parametrize('mode', MODES)
def test_the_smtp_client_sees_the_default_action_that_was_asked_for(mode: str) -> None:
    """-d with a text of several words, on the command line and in master.cf."""
    with Site(mode, '--default=451 4.7.1 policy is down') as site, site.postfix.client() as client:
        for _ in range(3):
            code, text = send_in(client)
            assert code == 451 and text.startswith('4.7.1') and text.endswith('policy is down')
        with PolicyServerStub(port=site.two):
            wait_until(lambda: send_in(client)[0] == 250, what='the server that has come up is asked')


def test_a_restart_of_the_proxy_between_two_mails_loses_nothing(site: Site) -> None:
    """In the same SMTP session as in a new one, with a mail half said."""
    with PolicyServerStub(port=site.one) as server, site.postfix.client() as client:
        site.finds('GREY1')
        assert send_in(client)[0] == 250
        site.restart()
        assert send_in(client)[0] == 250
        assert client.mail('alice@example.net')[0] == 250
        assert client.rcpt('bob@example.org')[0] == 250
        site.restart()
        assert client.rcpt('carol@example.org')[0] == 250
        assert client.data('Subject: test\r\n\r\ntext\r\n')[0] == 250
        assert site.postfix.send()[0] == 250
        wait_until(lambda: site.postfix.delivered == 5, what='all recipients have their mail')
        assert len(server.requests) == 5, 'each was asked about once'


def test_a_restart_of_postfix_loses_nothing(site: Site) -> None:
    """`postfix reload` ends each smtpd after its session; the proxy serves the old ones and the new."""
    with PolicyServerStub(port=site.one) as server, site.postfix.client() as client:
        site.finds('GREY1')
        assert send_in(client)[0] == 250
        site.postfix.command('reload')
        site.postfix.logged('reload -- version')
        assert send_in(client)[0] == 250
        assert site.postfix.send()[0] == 250
        wait_until(lambda: site.postfix.delivered == 3, what='all are delivered')
        assert len(server.requests) == 3, 'each was asked about once'


def read_to_end(client: PostfixClient) -> bytes:
    """Return everything that comes until the connection ends."""
    data = client.buffer
    with contextlib.suppress(ConnectionResetError):
        while more := client.sock.recv(65536):
            data += more
    return data


def test_nothing_but_answers_reaches_postfix_from_spawn() -> None:
    """Where stdin, stdout and stderr are Postfix's: as much is logged as can be, yet each byte belongs to an answer."""
    with Site('spawn', '-v', '-L') as site:
        with PostfixClient(site.port) as client:

            def ask() -> str:
                return client.ask(request(instance=new_instance()))

            assert ask() == 'dunno'
            assert client.ask(request(request='junk')) == 'dunno'
            with PolicyServerStub(port=site.one) as server:
                wait_until(lambda: ask() != 'dunno', what='the server is asked')
                for behaviour in (answer(b'action=\n\n'), answer(b'what\n\n'), answer(b'action=no\n\nmore'), hang_up):
                    server.behaviour = behaviour
                    ask()
            assert ask() == 'dunno'
            [pid] = site.running
            os.kill(pid, signal.SIGTERM)
            assert read_to_end(client) == b''
        with PostfixClient(site.port) as client:
            client.send(b'x' * 70000)
            assert read_to_end(client) == b''


@pytest.mark.parametrize('option', ['--nonsense', '-sGREY3=127.0.0.1:', '--listen=192.0.2.1:1'])
def test_an_unusable_command_line_is_no_answer_to_postfix(option: str) -> None:
    """The program ends with nothing said on the connection: Postfix acts as when a server is down, and logs it."""
    site = Site('spawn', option)
    with site.postfix as postfix:
        with PostfixClient(site.port) as client:
            client.send(request())
            assert read_to_end(client) == b''
        code, text = postfix.send()
        assert code == 451 and text.startswith('4.3.5') and text.endswith('Server configuration problem')
        postfix.logged('problem talking to server')
        postfix.logged(f'command {site.program} exit status')

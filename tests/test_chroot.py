"""A smtpd that is chrooted to Postfix's queue directory, as Debian has it, asks at a unix socket in there.

The socket is one of `--listen=unix:`, or one that the process inherits, as from systemd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.postfix import PYTHON, Postfix, arguments, missing_programs, processes, send_in
from tests.support import ROOT, PolicyServerStub, ProxyProcess, echo, slow, wait_until

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason='not root, who alone can start a Postfix'),
    pytest.mark.skipif(bool(missing_programs()), reason=f'not installed: {missing_programs()}'),
]


class Site:
    """A chrooted Postfix that asks hapolicy at queue/hapolicy/socket, where group postfix alone may connect."""

    def __init__(self, way: str, where: str = 'hapolicy/socket', chroot: bool = True) -> None:
        self.postfix = Postfix(f'check_policy_service unix:{where}', chroot=chroot)
        self.socket = self.postfix.directory / 'queue' / 'hapolicy' / 'socket'
        self.socket.parent.mkdir(mode=0o711)
        self.server = PolicyServerStub(echo)
        self._inherited = self._held() if way == 'inherited' else None
        self._stack = contextlib.ExitStack()
        self.proxy = self.start()

    def _held(self) -> socket.socket:
        """Return what systemd would hand over."""
        held = socket.socket(socket.AF_UNIX)
        held.bind(str(self.socket))
        shutil.chown(self.socket, group='postfix')
        self.socket.chmod(0o660)
        held.listen(1024)
        return held

    def start(self) -> ProxyProcess:
        """Start a process that serves the socket, beside one that does already."""
        options = ['-s', self.server.service, '--reuse-port']
        if self._inherited is None:
            options += [f'--listen=unix:{self.socket}']
        return self._stack.enter_context(ProxyProcess(*options, python=PYTHON, inherited=self._inherited))

    def replace(self) -> None:
        """Put a new process in the place of the one that serves."""
        old, self.proxy = self.proxy, self.start()
        assert old.terminate() == 0

    def __enter__(self) -> Site:
        self.postfix.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()  # first: Postfix waits for all that has its directory on a command line
        self.server.stop()
        if self._inherited is not None:
            self._inherited.close()
        self.postfix.close()


@pytest.fixture(params=['listen', 'inherited'])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Postfix and the proxy at a socket of one of the two kinds."""
    with Site(request.param) as running:
        yield running


def roots(postfix: Postfix) -> set[str]:
    """Return the root directories of the smtpds that run."""
    smtpds = [pid for pid in processes(postfix.directory) if arguments(pid)[:1] == ['smtpd']]
    return {os.readlink(f'/proc/{pid}/root') for pid in smtpds}


def test_a_chrooted_smtpd_asks_at_the_socket_in_its_queue_directory(site: Site) -> None:
    with site.postfix.client() as client:
        assert send_in(client)[0] == 250
        wait_until(lambda: roots(site.postfix) == {str(site.postfix.directory / 'queue')}, what='all are chrooted')
    assert len(site.server.requests) == 1
    assert not site.postfix.complaints, site.postfix.complaints


def test_the_same_path_is_right_without_chroot() -> None:
    with Site('inherited', chroot=False) as site, site.postfix.client() as client:
        assert send_in(client)[0] == 250
        wait_until(lambda: roots(site.postfix) == {'/'}, what='none is chrooted')
        assert len(site.server.requests) == 1
        assert not site.postfix.complaints, site.postfix.complaints


def test_a_replacement_and_a_reload_of_postfix_in_mid_session_are_not_noticed(site: Site) -> None:
    with site.postfix.client() as client:
        assert send_in(client)[0] == 250
        assert client.mail('alice@example.net')[0] == 250
        site.server.behaviour = slow(1)
        with ThreadPoolExecutor(1) as meanwhile:
            reply = meanwhile.submit(client.rcpt, 'bob@example.org')
            wait_until(lambda: len(site.server.requests) == 2, what='the request is in flight')
            site.postfix.command('reload')
            site.replace()
        assert reply.result()[0] == 250
        site.server.behaviour = echo
        site.replace()
        assert client.rcpt('carol@example.org')[0] == 250
        assert client.data('Subject: test\r\n\r\ntext\r\n')[0] == 250
        assert site.postfix.send()[0] == 250
    wait_until(lambda: site.postfix.delivered == 4, what='all recipients have their mail')
    assert len(site.server.requests) == 4, 'each was asked about once'
    assert not site.postfix.complaints, site.postfix.complaints


def test_replacements_and_reloads_under_load_lose_nothing_and_leave_one_socket(site: Site) -> None:
    mails = 800
    site.server.behaviour = slow(0.02)  # some request is in flight at each moment
    with site.postfix.load(mails, '-d') as load:
        for step in range(1, 4):
            wait_until(lambda step=step: len(site.server.requests) >= step * mails // 8)  # type: ignore[misc]
            site.replace()
            site.postfix.command('reload')
        assert load.poll() is None, 'the load ended too early'
    wait_until(lambda: site.postfix.delivered == mails, what='all mails are delivered')
    assert len(site.server.requests) == mails, 'each was asked about once'
    assert not site.postfix.complaints, site.postfix.complaints
    assert [*site.socket.parent.iterdir()] == [site.socket]


def test_the_absolute_path_in_main_cf_is_the_symptom_that_is_documented() -> None:
    path = '{directory}/queue/hapolicy/socket'
    with Site('listen', path) as site:
        code, text = site.postfix.send()
        assert code == 451 and text.startswith('4.3.5')
        said = f'problem talking to server {site.socket}: No such file or directory'
        site.postfix.logged(said)
    documented = said.replace(str(site.postfix.directory / 'queue'), '/var/spool/postfix')
    assert f'| `{documented}`' in (ROOT / 'docs' / 'operations.md').read_text()


def test_a_socket_that_a_killed_process_left_is_replaced() -> None:
    with Site('listen') as site, site.postfix.client() as client:
        assert send_in(client)[0] == 250
        site.proxy.process.kill()
        site.proxy.process.wait()
        left = site.socket.stat().st_ino
        site.start()
        assert site.socket.stat().st_ino != left
        assert send_in(client)[0] == 250
        assert [*site.socket.parent.iterdir()] == [site.socket]

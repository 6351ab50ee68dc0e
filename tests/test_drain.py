"""The end: draining, replacement by another process, socket activation."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import gevent.socket
import pytest

import hapolicy_gevent
from tests.servers import checked
from tests.support import (
    ACTIVATED,
    MODULE,
    SCALE,
    ProxyProcess,
    SmtpdLoad,
    echo,
    hang,
    in_threads,
    processes,
    request,
    slow,
    stubs,
    wait_until,
)


@pytest.mark.slow
def test_a_drain_opens_no_connection_for_each_client() -> None:
    with stubs(slow(0.02)) as (a,), ProxyProcess('-s', a.service + '::::5') as proxy:

        def ask_to_the_end(_: int) -> None:
            with proxy.client() as client, contextlib.suppress(OSError, AssertionError):
                while client.ask_own() == 'A':
                    pass

        clients = threading.Thread(target=in_threads, args=(30, ask_to_the_end))
        clients.start()
        wait_until(lambda: len(a.requests) > 300)
        before = a.accepted
        assert proxy.terminate() == 0
        clients.join()
        assert a.accepted - before < 15, 'each last answer took its connection along'


def test_a_drain_without_a_free_descriptor_loses_no_answer() -> None:
    with stubs(slow(1)) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.send(request(instance='one'))
        wait_until(lambda: a.requests)
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (proxy.descriptors, proxy.descriptors))
        assert proxy.terminate() == 0
        assert client.read_answer() == b'action=DUNNO one A\n\n'


@pytest.mark.slow
def test_a_new_proxy_takes_over_the_port_under_load() -> None:
    with processes('AB') as running:
        arguments = [f'-s{server.service}' for server in running] + ['--reuse-port']
        with contextlib.ExitStack() as after:
            old = after.enter_context(ProxyProcess(*arguments))
            with SmtpdLoad(old.port, 16, second_try=False) as load:
                for _ in range(3):
                    new = after.enter_context(ProxyProcess(*arguments, port=old.port))
                    assert old.terminate() == 0
                    time.sleep(0.3)
                    old = new
                wait_until(lambda: 'closed' in {each.error for each in load.tries}, what='a client that was idle')
            assert old.terminate() == 0


@pytest.mark.slow
def test_socket_activation_and_readiness(tmp_path: Path) -> None:
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / 'notify'))
    told.settimeout(60)
    with processes('A') as (a,), socket.create_server(('127.0.0.1', 0), backlog=1024) as listener:
        port = listener.getsockname()[1]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, '-c', ACTIVATED, sys.executable, str(MODULE), '-s', a.service],
                env={**os.environ, 'LISTEN_FDS': '1', 'NOTIFY_SOCKET': str(tmp_path / 'notify')},
                pass_fds=[3], preexec_fn=lambda: os.dup2(listener.fileno(), 3),
            )  # fmt: skip

        first = start()
        assert told.recv(100) == b'READY=1'
        with SmtpdLoad(port, 8, second_try=False):
            for _ in range(3):
                second = start()
                assert told.recv(100) == b'READY=1'
                first.terminate()
                assert told.recv(100) == b'STOPPING=1'
                assert first.wait(60 * SCALE) == 0
                first = second
        first.terminate()
        assert first.wait(60 * SCALE) == 0


def test_a_unix_client_that_asks_before_it_sees_our_end_is_answered_once_more() -> None:
    """There an answer and the end behind it are two calls, and Postfix may look and write between them."""
    near, far = gevent.socket.socketpair()
    with near, far:
        client = hapolicy_gevent.Client(near)
        client.closing = True
        send = client._send

        def send_to_a_quick_peer(data: bytes) -> int:
            sent: int = send(data)
            client._send = send
            far.sendall(request(instance='second'))
            return sent

        client._send = send_to_a_quick_peer
        client.answer(b'DUNNO first')
        client.finish_answer(1)
        assert client.request(1) == request(instance='second')
        client.answer(b'DUNNO second')
        client.finish_answer(1)
        far.settimeout(10)
        assert far.recv(1000) == b'action=DUNNO first\n\naction=DUNNO second\n\n'
        assert far.recv(1000) == b''
        client.close()


def test_sigterm_answers_what_is_in_flight_and_ends_with_status_0() -> None:
    with stubs(slow(0.6)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(8)]
        idle = proxy.client()
        for i, client in enumerate(clients):
            client.send(request(instance=f'i{i}'))
        wait_until(lambda: len(a.requests) >= 1)
        proxy.send(signal.SIGTERM)
        assert idle.at_end()
        for i, client in enumerate(clients):
            assert client.read_answer() == b'action=DUNNO i%d A\n\n' % i
            assert client.at_end()
        assert proxy.process.wait(30 * SCALE) == 0
        with pytest.raises(ConnectionRefusedError):
            proxy.client()


def test_a_client_that_waits_in_the_backlog_is_answered_before_the_end() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        proxy.hang()
        waiting = [proxy.client() for _ in range(300)]  # more than are accepted at a time
        for i, client in enumerate(waiting):
            client.send(request(instance=f'i{i}'))
        proxy.send(signal.SIGTERM)
        proxy.wake()
        for i, client in enumerate(waiting):
            assert client.read_answer() == b'action=DUNNO i%d A\n\n' % i
        assert proxy.process.wait(30 * SCALE) == 0


def test_after_the_grace_it_ends_with_status_1() -> None:
    with stubs(checked(hang)) as (a,), ProxyProcess('-s', a.service, '--grace=0.5') as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: a.requests)
        started = time.monotonic()
        assert proxy.terminate() == 1
        assert time.monotonic() - started < 10 * SCALE, 'the default is 30 s'
        assert '1 clients are cut off at the end of --grace' in proxy.log


def test_a_second_signal_ends_it_at_once() -> None:
    with stubs(checked(hang)) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: a.requests)
        proxy.send(signal.SIGINT)
        time.sleep(0.3)
        assert proxy.running
        proxy.send(signal.SIGINT)
        assert proxy.process.wait(15 * SCALE) == 1

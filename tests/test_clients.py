"""Clients: many of them, slow ones and deaf ones; descriptors and memory are bounded (I6, I7)."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.status import StatusProxy
from tests.support import (
    SCALE,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    ask_all,
    echo,
    free_port,
    in_threads,
    new_instance,
    processes,
    request,
    reset,
    slow,
    stubs,
    wait_until,
)


def test_thousands_of_waiting_clients_slow_nobody_down() -> None:
    with processes('A') as (a,), PolicyServerStub(slow(0.01), 'B') as b:
        arguments = ['-s', a.service, '-s', b.service + '::::5', '--stall=1', '--deadline=25']
        with ProxyProcess(*arguments) as proxy:
            assert {server for server in ask_all(proxy, 4, 5)} == {'A', 'B'}
            a.hang()
            clients = [proxy.client(60) for _ in range(3000)]
            for client in clients:
                client.send(request(instance=new_instance()))
            before = len(b.requests)
            wait_until(lambda: len(b.requests) - before > 500, 8, 'what five places answer in a second')
            a.wake()
            for client in clients:
                assert client.read_answer()
                client.close()


def test_thousands_of_idle_clients_cost_little() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        before = proxy.memory
        clients = [proxy.client() for _ in range(5000)]
        for client in clients[::25]:
            assert client.ask_own() == 'A'
        each = (proxy.memory - before) / len(clients)
        print(f'{each / 1000:.1f} kB per client')
        assert each < 20000

        def work(i: int) -> set[str]:
            return {clients[i].ask_own() for _ in range(20)}

        assert in_threads(200, work) == [{'A'}] * 200
        for client in clients:
            client.close()


def test_a_client_that_does_not_read_stalls_nobody() -> None:
    def long_answer(peer: Peer, message: bytes) -> None:
        if b'long' in message:
            peer.send(b'action=DUNNO ' + b'x' * 60000 + b'\n\n')
        else:
            echo(peer, message)

    with stubs(long_answer) as (a,), ProxyProcess('-s', a.service, '--deadline=2') as proxy:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.connect(('127.0.0.1', proxy.port))
        deaf.settimeout(1)
        try:
            for _ in range(200):
                deaf.sendall(request(sender='long'))
        except OSError:
            pass
        with proxy.client() as client:
            assert [client.ask_own() for _ in range(100)] == ['A'] * 100
        proxy.logged('answer not taken')
        deaf.close()


def test_a_client_with_a_window_of_a_few_bytes_gets_its_whole_answer() -> None:
    with stubs(lambda peer, message: peer.send(b'action=DUNNO ' + b'x' * 65000 + b'\n\n')) as (a,):
        with ProxyProcess('-s', a.service) as proxy:
            slow_reader = socket.socket()
            slow_reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            slow_reader.connect(('127.0.0.1', proxy.port))
            slow_reader.sendall(request())
            data = b''
            while not data.endswith(b'\n\n'):
                data += slow_reader.recv(100)
            assert len(data) == 7 + 6 + 65000 + 2
            slow_reader.close()


def test_ten_thousand_connects_and_hang_ups_leave_nothing_behind() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        time.sleep(0.1)
        before = proxy.descriptors
        for i in range(10000):
            sock = socket.create_connection(('127.0.0.1', proxy.port))
            if i % 3 == 0:
                reset(sock)
            else:
                if i % 3 == 1:
                    sock.send(b'request=smtpd')
                sock.close()
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        wait_until(lambda: proxy.descriptors <= before + 1, what='descriptors as before')


def test_clients_that_reset_what_they_never_used_are_not_logged() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        for data in b'', b'request=smtpd':
            with proxy.client() as client:
                sock = socket.create_connection(('127.0.0.1', proxy.port))
                sock.sendall(data)
                time.sleep(0.05)
                reset(sock)
                assert client.ask_own() == 'A'
        proxy.logged('Client connection closed')
        assert proxy.log.count('Client connection closed') == 1, 'a balancer looks so whether somebody listens'


def test_out_of_descriptors_clients_wait_in_the_backlog_and_are_served_later() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask_own()
        # taken away while it runs: at its start it allows for what it finds
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (40, 40))
        clients = [proxy.client() for _ in range(80)]
        proxy.logged('Cannot accept a client')
        cpu, started = proxy.cpu, time.monotonic()
        time.sleep(2)
        assert (proxy.cpu - cpu) / (time.monotonic() - started) < 0.2
        assert proxy.log.count('Cannot accept a client') <= 1 + (time.monotonic() - started) + 2
        for client in clients[:60]:
            client.close()
        assert [client.ask_own() for client in clients[60:]] == ['A'] * 20


def test_more_clients_than_descriptors_carry_are_never_accepted_at_once() -> None:
    with stubs(echo) as (a,):
        limited = ('prlimit', '--nofile=60:60')
        with ProxyProcess('-s', a.service, '--max-clients=1000', before=limited) as proxy:
            proxy.logged("--max-clients '1000' is more than the descriptor limit of 60 carries")
            clients = [proxy.client() for _ in range(80)]
            proxy.logged('more wait in the backlog')

            def work(i: int) -> str:
                with clients[i] as client:
                    return client.ask_own()

            assert in_threads(80, work) == ['A'] * 80


def test_with_the_default_of_max_clients_descriptors_suffice() -> None:
    with stubs(echo) as (a,):
        with ProxyProcess('-s', a.service, before=('prlimit', '--nofile=200:200')) as proxy:
            clients = [proxy.client() for _ in range(150)]
            assert [client.ask_own() for client in clients[:60]] == ['A'] * 60
            proxy.logged('more wait in the backlog')
            for client in clients[:90]:
                client.close()
            assert [client.ask_own() for client in clients[90:]] == ['A'] * 60
            assert 'Cannot accept' not in proxy.log


def test_max_clients_more_wait_and_are_served_as_others_leave() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '--max-clients=2') as proxy:
        first, second, third = proxy.client(), proxy.client(), proxy.client()
        assert (first.ask_own(), second.ask_own()) == ('A', 'A')
        third.send(request(instance='x'))
        third.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            third.read_answer()
        headline = proxy.data()['headline']
        assert headline['level'] == 'warning' and ' 2 clients are served, the most allowed: ' in headline['text']
        first.close()
        third.sock.settimeout(30 * SCALE)
        assert third.read_answer() == b'action=DUNNO x A\n\n'


#: Runs the program with a second in place of ten minutes.
OFTEN = ('-c', 'import sys, hapolicy_gevent as h; h.LOG_AGAIN = 1.0; sys.exit(h.main(sys.argv[3:]))')


@pytest.mark.slow
def test_while_no_further_clients_are_served_the_log_says_so_again() -> None:
    said = ' 1 clients are served, the most allowed: '
    with stubs(echo) as (a,):
        with ProxyProcess('-s', a.service, '--max-clients=1', before=(sys.executable, *OFTEN)) as proxy:
            with proxy.client() as client:
                assert client.ask_own() == 'A'
                wait_until(lambda: proxy.log.count(said) > 1, 20, 'it says so twice')


def test_a_client_that_pipelines_and_reads_slowly_takes_no_more_memory(tmp_path: Path) -> None:
    arguments = ['-s', f'A=127.0.0.1:{free_port()}', '-d', 'dunno ' + 'x' * 60000, f'--listen=unix:{tmp_path}/s']
    with ProxyProcess(*arguments) as proxy, PostfixClient(f'{tmp_path}/s') as client:

        def push() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client.send(b'x=1\n\n' * 13000)

        before, pushing, end = proxy.memory, threading.Thread(target=push), time.monotonic() + 4
        pushing.start()
        while time.monotonic() < end:
            client.sock.recv(60000)
            time.sleep(0.001)
        assert proxy.memory - before < 4e6
        client.sock.shutdown(socket.SHUT_RDWR)
        pushing.join()

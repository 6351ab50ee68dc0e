"""The proxy as a process: bad input, room, deadlines, draining; each row of the promises in README by name."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gevent.socket
import pytest

import hapolicy_gevent
from tests.servers import checked
from tests.support import (
    SCALE,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    attributes,
    echo,
    free_port,
    hang,
    in_threads,
    new_instance,
    request,
    reset,
    slow,
    stubs,
    wait_until,
)


def answer_and_hang_up(peer: Peer, message: bytes) -> None:
    """Answer each request on a connection of its own."""
    echo(peer, message)
    raise HangUp


def test_a_request_of_another_type_gets_the_default_and_nothing_leaks_into_the_next() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '-d', '450 later') as proxy, proxy.client() as client:
        assert client.ask(b'request=junk\nsender=leak@example.org\n\n') == '450 later'
        assert client.ask(b'sender=leak@example.org\n\n') == '450 later'
        assert client.ask(b'request=smtpd_access_policy\ninstance=i\n\n') == 'DUNNO i A'
        assert a.requests == [b'request=smtpd_access_policy\ninstance=i\n\n']
        wait_until(lambda: "Default action '450 later' given 2 times: not a request" in proxy.log)


@pytest.mark.parametrize('pause', [0, 0.1], ids=['together', 'apart'])
@pytest.mark.parametrize('lines', [b'\n', b'\r\n', b'\n\r\n\n'])
def test_empty_lines_between_requests_are_skipped(lines: bytes, pause: float) -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for _ in range(3):
            client.send(lines)
            time.sleep(pause)
            assert client.ask_own() == 'A'
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        assert len(a.requests) == 3 and not any(message.startswith((b'\n', b'\r')) for message in a.requests)
        assert 'not a request' not in proxy.log


def test_a_request_without_end_is_cut_off_and_memory_stays_bounded() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        before = proxy.memory
        for _ in range(100):
            with proxy.client() as client:
                client.sock.settimeout(10)
                try:
                    for _ in range(16):
                        client.send(b'x' * 65536)
                except OSError:
                    pass
        proxy.logged('request too long')
        assert proxy.memory - before < 30e6
        with proxy.client() as client:
            assert client.ask_own() == 'A'


def test_a_slow_loris_is_cut_off_at_the_deadline_and_an_idle_client_is_not() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '--deadline=1') as proxy:
        with proxy.client() as idle, proxy.client() as loris:
            started = time.monotonic()
            try:
                for byte in request():
                    loris.send(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass
            assert time.monotonic() - started < 10 * SCALE
            proxy.logged('request too slow')
            time.sleep(1)
            assert idle.ask_own() == 'A'


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
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '--max-clients=2') as proxy:
        first, second, third = proxy.client(), proxy.client(), proxy.client()
        assert (first.ask_own(), second.ask_own()) == ('A', 'A')
        third.send(request(instance='x'))
        third.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            third.read_answer()
        first.close()
        third.sock.settimeout(30 * SCALE)
        assert third.read_answer() == b'action=DUNNO x A\n\n'


def test_max_bounds_what_a_server_gets_and_the_others_wait_for_a_slot() -> None:
    most, now, lock = [0], [0], threading.Lock()

    def behave(peer: Peer, message: bytes) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + '::::3') as proxy:

        def work(_: int) -> set[str]:
            with proxy.client() as client:
                return {client.ask_own() for _ in range(10)}

        assert in_threads(20, work) == [{'A'}] * 20
        assert most[0] == 3
        assert a.open <= 3


@pytest.mark.parametrize('ending', ['returned', 'died', 'timed out', 'client gone'])
def test_a_freed_slot_wakes_a_waiter_whatever_freed_it(ending: str) -> None:
    blocked = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        if b'first' in message:
            blocked.set()
            if ending == 'returned':
                time.sleep(0.3)
            elif ending == 'died':
                time.sleep(0.3)
                raise HangUp
            else:
                peer.hang()
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::2:1') as proxy:
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        time.sleep(0.1)
        first = proxy.client()
        first.send(request(instance='first'))
        assert blocked.wait(30 * SCALE)
        waiting = [proxy.client() for _ in range(3)]
        for i, client in enumerate(waiting):
            client.send(request(instance=f'w{i}'))
        if ending == 'client gone':
            reset(first.sock)
        for i, client in enumerate(waiting):
            assert client.read_answer() == b'action=DUNNO w%d A\n\n' % i


def test_a_waiter_that_leaves_does_not_take_a_slot_with_it() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service + '::::1') as proxy:
        for _ in range(3):
            clients = [proxy.client() for _ in range(6)]
            for client in clients:
                client.send(request(instance=new_instance()))
            for client in clients[1::2]:
                reset(client.sock)
            for client in clients[::2]:
                assert client.read_answer().startswith(b'action=DUNNO')


def test_the_deadline_is_over_all_services_and_the_default_comes_before_it_passes() -> None:
    with stubs(*[checked(hang)] * 3) as servers:
        services = [f'-s{server.service}:::1' for server in servers]
        with ProxyProcess(*services, '--deadline=1.5') as proxy, proxy.client() as client:
            started = time.monotonic()
            assert client.ask(request()) == 'dunno'
            assert 1.4 < time.monotonic() - started < 1.5 + 10 * SCALE
            proxy.logged('given: default, deadline')


def test_waiting_for_a_slot_ends_at_the_deadline() -> None:
    with stubs(hang) as (a,), ProxyProcess('-s', a.service + ':::60:1', '--deadline=1') as proxy:
        started = time.monotonic()

        def work(_: int) -> str:
            with proxy.client() as client:
                return client.ask(request(instance=new_instance()))

        assert in_threads(5, work) == ['dunno'] * 5
        assert time.monotonic() - started < 1 + 10 * SCALE


def test_time_spent_waiting_for_a_slot_is_taken_from_the_deadline() -> None:
    with stubs(slow(0.9)) as (a,), ProxyProcess('-s', a.service + ':::5:1', '--deadline=1.5') as proxy:

        def work(_: int) -> str:
            with proxy.client() as client:
                return client.ask(request(instance=new_instance()))

        assert in_threads(3, work).count('dunno') >= 2, 'the second waits 0.9 s and needs as long'


def test_the_requests_of_a_message_share_a_server_connection() -> None:
    seen: dict[str, set[tuple[str, int]]] = {}

    def behave(peer: Peer, message: bytes) -> None:
        seen.setdefault(attributes(message)['instance'], set()).add((peer.server.name, id(peer)))
        echo(peer, message)

    with stubs(*[checked(behave)] * 2) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:

        def work(_: int) -> None:
            with proxy.client() as client:
                for _ in range(20):
                    instance = new_instance()
                    for state in ('RCPT', 'RCPT', 'DATA', 'END-OF-MESSAGE'):
                        client.ask(request(instance=instance, protocol_state=state))

        work(0)
        assert [len(places) for places in seen.values()] == [1] * 20
        in_threads(4, work)
        assert len(seen) == 100
        assert {len({server for server, _ in places}) for places in seen.values()} == {1}


def test_a_message_spread_over_client_connections_goes_to_one_service() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        with proxy.client() as one, proxy.client() as two:
            for _ in range(20):
                message = request(instance=new_instance())
                assert one.ask(message) == two.ask(message)


def test_a_used_connection_that_has_ended_is_no_failure() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for _ in range(5):
            assert client.ask_own() == 'A'
            time.sleep(0.06)
            a.stop()
            a.start()
        assert client.ask_own() == 'A'
        assert 'failed: refused' not in proxy.log and 'is down' not in proxy.log


def test_host_names_are_resolved_and_one_that_is_unknown_is_a_failure() -> None:
    with PolicyServerStub(name='A') as a:
        with ProxyProcess('-s', f'A=localhost:{a.port}:20', '-s', 'X=no.such.host.invalid:1:10') as proxy:
            with proxy.client() as client:
                assert client.ask_own() == 'A'
            proxy.logged('[X] (no.such.host.invalid:1) is down: its check: unreachable, ')


#: What a python imports first of all: lookups of names as a file says, those of names with an x at least.
NAME_SERVER = """
import _socket, time
def getaddrinfo(host, port, *args, **kwargs):
    how = open({!r}).read() if 'x' in host else '127.0.0.1'
    if how == 'fails':
        raise _socket.gaierror(-3, 'Temporary failure in name resolution')
    if how == 'hangs':
        time.sleep(600)
    delay, _, how = how.rpartition('s later: ')
    time.sleep(float(delay or 0))
    return [(_socket.AF_INET6 if ':' in address else _socket.AF_INET, _socket.SOCK_STREAM, 6, '', (address, port))
            for address in how.split()]
_socket.getaddrinfo = getaddrinfo
"""


class NameServer:
    """Tells a proxy with this environment where hosts are: addresses ('0.3s later: ' before them), 'fails', 'hangs'."""

    def __init__(self, folder: Path) -> None:
        (folder / 'sitecustomize.py').write_text(NAME_SERVER.format(str(folder / 'names')))
        self.environment = {'PYTHONPATH': str(folder)}
        self.write = (folder / 'names').write_text
        self.write('127.0.0.1')


@pytest.mark.parametrize('trouble', ['fails', 'hangs'])
def test_a_service_is_asked_where_it_was_last_while_its_name_cannot_be_looked_up(tmp_path: Path, trouble: str) -> None:
    names = NameServer(tmp_path)
    with (stubs(answer_and_hang_up) as (a,),
          ProxyProcess('-s', f'A=x:{a.port}', environment=names.environment) as proxy, proxy.client() as client):
        assert client.ask_own() == 'A'
        names.write(trouble)
        began = time.monotonic()
        assert [client.ask_own() for _ in range(10)] == ['A'] * 10
        assert time.monotonic() - began < 20 * SCALE, 'each waits a moment for the lookup, not as long as it takes'
        assert ') failed: ' not in proxy.log
        if trouble == 'fails':
            assert proxy.log.count('asking where it was last') == 1
            names.write('127.0.0.1')
            wait_until(lambda: client.ask_own() == 'A' and 'host name: found again' in proxy.log)


def test_names_that_hang_do_not_hinder_other_names(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(echo) as (a,):
        hanging = [option for number in range(20) for option in ('-s', f'X{number}=x:{a.port}:::1')]
        with ProxyProcess('-s', f'A=a:{a.port}:20', *hanging, environment=names.environment) as proxy:
            names.write('hangs')

            def ask(_: int) -> str:
                with proxy.client() as client:
                    return client.ask_own()

            assert in_threads(40, ask) == ['A'] * 40


@contextlib.contextmanager
def deaf(host: str, port: int = 0) -> Iterator[int]:
    """Listen where no connection is accepted, nor refused; yield the port."""
    with socket.socket() as listener, contextlib.ExitStack() as full:
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(3):  # what comes after them is not even refused
            sock = full.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_an_address_of_a_name_that_is_not_connected_to_is_tried_last(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(answer_and_hang_up) as (a,), deaf('127.0.0.3', a.port):
        names.write('127.0.0.3 127.0.0.1')
        with (ProxyProcess('-s', f'A=x:{a.port}:::3', environment=names.environment) as proxy,
              proxy.client() as client):  # fmt: skip
            wait_until(lambda: client.ask_own() == 'A', what='its time goes by once')
            began = time.monotonic()
            assert [client.ask_own() for _ in range(5)] == ['A'] * 5
            assert time.monotonic() - began < 5 * SCALE, 'each is asked on a connection of its own'
            assert proxy.log.count('is down') <= 1 and ') failed: ' not in proxy.log


def test_a_burst_goes_to_the_first_address_of_a_name_and_not_to_a_deaf_second(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(slow(0.02)) as (a,), deaf('127.0.0.3', a.port):
        names.write('127.0.0.1 127.0.0.3')
        with ProxyProcess('-s', f'A=x:{a.port}:::3', environment=names.environment) as proxy:

            def work(_: int) -> list[str]:
                with proxy.client() as client:
                    return [client.ask_own() for _ in range(20)]

            assert {action for actions in in_threads(16, work) for action in actions} == {'A'}
            assert ') failed: ' not in proxy.log


def test_of_two_addresses_that_fail_the_one_that_may_be_well_decides(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    names.write('2001:db8::1 127.0.0.3 2001:db8::1')
    with (deaf('127.0.0.3') as port, ProxyProcess('-s', f'A=x:{port}', environment=names.environment) as proxy,
          proxy.client() as client):  # fmt: skip
        assert client.ask_own() == 'default'
        proxy.logged(f'[A] (x:{port}) is down: its check: timeout, no connection in time')
        assert 'unreachable' not in proxy.log


class At(PolicyServerStub):
    """A server at another address of the loopback."""

    def __init__(self, host: str, name: str, port: int) -> None:
        self.host = host
        super().__init__(echo, name, port)

    def start(self) -> None:
        self._listener = socket.create_server((self.host, self.port), backlog=100)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()


@pytest.mark.parametrize('delay', ['', '0.01s later: ', '0.3s later: '])
def test_a_name_that_moves_under_load_costs_no_request(tmp_path: Path, delay: str) -> None:
    names, port = NameServer(tmp_path), free_port()
    names.write(delay + '127.0.0.2')
    with At('127.0.0.2', 'OLD', port) as old, At('127.0.0.1', 'NEW', port):
        with ProxyProcess('-s', f'A=x:{port}', environment=names.environment) as proxy:

            def work(_: int) -> list[str]:
                answers, end = [], time.monotonic() + 3
                with proxy.client() as client:
                    while time.monotonic() < end:
                        answers.append(client.ask_own())
                        time.sleep(0.02)
                return answers

            def move() -> None:
                time.sleep(1)
                names.write(delay + '127.0.0.1')
                time.sleep(0.5)
                old.stop()

            mover = threading.Thread(target=move)
            mover.start()
            assert {action for actions in in_threads(8, work) for action in actions} == {'OLD', 'NEW'}
            mover.join()
            assert 'is down' not in proxy.log


def test_a_unix_server_with_a_full_backlog_costs_no_processor(tmp_path: object) -> None:
    path = f'{tmp_path}/full'
    full = socket.socket(socket.AF_UNIX)
    full.bind(path)
    full.listen(0)
    fillers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for filler in fillers:
        filler.setblocking(False)
        try:
            filler.connect(path)
        except BlockingIOError:
            pass
    with stubs(echo) as (a,), ProxyProcess('-s', f'F=unix:{path}:1::1', '-s', a.service) as proxy:
        cpu = proxy.cpu
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        assert proxy.cpu - cpu < 0.5
    full.close()


@pytest.mark.parametrize('size', [1, 500, 65536 - len(request(policy_context=''))])
def test_requests_of_any_size_up_to_the_limit_are_passed_on(size: int) -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        message = request(policy_context='x' * size)
        assert client.ask(message).endswith(' A')
        assert a.requests == [message]


def test_nothing_is_written_to_a_client_that_has_not_asked() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '--deadline=1') as proxy, proxy.client() as client:
        client.sock.settimeout(2)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        assert client.ask_own() == 'A'
        client.sock.settimeout(1)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)


@pytest.mark.skipif(not os.path.exists('/proc/net/if_inet6'), reason='no IPv6 here')
def test_ipv6_on_both_sides() -> None:
    listener = socket.socket(socket.AF_INET6)
    listener.bind(('::1', 0))
    listener.listen()
    port, where = listener.getsockname()[1], free_port(socket.AF_INET6)

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            while sock.recv(65536):
                sock.sendall(b'action=DUNNO six\n\n')

    threading.Thread(target=serve, daemon=True).start()
    with ProxyProcess('-s', f'A=[::1]:{port}', f'--listen=[::1]:{where}') as proxy:
        with socket.create_connection(('::1', where), timeout=60) as sock:
            sock.sendall(request())
            assert sock.recv(100) == b'action=DUNNO six\n\n'
        with PostfixClient(proxy.port) as client:
            assert client.ask(request()) == 'DUNNO six'


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


def test_a_unix_client_that_has_a_path_of_its_own_is_served_and_refused(tmp_path: Path) -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, f'--listen=unix:{tmp_path}/s') as proxy:
        for name in ('a', 'bound'):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(f'{tmp_path}/{name}')
                sock.connect(f'{tmp_path}/s')
                sock.sendall(b'request=x\n')
        proxy.logged('Client connection closed: left in mid-request')


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

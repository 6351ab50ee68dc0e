"""The pool and its growth: what is reused, what is not, and that waiting never outlasts its reason."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import gevent
import pytest

import hapolicy_gevent
from hapolicy_gevent import (
    RESET,
    SETTLE,
    TRIAL,
    Address,
    ClientFault,
    HostName,
    Log,
    Pool,
    Proxy,
    QueryTimeout,
    Queue,
    Service,
    Statistics,
    StreamSink,
    bind_beside,
    parse_service,
)
from tests.support import (
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    attributes,
    echo,
    hang,
    in_threads,
    new_instance,
    request,
    slow,
    stubs,
    wait_until,
)


def as_asked(peer: Peer, message: bytes) -> None:
    """Take as many seconds as the request's policy_context says."""
    time.sleep(float(attributes(message).get('policy_context') or 0))
    echo(peer, message)


def ask_for(client: PostfixClient, seconds: float) -> str:
    """Ask what takes the server so many seconds."""
    return client.ask(request(instance=new_instance(), policy_context=seconds))


def now_and_then_twice(pause: float) -> Behaviour:
    """Answer every fifth request again after a pause, once a few were answered well."""
    count = [0]

    def behave(peer: Peer, message: bytes) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo(peer, message)
        count[0] += 1
        if count[0] > 3 and count[0] % 5 == 0:
            end = time.perf_counter() + pause
            while time.perf_counter() < end:
                pass
            echo(peer, message)

    return behave


def test_i2_a_second_answer_is_found_before_a_waiting_request_takes_the_connection() -> None:
    # max 1: a slot and its connection are handed over before the loop polls again
    strangers = 0
    for pause in (0, 0.00005, 0.0002):
        with stubs(now_and_then_twice(pause)) as (a,), ProxyProcess('-s', a.service + ':10:1:5:1') as proxy:
            with proxy.client() as client:
                client.ask_own()
            time.sleep(0.1)

            def work(_: int, proxy: ProxyProcess = proxy) -> int:
                wrong = 0
                with proxy.client() as client:
                    for _ in range(13):
                        instance = new_instance()
                        action = client.ask(request(instance=instance))
                        wrong += instance not in action and action != 'dunno'
                return wrong

            strangers += sum(in_threads(8, work))
            proxy.logged('each of its connections is used once')
    # one that comes after the next request was sent cannot be told from its answer
    assert strangers <= 3, f'{strangers} of 312 requests had the answer of another'


class FewAtATime(PolicyServerStub):
    """Hangs up, so many seconds late, on more connections: as xinetd's `instances`, systemd's `MaxConnections` do."""

    def __init__(self, behaviour: Behaviour, limit: int = 5, late: float = 0) -> None:
        self._lock = threading.Lock()
        self._free, self._late = limit, late
        super().__init__(behaviour)

    def _serve(self, peer: Peer) -> None:
        with self._lock:
            self._free -= 1
            full = self._free < 0
        if full:
            time.sleep(self._late)
            peer.closed.set()
            peer.sock.close()
        else:
            super()._serve(peer)
        with self._lock:
            self._free += 1


def test_a_server_that_hangs_up_on_more_connections_stays_up_and_every_request_is_answered() -> None:
    with FewAtATime(slow(0.05)) as a, ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> list[str]:
            with proxy.client() as client:
                return [client.ask_own() for _ in range(15)]

        assert {action for actions in in_threads(20, work) for action in actions} == {'A'}
        proxy.logged('seems to serve no more than ')
        assert 'is down' not in proxy.log


@pytest.mark.parametrize('seconds', [0.2, 1])
def test_one_client_more_than_a_server_that_hangs_up_has_room_for_is_answered(seconds: float) -> None:
    with FewAtATime(slow(seconds)) as a, ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> list[str]:
            with proxy.client() as client:
                return [client.ask_own() for _ in range(3)]

        for clients in (5, 5, 6):
            assert {action for actions in in_threads(clients, work) for action in actions} == {'A'}
        proxy.logged('seems to serve no more than 5 connections')


def test_a_server_that_hangs_up_on_more_connections_late_stays_up() -> None:
    with FewAtATime(slow(0.1), late=0.1) as a, ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> list[str]:
            with proxy.client() as client:
                return [client.ask_own() for _ in range(10)]

        assert {action for actions in in_threads(20, work) for action in actions} == {'A'}
        assert 'is down' not in proxy.log


def test_a_burst_after_all_connections_have_ended_takes_no_full_server_down() -> None:
    with FewAtATime(slow(0.3)) as a, ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> list[str]:
            with proxy.client() as client:
                return [client.ask_own() for _ in range(3)]

        for clients in (4, 4, 12):
            assert {action for actions in in_threads(clients, work) for action in actions} == {'A'}
            for peer in a.peers:
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.2)
        assert 'is down' not in proxy.log


def test_messages_that_kill_their_worker_teach_no_limit_of_connections() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if b'sender=poison' in message:
            raise HangUp
        time.sleep(0.2)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:

        def work(_: int) -> list[str]:
            with proxy.client() as one:
                return [one.ask_own() for _ in range(3)]

        in_threads(8, work)
        for _ in range(4):
            asked = len(a.requests)
            assert client.ask(request(sender='poison', instance=new_instance())) == 'dunno'
            assert len(a.requests) - asked == 2, 'a connection that had ended, for all we know, and a new one'
            assert client.ask_own() == 'A'
        assert 'seems to serve' not in proxy.log and 'is down' not in proxy.log
        began = time.monotonic()
        assert {action for actions in in_threads(24, work) for action in actions} == {'A'}
        assert time.monotonic() - began < 6


class Greeter(PolicyServerStub):
    """Says something before it is asked."""

    def _serve(self, peer: Peer) -> None:
        peer.send(b'action=OK greeting\n\n')
        super()._serve(peer)


def test_a_server_that_talks_first_is_found_out_and_gets_no_requests() -> None:
    with Greeter(echo, 'G') as g, stubs(echo) as (a,):
        with ProxyProcess('-s', g.service + ':1', '-s', a.service, '--fall=3') as proxy, proxy.client() as client:
            client.ask(request())  # nothing tells what came first from an answer
            time.sleep(2 * SETTLE)
            assert [client.ask_own() for _ in range(10)] == ['A'] * 10
            proxy.logged('G] (' + g.service[2:] + ') is trial')
            assert client.ask_own() == 'A'
            proxy.logged(') is down: invalid 4 times in a row')
            assert len(g.requests) == 1


def twice(peer: Peer, message: bytes) -> None:
    echo(peer, message)
    time.sleep(0.015)
    echo(peer, message)


REPLACED = """
import socket, sys, threading, time
listener, pause = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])
def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = b''
    while data := sock.recv(65536):
        buffer += data
        while b'\\n\\n' in buffer:
            message, _, buffer = buffer.partition(b'\\n\\n')
            reply = b'action=DUNNO ' + message.partition(b'instance=')[2].partition(b'\\n')[0] + b' A\\n\\n'
            time.sleep(0.002)
            sock.sendall(reply)
            if pause:
                time.sleep(pause)
                sock.sendall(reply)
sys.stdin.readline()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def test_a_server_replaced_under_load_by_one_that_answers_twice_is_found_out() -> None:
    def start(pause: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, '-c', REPLACED, str(listener.fileno()), str(pause)]
        return subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )

    for clients in (4, 8, 16):
        with socket.create_server(('127.0.0.1', 0), backlog=200) as listener, start(0) as old, start(0.005) as new:
            assert old.stdin and new.stdin
            old.stdin.write(b'\n')
            with ProxyProcess('-s', f'A=127.0.0.1:{listener.getsockname()[1]}') as proxy:
                end = time.monotonic() + 2

                def work(_: int, proxy: ProxyProcess = proxy, end: float = end) -> None:
                    with proxy.client() as client:
                        while time.monotonic() < end:
                            client.ask_own()

                def replace(old: subprocess.Popen[bytes] = old, new: subprocess.Popen[bytes] = new) -> None:
                    time.sleep(0.7)
                    old.kill()
                    old.wait()
                    assert new.stdin
                    new.stdin.write(b'\n')

                replacer = threading.Thread(target=replace)
                replacer.start()
                in_threads(clients, work)
                replacer.join()
                proxy.logged('each of its connections is used once')
            new.kill()


def test_a_server_is_watched_again_once_all_its_connections_have_ended() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for _ in range(3):
            assert client.ask_own() == 'A'
            time.sleep(2 * SETTLE)
        a.stop()
        a.behaviour = twice
        a.start()
        time.sleep(SETTLE)
        for _ in range(10):
            instance = new_instance()
            assert instance in client.ask(request(instance=instance))
            time.sleep(0.005)
        assert 'is down' not in proxy.log


def test_an_answer_that_drips_is_not_read_again_at_each_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(peer: Peer, message: bytes) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b'x: y\n\r\r\n' * 20 + b'action=DUNNO\n\r\n':
            peer.send(bytes([byte]))
            time.sleep(0.0005)

    read, original = [], hapolicy_gevent.parse_answer

    def parse(data: bytes, closed: bool = False) -> bytes | None:
        read.append(data)
        return original(data, closed)

    monkeypatch.setattr(hapolicy_gevent, 'parse_answer', parse)
    with stubs(drip) as (a,):
        connection = Pool(parse_service(a.service), Queue(Statistics()), quiet_log()).open()
        assert connection.exchange(b'request=smtpd_access_policy\n\n') == b'DUNNO'
        connection.close()
    assert len(read) < 10


def test_a_timeout_shorter_than_the_look_for_a_second_answer_is_enough() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service + ':::0.04') as proxy:
        for _ in range(3):
            with proxy.client() as client:
                assert client.ask_own() == 'A'
        assert ' failed: timeout' not in proxy.log and 'is down' not in proxy.log


def test_growth_goes_on_after_the_end_of_a_burst() -> None:
    with stubs(as_asked) as (a,), ProxyProcess('-s', a.service, '--deadline=20') as proxy:
        clients = [proxy.client() for _ in range(30)]
        clients[0].ask(request(instance=new_instance()))
        time.sleep(0.1)

        def tail(i: int) -> None:  # two overlap, and the one on the new connection ends alone
            time.sleep(0.02 * i)
            clients[i].ask(request(instance=new_instance(), policy_context=[0.1, 0.2][i]))

        in_threads(2, tail)
        started = time.monotonic()
        in_threads(30, lambda i: [ask_for(clients[i], 0.2) for _ in range(4)])
        assert time.monotonic() - started < 6, 'two connections would take 12 s'


def test_after_its_return_a_service_grows_with_new_connections() -> None:
    with stubs(as_asked) as (a,), ProxyProcess('-s', a.service + ':::1.5', '--deadline=20') as proxy:
        clients = [proxy.client() for _ in range(24)]
        in_threads(8, lambda i: [ask_for(clients[i], 0.1) for _ in range(4)])

        def two_late_and_one_answered_after(i: int) -> None:
            time.sleep([0, 0, 0.9][i])
            clients[i].ask(request(instance=new_instance(), policy_context=[2.5, 2.5, 1.4][i]))

        in_threads(3, two_late_and_one_answered_after)
        proxy.logged('is trial')
        assert clients[0].ask_own() == 'A'
        started = time.monotonic()
        in_threads(24, lambda i: [ask_for(clients[i], 0.1) for _ in range(3)])
        assert time.monotonic() - started < 4, 'one connection would take 7 s'


def test_a_server_slow_by_nature_is_given_more_connections_as_requests_wait() -> None:
    with stubs(slow(1.0)) as (a,), ProxyProcess('-s', a.service, '--deadline=10') as proxy:
        clients = [proxy.client() for _ in range(60)]
        assert in_threads(60, lambda i: clients[i].ask_own()) == ['A'] * 60


def test_a_timeout_above_the_deadline_leaves_time_for_the_next_service_and_counts() -> None:
    with stubs(echo, echo) as (a, b):
        with ProxyProcess('-s', a.service, '-s', b.service, '--deadline=2', '--stall=1') as proxy:
            clients = [proxy.client() for _ in range(6)]
            in_threads(6, lambda i: [clients[i].ask_own() for _ in range(10)])
            a.behaviour = hang
            answered = in_threads(6, lambda i: {clients[i].ask_own() for _ in range(200)})
            assert set().union(*answered) <= {'A', 'B'}
            proxy.logged('[A] (' + a.service[2:] + ') is down: timeout')
            assert 'The timeout of A, B is over half of --deadline 2s: ' in proxy.log


def test_who_waits_for_a_full_service_is_served_by_another_that_returns() -> None:
    with stubs(slow(2), echo) as (a, b):
        b.stop()
        services = ['-s', a.service + ':10:1:30:1', '-s', b.service]
        with ProxyProcess(*services, '--deadline=8', '--stall=20') as proxy:
            with proxy.client() as client:
                client.ask_own()
                client.ask_own()
            proxy.logged('is down: refused')
            clients = [proxy.client() for _ in range(8)]
            threading.Timer(0.3, b.start).start()
            answered = in_threads(8, lambda i: clients[i].ask_own())
            assert answered.count('B') >= 4 and 'default' not in answered, answered


def test_one_slow_request_is_not_taken_for_a_missing_worker() -> None:
    with stubs(as_asked) as (a,), ProxyProcess('-s', a.service + ':::1', '--deadline=8') as proxy:
        clients = [proxy.client() for _ in range(20)]
        clients[0].ask_own()
        time.sleep(0.1)

        def one_hangs_on_the_youngest(i: int) -> None:
            if i == 0:
                time.sleep(0.05)
                clients[0].ask(request(instance=new_instance(), policy_context=3))
            else:
                for _ in range(10):
                    clients[1].ask(request(instance=new_instance(), policy_context=0.2))

        in_threads(2, one_hangs_on_the_youngest)
        assert 'seems to serve' not in proxy.log
        started = time.monotonic()
        in_threads(20, lambda i: [ask_for(clients[i], 0.2) for _ in range(4)])
        assert time.monotonic() - started < 6, 'one at a time would take 16 s'


def test_i6_a_client_that_pipelines_without_end_stops_nobody() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as good, proxy.client() as bad:
        assert good.ask_own() == 'A'
        stop = threading.Event()

        def flood() -> None:
            try:
                while not stop.is_set():
                    bad.sock.sendall(b'\n' * 65536)
            except OSError:
                pass

        def read() -> None:
            try:
                while bad.sock.recv(1 << 20):
                    pass
            except OSError:
                pass

        threads = [threading.Thread(target=work, daemon=True) for work in (flood, read)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        held = []
        for _ in range(8):
            started = time.monotonic()
            assert good.ask_own() == 'A'
            held.append(time.monotonic() - started)
        stop.set()
        bad.close()
        assert sorted(held)[4] < 0.1, held


def test_a_hung_service_makes_few_requests_wait() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        clients = [proxy.client() for _ in range(40)]
        in_threads(3, lambda i: [clients[i].ask_own() for _ in range(20)])
        a.behaviour = hang
        held: list[float] = []

        def work(i: int) -> None:
            for _ in range(20):
                started = time.monotonic()
                clients[i].send(request(instance=new_instance()))
                clients[i].sock.settimeout(1.5)
                try:
                    clients[i].read_answer()
                except TimeoutError:
                    return  # one that the hung service has already
                held.append(time.monotonic() - started)

        in_threads(40, work)
        assert len(held) > 400
        # those that came before the first had waited in vain; without that memory it would be half of all
        assert sum(seconds > 0.09 for seconds in held) <= 80, sorted(held)[-100:]


def test_idle_connections_are_few_after_a_burst() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(60)]
        for _ in range(3):
            in_threads(60, lambda i: clients[i].ask_own())
        assert a.open > 20
        wait_until(lambda: a.open <= 20, 10, 'idle connections above 20 closed')


def test_i7_instances_of_any_length_are_not_kept() -> None:
    with stubs(lambda peer, message: peer.send(b'action=DUNNO\n\n')) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask(request(instance='x' * 60000))
            before = proxy.memory
            for i in range(300):
                client.ask(request(instance=f'{i}' + 'x' * 60000))
            assert proxy.memory - before < 8e6


def test_a_socket_left_by_a_dead_process_with_our_pid_is_no_obstacle(tmp_path: object) -> None:
    with socket.socket(socket.AF_UNIX) as left_over, socket.socket(socket.AF_UNIX) as sock:
        left_over.bind(f'{tmp_path}/.{os.getpid()}.{sock.fileno()}')
        bind_beside(sock, f'{tmp_path}/t', 0o600, False)
        assert os.stat(sock.getsockname()).st_mode & 0o777 == 0o600


def quiet_log() -> Log:
    return Log(StreamSink(os.open(os.devnull, os.O_WRONLY)))


def test_a_fault_of_ours_in_what_is_done_each_second_costs_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []

    def prune(*_: object) -> None:
        times.append(1)
        raise KeyError('of ours')

    monkeypatch.setattr(Pool, 'prune', prune)
    Proxy([parse_service('A=127.0.0.1:1')], b'dunno', 90.0, quiet_log())
    gevent.sleep(2.5)
    assert len(times) == 2


def pool_on(service: Service) -> Pool:
    return Pool(service, Queue(Statistics()), quiet_log())


def test_i2_a_service_that_went_down_while_it_was_watched_for_a_second_answer_is_watched_again() -> None:
    with stubs(echo) as (a,):
        service = parse_service(a.service)
        pool = pool_on(service)

        def one(watched: bool) -> None:
            slot = service.begin(time.monotonic())
            if watched:
                gevent.spawn(pool.forget)
            _, connection = pool.ask(request(), slot, None, QueryTimeout(5), True)
            pool.release(connection, slot, True, time.monotonic())

        one(False)
        one(True)  # waits for SETTLE, and the service goes down meanwhile
        began = time.monotonic()
        one(False)
        assert time.monotonic() - began > SETTLE / 2, 'the connection of the service as it is now is watched'


def test_a_connection_that_was_being_opened_when_its_service_went_down_is_used_once() -> None:
    near, far = socket.socketpair()

    def connect() -> socket.socket:
        pool.forget()  # the service goes down meanwhile
        return near

    service = parse_service('A=unix:/a')
    pool = pool_on(service)
    pool.connect = connect
    slot = service.begin(1)
    connection = pool.open()
    pool.release(connection, slot, True, 2)
    assert pool.idle == [], 'it would prove nothing, and hide that the service may have more than one'
    assert far.recv(1) == b''
    far.close()


def test_a_client_that_leaves_while_a_new_connection_is_watched_leaves_none_behind() -> None:
    with stubs(echo) as (a,):
        one = parse_service(a.service)
        pool = Pool(one, Queue(Statistics()), quiet_log())
        one.turn(TRIAL, 'a probe connected', 1)
        slot, timeout = one.begin(1), QueryTimeout(5)
        asking = gevent.spawn(pool.ask, request(), slot, None, timeout, True)
        gevent.sleep(SETTLE / 2)
        asking.kill()
        timeout.close()
        wait_until(lambda: a.accepted == 1 and a.open == 0)
        assert not a.requests


def test_a_client_that_leaves_while_an_address_is_connected_to_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    trouble: list[BaseException] = [ClientFault(RESET), gevent.Timeout(), OSError('no route')]

    def connect(family: int, where: tuple[str, int]) -> socket.socket:
        tried.append(where[0])
        if trouble and where[0] == '127.0.0.1':
            raise trouble.pop(0)
        return socket.socket(family)

    def addresses(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, 0, 0, '', (host, 1)) for host in ('127.0.0.1', '127.0.0.2')]

    monkeypatch.setattr(hapolicy_gevent, 'connect', connect)
    monkeypatch.setattr(socket, 'getaddrinfo', addresses)
    name = HostName(Address(socket.AF_UNSPEC, 'x', 1), lambda _: None)
    with pytest.raises(ClientFault):
        name.connect()
    with pytest.raises(gevent.Timeout):
        name.connect()
    for _ in range(2):
        name.connect().close()
    assert tried == ['127.0.0.1', '127.0.0.1', '127.0.0.2', '127.0.0.2']

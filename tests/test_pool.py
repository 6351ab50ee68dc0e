"""The pool: what is reused and what is not, who waits for it, and what is kept when nothing is asked."""

from __future__ import annotations

import contextlib
import gc
import re
import select
import socket
import threading
import time
import weakref
from collections import Counter

import gevent
import pytest

import hapolicy_gevent
from hapolicy_gevent import (
    CHECKED,
    DOWN,
    DROPPED,
    LATE,
    REFUSED,
    RESET,
    SINGLE_USE,
    UP,
    Address,
    Client,
    ClientFault,
    Connection,
    Connector,
    Log,
    NotSent,
    Pool,
    Proxy,
    Queue,
    ServiceFailure,
    parse_service,
)
from tests.servers import FewAtATime, Prefork, RefusesBeyond, closes_after, for_sender
from tests.support import (
    SCALE,
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    ProxyProcess,
    answer,
    ask_all,
    attributes,
    echo,
    hang,
    hang_up,
    in_threads,
    is_check,
    new_instance,
    request,
    seconds_of,
    slow,
    stubs,
    wait_in_line,
    wait_until,
)


def pool_of(service: str) -> Pool:
    """Return the pool of a service, without a proxy that keeps it."""
    (pool,) = Queue([parse_service(service)], Log()).pools.values()
    return pool


def test_one_slow_answer_does_not_make_a_connection_rest_for_long() -> None:
    now = time.monotonic()
    pool = pool_of('A=127.0.0.1:1')
    connection, rests = Connection(pool, now), []
    for took in (5, 0.01, 1, 1, 1, 1, 1):
        connection.since, pool.busy = now, {connection: None}
        pool.answered(connection, b'DUNNO', True, now + took, None)
        rests.append(round(connection.quiet, 3))
    assert rests == [0.05, 0.06, 0.12, 0.24, 0.48, 0.96, 1.05], 'it may have waited for a child of the server'


@pytest.mark.parametrize('used', [3, 7])
def test_a_retry_has_a_less_used_connection_which_has_to_be_silent_or_a_new_one(used: int) -> None:
    proxy = Proxy([parse_service('A=unix:/a')], b'', b'', 20, Log())
    (near, far), now = socket.socketpair(), time.monotonic()
    (pool,) = proxy.pools.values()
    ended, much, little = (Connection(pool, now) for _ in range(3))
    ended.used, much.used, little.used, little.silent_at = 7, 7, used, now
    pool.busy[ended] = None
    pool.idle = [little, much]
    with far, contextlib.closing(Client(near)) as client:
        found = proxy._retry(ended, client, now + 20, [pool])
    assert found is (little if used < 7 else ended) and found.silent_at < now - 99


@pytest.mark.parametrize('idle', [0.06, 2])
def test_i2_what_comes_after_a_connection_was_taken_and_before_it_is_used_is_no_answer(idle: float) -> None:
    near, far = gevent.socket.socketpair()
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.connector.connect = lambda: near  # type: ignore[method-assign]
    connection = Connection(pool, now)
    with far:
        connection.open()
        connection.used, connection.silent_at, connection.idle_since = 1, now - idle, now - idle
        pool.busy[connection] = None
        far.sendall(b'action=REJECT a stranger\n\n')
        gevent.sleep(0.01)  # as a request that was handed the connection, and has not run yet
        connection.user = gevent.getcurrent()
        with pytest.raises(NotSent):
            connection.ask(request())


@pytest.mark.parametrize('waits', [2, 0.5])
def test_no_connection_is_kept_idle_while_a_mail_waits_long_on_a_new_one(waits: float) -> None:
    """A server of few workers has not read it, and the idle connection may hold the worker that could."""
    pool, now = pool_of('A=unix:/a'), time.monotonic()
    idle, mail = Connection(pool, now), Connection(pool, now - waits)
    idle.used = 9
    pool.idle.append(idle)
    pool.busy[mail] = None
    pool.prune(now)
    assert pool.idle == ([] if waits > 1 else [idle])


def test_a_retry_is_not_sent_on_a_connection_that_ends_too() -> None:
    """As at a full server, each of whose connections ends a moment after so many answers."""

    def end(sock: socket.socket) -> None:
        time.sleep(0.02)
        sock.close()

    with Prefork(3, closes_after(3, slow(0.1), end)) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 12, 10)) == {'A'}
        assert 'is full' in proxy.log and 'is down' not in proxy.log


@pytest.mark.parametrize('late', [0, 0.1])
def test_a_burst_after_all_connections_have_ended_takes_no_full_server_down(late: float) -> None:
    def end(sock: socket.socket) -> None:
        time.sleep(late)
        sock.close()

    with FewAtATime(5, slow(0.3), end) as a, ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> list[str]:
            with proxy.client() as client:
                return [client.ask_own() for _ in range(3)]

        for clients in (4, 12):
            assert {action for actions in in_threads(clients, work) for action in actions} == {'A'}
            for peer in a.peers:
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.2)
        assert 'is down' not in proxy.log


DRIPS = b'x: y\n\r\r\n' * 20 + b'action=DUNNO\n\r\n'


def test_an_answer_that_drips_is_not_read_again_at_each_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(peer: Peer, message: bytes) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in DRIPS:
            peer.send(bytes([byte]))
            time.sleep(0.0005)

    searched, original = [], hapolicy_gevent.EMPTY_LINE

    def search(data: bytes, start: int = 0) -> re.Match[bytes] | None:
        searched.append(len(data) - start)
        return original(data, start)

    monkeypatch.setattr(hapolicy_gevent, 'EMPTY_LINE', search)
    with stubs(drip) as (a,):
        connection = Connection(pool_of(a.service), time.monotonic())
        connection.user = gevent.getcurrent()
        assert connection.ask(b'request=smtpd_access_policy\n\n') == b'DUNNO'
        connection.close()
    assert sum(searched) < 10 * len(DRIPS), 'bytes'


def test_a_timeout_shorter_than_the_look_for_a_second_answer_is_enough() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service + ':::0.04') as proxy:

        def ask() -> str:
            with proxy.client() as client:
                return client.ask_own()

        wait_until(lambda: [ask() for _ in range(3)] == ['A'] * 3, what='three answers within 40 ms each')


def test_a_timeout_above_the_deadline_leaves_time_for_the_next_service_and_counts() -> None:
    with stubs(echo, echo) as (a, b):
        with ProxyProcess('-s', a.service, '-s', b.service, f'--deadline={2 * SCALE:g}', '--stall=1') as proxy:
            clients = [proxy.client() for _ in range(6)]
            in_threads(6, lambda i: [clients[i].ask_own() for _ in range(10)])
            a.behaviour = hang
            answered = in_threads(6, lambda i: {clients[i].ask_own() for _ in range(200)})
            assert set().union(*answered) <= {'A', 'B'}
            proxy.logged('[A] (' + a.service[2:] + ') is down: ')  # by mail, or by a check that began with it
            assert 'failed: timeout, ' in proxy.log and 'deadline, ' not in proxy.log
            assert f'The timeout of A, 30s, is cut to {SCALE:g}s by --deadline' in proxy.log


def test_who_waits_for_a_full_service_is_served_by_another_that_returns() -> None:
    with stubs(slow(1), echo) as (a, b):
        b.stop()
        services = ['-s', a.service + ':10:1:30:1', '-s', b.service]
        with ProxyProcess(*services, '--deadline=60', '--stall=60') as proxy:
            with proxy.client() as client:
                client.ask_own()
                client.ask_own()
            proxy.logged('is down: its check: refused')
            clients = [proxy.client() for _ in range(8)]
            threading.Timer(0.3, b.start).start()
            answered = in_threads(8, lambda i: clients[i].ask_own())
            assert answered.count('B') >= 2 and 'default' not in answered, answered


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
        assert sorted(held)[4] < 0.5 * SCALE, held


def test_a_hung_service_makes_few_requests_wait() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        clients = [proxy.client() for _ in range(40)]
        held: list[float] = []

        def work(i: int) -> None:
            for _ in range(20):
                started = time.monotonic()
                clients[i].send(request(instance=new_instance()))
                clients[i].sock.settimeout(1.5 * SCALE)
                try:
                    clients[i].read_answer()
                except TimeoutError:
                    return  # one that the hung service has already
                held.append(time.monotonic() - started)

        in_threads(40, work)
        calm = sorted(held)[len(held) * 3 // 4]
        wait_until(lambda: a.open == b.open == 1, what='all but one are closed')
        held.clear()
        a.behaviour = hang
        in_threads(40, work)
        assert len(held) > 400
        # those that came before the first had waited in vain; without that memory it would be half of all, 0.1 s each
        assert sorted(held)[len(held) * 3 // 4] < 0.09 + 2 * calm, sorted(held)[-100:]


def test_idle_connections_are_few_after_a_burst() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(60)]
        for _ in range(3):
            in_threads(60, lambda i: clients[i].ask_own())
        assert a.open > 20
        wait_until(lambda: a.open == 1, what='all but one are closed')


def test_i7_instances_of_any_length_are_not_kept() -> None:
    with stubs(lambda peer, message: peer.send(b'action=DUNNO\n\n')) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask(request(instance='x' * 60000))
            before = proxy.memory
            for i in range(300):
                client.ask(request(instance=f'{i}' + 'x' * 60000))
            assert proxy.memory - before < 8e6


def test_a_fault_of_ours_in_what_is_done_each_second_costs_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []

    def prune(*_: object) -> None:
        times.append(1)
        raise KeyError('of ours')

    monkeypatch.setattr(Pool, 'prune', prune)
    Proxy([parse_service('A=127.0.0.1:1')], b'dunno', b'dunno', 90.0, Log())
    gevent.sleep(2.5)
    assert len(times) >= 2


def test_i7_a_failed_mail_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    def ask(*_: object) -> bytes:
        failure = ServiceFailure(DROPPED, 'it hung up')
        failures.append(weakref.ref(failure))
        raise failure

    monkeypatch.setattr(Connection, 'ask', ask)
    proxy, (near, far) = Proxy([parse_service('A=127.0.0.1:1')], b'dunno', b'dunno', 90.0, Log()), socket.socketpair()
    (pool,) = proxy.pools.values()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.idle = [Connection(pool, time.monotonic())]
    with far, contextlib.closing(Client(near)) as client:
        gc.disable()
        try:
            assert proxy.decide(request(), client, time.monotonic())[2] == 1
            assert [failure() for failure in failures] == [None], 'its request would wait for a collection'
        finally:
            gc.enable()


def test_a_client_that_leaves_while_an_address_is_connected_to_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    trouble: list[BaseException] = [ClientFault(RESET), gevent.Timeout(), OSError('no route')]

    def connect(family: int, where: tuple[str, int], seconds: float) -> socket.socket:
        if family != socket.AF_INET:  # the check of another test's proxy
            raise ConnectionRefusedError
        tried.append(where[0])
        if trouble and where[0] == '127.0.0.1':
            raise trouble.pop(0)
        return socket.socket(family)

    def addresses(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, 0, 0, '', (host, 1)) for host in ('127.0.0.1', '127.0.0.2')]

    monkeypatch.setattr(hapolicy_gevent, 'connect', connect)
    monkeypatch.setattr(socket, 'getaddrinfo', addresses)
    name = Connector(Address(socket.AF_UNSPEC, 'x', 1), 5, lambda _: None)
    with pytest.raises(ClientFault):
        name.connect()
    with pytest.raises(gevent.Timeout):
        name.connect()
    for _ in range(2):
        name.connect().close()
    assert tried == ['127.0.0.1', '127.0.0.1', '127.0.0.2', '127.0.0.2']
    trouble[:] = [gevent.GreenletExit()]
    name.rotate(float('inf'))
    with pytest.raises(gevent.GreenletExit):  # a check that is stopped, as others may wait for a place
        name.connect()
    name.connect().close()
    assert tried[4:] == ['127.0.0.1', '127.0.0.2'], 'the first address may be deaf'


@pytest.mark.parametrize('beside', [False, True])
@pytest.mark.parametrize('behaviour', [hang, hang_up])
def test_the_next_address_of_a_name_is_taken_where_the_first_fails_its_check(
    behaviour: Behaviour, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(family: int, where: tuple[str, int], seconds: float) -> socket.socket:
        sock = gevent.socket.socket(family)
        sock.connect(('127.0.0.1', (sick if where[0] == '127.0.0.2' else well).port))
        return sock

    with stubs(behaviour, echo) as (sick, well):
        services = [parse_service('N=x:1:::2'), parse_service('B=127.0.0.1:1')]
        monkeypatch.setattr(hapolicy_gevent, 'connect', connect)
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: [
            (socket.AF_INET, 0, 0, '', (host, 1)) for host in ('127.0.0.2', '127.0.0.1')
        ])  # fmt: skip
        pool, *_ = Proxy(services[: 1 + beside], b'dunno', b'dunno', 90, Log()).pools.values()
        give_up = time.monotonic() + 20 * SCALE
        while not pool.idle and time.monotonic() < give_up:
            gevent.sleep(0.05)
        assert pool.idle and pool.service.state == 'up' and sick.checks and well.checks


@pytest.mark.parametrize('others', [True, False])
def test_a_request_that_is_sent_again_waits_long_for_a_full_server_only_where_no_other_is_up(others: bool) -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if attributes(message)['sender'] == 'hung up on' and not ended:
            ended.append(peer)
            full.take_place()
            raise HangUp
        for_sender('slow', slow(10), slow(0.1))(peer, message)

    ended: list[Peer] = []
    full = FewAtATime(2, behave)
    with full as a, PolicyServerStub(name='B') as b:
        further = ['-s', b.service + ':20'] if others else []
        with ProxyProcess('-s', a.service, *further) as proxy, proxy.client(60) as held, proxy.client(60) as client:
            while 'is full' not in proxy.log or a.open != 2:
                ask_all(proxy, 8, 1)
            held.send(request(sender='slow', instance=new_instance()))
            wait_until(lambda: b'sender=slow\n' in b''.join(a.requests))
            began = time.monotonic()
            instance = new_instance()
            action = client.ask(request(sender='hung up on', instance=instance))
            waited = time.monotonic() - began
            assert ended and action == f'DUNNO {instance} {"B" if others else "A"}'
            assert (waited < 6) is others


def test_a_request_is_sent_again_on_a_connection_that_is_there_and_less_used() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if attributes(message)['sender'] == 'hung up on':
            delivered.append(peer)
            if len(delivered) == 1:
                raise HangUp
        time.sleep(0.1)
        echo(peer, message)

    delivered: list[Peer] = []
    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        ask_all(proxy, 3, 1)
        client.ask_own()  # one of three is more used than the others
        peers = [*a.peers]
        client.ask(request(sender='hung up on', instance=new_instance()))
        first, second = delivered
        assert first is not second and second in peers


@pytest.mark.parametrize('behaviour', [slow(0.005), closes_after(1, slow(0.005))], ids=['keeps', 'single use'])
def test_a_server_that_refuses_connections_beyond_a_few_is_full_and_not_down(behaviour: Behaviour) -> None:
    with RefusesBeyond(5, behaviour) as a, ProxyProcess('-s', a.service) as proxy:
        # until then the moment in which a busy machine has not yet listened anew may be taken for its death
        wait_until(lambda: ask_all(proxy, 20, 5) and 'is full' in proxy.log)
        before = proxy.log.count('is down')
        got = Counter(ask_all(proxy, 20, 30))
        assert got['A'] > 0.97 * 600, got
        assert proxy.log.count('is down') == before


@pytest.mark.parametrize('full', [0, 2])
def test_a_single_use_service_gets_more_mails_at_once_after_a_round_of_answers_unless_it_is_full(full: int) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use, pool.checker.at_once, pool.checker.full = hapolicy_gevent.SINGLE_USE, 2, full
    pool.checker.running[Connection(pool, now)] = None  # as after each hang-up
    for _ in range(3):
        connection = Connection(pool, now)
        pool.busy[connection] = None
        pool.answered(connection, b'DUNNO', True, now, None)
    assert int(pool.checker.at_once) == (2 if full else 3)


@pytest.mark.parametrize(('busy', 'times'), [(True, 1), (False, 2)])
def test_a_check_that_a_mail_waits_for_is_not_made_again_once_the_service_is_down(
    busy: bool, times: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    asked: list[bool] = []
    check = Connection(pool, now)
    (pool.busy if busy else pool.checker.running)[check] = None

    def hang_up(*_: object) -> bytes:
        if not asked:  # what another check found out meanwhile; that takes the busy ones away, and stops the checks
            monkeypatch.setattr(pool.service, 'state', 'down')
            pool.busy.clear()
        asked.append(True)
        raise ServiceFailure(DROPPED, 'it hung up')

    monkeypatch.setattr(Connection, 'ask', hang_up)
    with pytest.raises(ServiceFailure):
        check.check()
    assert len(asked) == times


def test_a_service_that_seems_to_be_single_use_is_checked_again_after_a_second_and_later_after_30() -> None:
    pool = pool_of('A=127.0.0.1:1')
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    for due in 1, 30:
        now = time.monotonic()
        pool.checker.grow(now, more=True)
        (check,) = pool.checker.running
        pool.service.check_answered(now, now)
        pool.checker.passed(check, hapolicy_gevent.ENDED, now)
        assert pool.use is hapolicy_gevent.SINGLE_USE
        assert [pool.checker.due(now + due * part) for part in (0.9, 1.1)] == [False, True], due


def test_a_client_that_has_ended_waits_behind_all_others() -> None:
    pool, clients, ends = pool_of('A=127.0.0.1:1'), [], []
    for _ in range(3):
        ours, theirs = socket.socketpair()
        clients.append(hapolicy_gevent.Client(ours))
        ends.append(theirs)
    clients[0].join(pool)
    clients[1].join(pool)
    ends[0].close()
    clients[0].unexpected()
    clients[2].join(pool)
    assert pool.waiting == [clients[1], clients[2], clients[0]]
    assert clients[0].waits_for == (pool,)
    clients[0].leave()
    assert pool.waiting == [clients[1], clients[2]]


@pytest.mark.parametrize(('busy', 'before', 'after'), [(1, 2.5, 2.5), (3, 3, 4)])
def test_a_full_single_use_service_gets_more_mails_at_once_where_a_check_passes_beside_all_of_them(
    busy: int, before: float, after: float,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use, pool.checker.full, pool.checker.at_once = SINGLE_USE, 4, before
    pool.busy = {Connection(pool, now): None for _ in range(busy)}
    check = Connection(pool, now)
    pool.checker.running[check] = gevent.Greenlet(lambda: None)
    pool.checker.passed(check, hapolicy_gevent.ENDED, now)
    assert pool.checker.at_once == after and pool.checker.full == 4


def test_a_single_use_service_at_its_max_is_checked_before_mail_takes_the_place() -> None:
    pool = pool_of('A=127.0.0.1:1::::1')
    queue, now = pool.queue, time.monotonic()
    pool.use = hapolicy_gevent.SINGLE_USE
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    wait_in_line(pool)
    pool.checker.began = now  # a check was made
    queue.hand_over(pool, now + 1)
    assert not pool.checker.running and len(pool.busy) == 1
    pool.busy.clear()
    wait_in_line(pool)
    queue.hand_over(pool, now + 31)
    assert len(pool.checker.running) == 1 and not pool.busy


def test_the_only_server_is_up_again_though_the_first_check_of_its_return_meets_a_worker_that_hangs() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if returned.is_set() and not hung.is_set():
            hung.set()
            peer.hang()
        echo(peer, message)

    returned, hung = threading.Event(), threading.Event()
    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::40') as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        a.stop()
        proxy.logged('is down')
        returned.set()
        a.start()
        began = time.monotonic()
        wait_until(lambda: client.ask_own() == 'A', 60, 'a verdict')
        assert hung.is_set() and time.monotonic() - began < 15, 'the check that hangs takes 40 s'


@pytest.mark.parametrize('reason', [hapolicy_gevent.REFUSED, hapolicy_gevent.UNREACHABLE, hapolicy_gevent.DROPPED])
def test_mail_that_is_refused_starts_a_check_and_the_check_decides(reason: str) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use, connection = hapolicy_gevent.SINGLE_USE, Connection(pool, now)
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    pool.busy[connection] = None
    pool.failed(connection, ServiceFailure(reason, ''), now)
    assert pool.service.state == 'up' and len(pool.checker.running) == 1


def test_a_service_is_found_full_where_an_idle_connection_has_a_surplus_answer_to_read() -> None:
    with stubs(echo) as (a,):
        pool, now = pool_of(a.service), time.monotonic()
        idle, waits = Connection(pool, now), Connection(pool, now - 3)
        idle.open()
        pool.idle, idle.used = [idle], 2
        wait_until(lambda: a.peers)
        a.peers[0].send(b'action=SECOND\n\n')
        wait_until(lambda: idle.poll is not None and idle.poll(0))
        pool.checker.running[waits] = gevent.Greenlet()
        pool.service.newest = pool.service.answered_at = now  # what was sent after the check is answered
        pool.checker.watch(now)
        assert pool.use is SINGLE_USE and waits not in pool.checker.running and not pool.idle


def test_a_connection_with_an_answer_to_read_is_served_though_the_server_has_ended_it() -> None:
    with stubs(closes_after(1)) as (a,):
        pool = pool_of(a.service)
        connection = Connection(pool, time.monotonic())
        connection.open()
        connection.used = 1  # it has answered its check
        pool.busy[connection] = None
        connection.send(request())
        wait_until(lambda: a.peers and a.peers[0].closed.is_set())
        assert pool.look() == 1
        wait_until(lambda: connection.look() == 'ended', what='the answer is read, and the end')
        assert pool.look() == 0
        connection.close()


@pytest.mark.parametrize('fault', ['dies', 'answers rubbish'])
def test_a_service_that_is_back_is_asked_at_once_where_the_last_other_one_fails(fault: str) -> None:
    with PolicyServerStub(name='A') as a, PolicyServerStub(name='B') as b:
        with ProxyProcess('-s', a.service, '-s', b.service) as proxy, proxy.client() as client:
            a.stop()
            proxy.logged('[A] (127.0.0.1:%d) is down' % a.port)
            time.sleep(5)  # between the checks after 3 and 7 s, 20 % more or less
            a.start()
            if fault == 'dies':
                b.stop()
            else:
                b.behaviour = answer(b'action=550\n\n')
            assert client.ask_own() == 'A'


def test_what_is_handed_over_is_not_used_where_its_service_goes_down_first() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    client = hapolicy_gevent.Client(socket.socketpair()[0])
    waiting = gevent.spawn(pool.queue.wait, client, None, [], now + 20, now)
    gevent.sleep(0)
    pool.idle.append(Connection(pool, now))
    pool.queue.hand_over(pool, now)
    assert pool.busy
    pool.service.turn(hapolicy_gevent.DOWN, 'it hangs', now)
    assert waiting.get(timeout=10) is None
    client.close()


def test_workers_that_hang_and_hold_every_place_hold_up_nobody() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if peer in peer.server.peers[:2]:
            peer.hang()
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::40:2') as proxy, proxy.client() as client:
        began = time.monotonic()
        assert client.ask_own() == 'A'
        assert time.monotonic() - began < 15, 'a check that hangs takes 40 s'


def test_a_server_whose_connections_are_slow_at_first_is_not_full() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(2 if peer.requests == 1 else 0.05)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:
        for clients in (3, 20):
            ask_all(proxy, clients, 15)
        assert 'is full' not in proxy.log


def test_a_slow_server_is_not_checked_again_and_again() -> None:
    with stubs(slow(1.5)) as (a,), ProxyProcess('-s', a.service + '::::10') as proxy:
        assert set(ask_all(proxy, 12, 1)) == {'A'}
        assert a.checks < 20


@pytest.mark.parametrize('reason', [hapolicy_gevent.REFUSED, hapolicy_gevent.DROPPED])
def test_a_single_use_service_is_not_down_where_none_of_its_connections_is_open_at_that_moment(reason: str) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use = hapolicy_gevent.SINGLE_USE
    check, mail = Connection(pool, now), Connection(pool, now)
    pool.checker.running[check] = gevent.Greenlet(lambda: None)
    pool.busy[mail] = None
    pool.answered(mail, b'DUNNO', True, now + 0.01, None)
    pool.checker.failed(check, ServiceFailure(reason, 'full'), now + 0.02)
    assert pool.service.state == 'up' and pool.checker.full
    for seconds, state in (0.1, 'up'), (2 * hapolicy_gevent.GIVE_UP, 'down'):
        check = Connection(pool, now + seconds)
        pool.checker.running = {check: gevent.Greenlet(lambda: None)}  # and no other is to tell
        pool.checker.failed(check, ServiceFailure(reason, 'full, or gone'), now + seconds)
        assert pool.service.state == state


@pytest.mark.parametrize('reason', [hapolicy_gevent.UNREACHABLE, hapolicy_gevent.REFUSED, hapolicy_gevent.DROPPED])
def test_a_single_use_service_that_is_gone_is_down_though_mail_still_connects(reason: str) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use = hapolicy_gevent.SINGLE_USE
    pool.busy[Connection(pool, now)] = None
    check = Connection(pool, now)
    pool.checker.running[check] = gevent.Greenlet(lambda: None)
    pool.checker.failed(check, ServiceFailure(reason, 'gone'), now + 3)
    assert pool.service.state == 'down' and not pool.checker.full


def test_each_failed_check_doubles_the_backoff_and_failed_mail_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hapolicy_gevent, 'JITTER', 1)
    queue = Queue([parse_service('A=127.0.0.1:1'), parse_service('B=127.0.0.1:1')], Log())
    a, b = queue.balancer.pools
    a.checker.spawn = b.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    start = time.monotonic()
    a.service.turn(DOWN, 'it died', start)
    last, now, pauses = start, start, []

    def next_check(now: float) -> float:
        for tick in range(1000):
            a.checker.grow(now + tick / 10)
            for check in a.checker.running:
                check.since = now + tick / 10
                a.checker.failed(check, ServiceFailure(REFUSED, 'refused'), check.since)
                return check.since
        raise AssertionError('no check')

    for _ in range(7):
        now, last = next_check(last + 0.1), now
        pauses.append(now - last)
        last = now
    assert [round(pause) for pause in pauses] == [1, 2, 4, 8, 16, 30, 30]
    b.service.failed_at = now  # B is the last one that is up, and a mail failed there
    assert next_check(now + 0.1) == pytest.approx(now + 1), 'one a second, whatever a stranger sends'
    b.service.answered_at = now + 2
    assert next_check(now + 2) > now + 10
    a.service.check_answered(now + 60, now + 60)  # on trial, until mail fails there again
    a.checker.reset(now + 60)
    assert next_check(now + 60.1) < now + 60 + 2


def test_a_server_that_hung_for_long_and_is_restarted_is_checked_as_soon_as_one_that_died() -> None:
    queue = Queue([parse_service('A=127.0.0.1:1'), parse_service('B=127.0.0.1:1')], Log())
    a, _ = queue.balancer.pools
    a.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    now = time.monotonic()
    a.service.turn(DOWN, 'its check: timeout', now)
    for seconds, reason in (60, LATE), (0.1, REFUSED):
        a.checker.grow(now + 2)
        (check,) = a.checker.running
        check.since, now = now + 2, now + 2 + seconds
        a.checker.failed(check, ServiceFailure(reason, ''), now)
    a.checker.grow(now + 4)
    assert a.checker.running, 'the restart takes a moment, and the outage was long'


def test_a_stopped_server_beside_another_has_a_check_that_waits_for_it_to_go_on() -> None:
    queue = Queue([parse_service('A=127.0.0.1:1:::2'), parse_service('B=127.0.0.1:1')], Log())
    a, _ = queue.balancer.pools
    a.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    now = time.monotonic()
    a.service.turn(hapolicy_gevent.DOWN, 'its check: timeout', now)
    now += 2
    for _ in range(20):
        a.checker.grow(now)
        (check,) = a.checker.running
        check.since, now = now, now + 2
        a.checker.failed(check, ServiceFailure(hapolicy_gevent.LATE, 'no answer within 2s'), now)


def test_no_mail_waits_for_the_checks_of_a_service_that_hangs() -> None:
    pool = pool_of('A=127.0.0.1:1')
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    balancer, now = pool.queue.balancer, time.monotonic()
    pool.service.turn(hapolicy_gevent.DOWN, 'its check: timeout', now)
    for seconds, waits in (0.2, True), (1.5, True), (3, False), (60, False):
        pool.checker.stop()
        pool.checker.grow(now + seconds)
        assert pool.checker.running
        assert balancer.candidates(None, (), 0, now + seconds + 0.1) == [pool] * waits, 'it may only restart'
        assert balancer.candidates(None, (), 0, now + seconds + 0.6) == []


@pytest.mark.parametrize('ends', ['lets go', 'says no more'])
def test_a_connection_that_is_given_up_is_closed_when_its_message_ends(ends: str) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    near, far = gevent.socket.socketpair()
    with near, far:
        client = hapolicy_gevent.Client(near)
        eldest, other = Connection(pool, now - 1), Connection(pool, now)
        pool.held = {eldest: client, other: client}
        eldest.idle_since, other.idle_since = now, now + 1
        pool.checker.slowest, pool.checker.began, pool.passed = 0.06, now - hapolicy_gevent.GIVE_UP, True
        pool.share(now)
        pool.prune(now)
        assert [*pool.held] == [eldest, other], 'its message may ask more'
        if ends == 'lets go':
            pool.let_go(eldest, client, now)
        else:
            pool.prune(now + hapolicy_gevent.SPARE_IDLE)
        assert (pool.idle, [*pool.held]) == ([], [other])


@pytest.mark.parametrize(
    ('check', 'mail', 'number', 'full', 'pace'),
    [(0.06, 0.005, 2, 0, 1.5), (26.0, 0.005, 2, 0, 1.5), (0.06, 4.0, 2, 0, 1.5), (0.4, 0.4, 2, 0, 4),
     (3.0, 3.0, 2, 1, 0), (0.06, 0.005, 4, 1, 0.75), (0.06, 0.005, 1, 1, 1.5), (1.0, 1.0, 1, 1, 0),
     (0.06, 0.005, 1, 0, 0)],
)  # fmt: skip
def test_connections_are_given_up_the_less_often_the_more_that_costs_the_server(
    check: float, mail: float, number: int, full: int, pace: float,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.slowest, pool.checker.began, pool.checker.full, pool.passed = check, now, full, True
    pool.service.tally.mean = mail
    connections = [Connection(pool, now + i) for i in range(number)]
    pool.busy = dict.fromkeys(connections)
    pace = pace or 100
    turns = [(0.9, 0), (1.1, 1), (1.2, 1), (2.3, min(number, 2) if full else 1)] if pace < 100 else [(1, 0)]
    for turn, count in turns:
        pool.share(now + turn * pace)
        assert [each for each in connections if each.expires <= now + turn * pace] == connections[:count]


def test_the_last_connection_to_a_full_server_is_given_up_only_after_a_check_has_passed() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.slowest, pool.checker.began, pool.checker.full = 0.06, now - 60, 5
    last = Connection(pool, now)
    pool.busy = {last: None}
    pool.share(now)
    assert last.expires > now, 'those who have the others may keep them'
    for use in (hapolicy_gevent.SINGLE_USE, hapolicy_gevent.UNCHECKED, hapolicy_gevent.CHECKED):
        pool.passed, pool.use, pool.checker.began = True, use, now - 60
        pool.share(now)
        assert (last.expires <= now) is (use == hapolicy_gevent.CHECKED)


@pytest.mark.parametrize('full', [0, 1])
def test_a_server_that_does_not_answer_much_mail_nor_a_check_is_stalled_after_a_moment_or_the_patience_of_a_message(
    full: int,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.service.answered_at, pool.service.tally.mean, pool.checker.full = now - 0.1, 0.001, full
    pool.busy = {Connection(pool, now - 0.05): None for _ in range(hapolicy_gevent.CHECK_AFTER)}
    assert not pool.stalled(now), 'no check has asked it'
    pool.checker.grow(now)
    assert len(pool.checker.running) == 1
    assert pool.stalled(now + 0.2) is (not full)
    assert not pool.stalled(now + 0.2, b'key'), 'it may pause, and another one is the wrong greylist'
    assert pool.stalled(now + 1.2, b'key') is (not full), 'the check of a full one may wait for a child'
    pool.service.check_answered(now, now + 0.1)
    assert not pool.stalled(now + 1.2, b'key')


@pytest.mark.parametrize(('closed', 'state'), [(40, UP), (10, DOWN)])
def test_a_check_that_waits_behind_those_that_were_closed_does_not_take_a_full_server_down(
    closed: int, state: str,
) -> None:  # fmt: skip
    """A child of the server works through them, as they are whole requests: 0.1 s each, here."""
    pool, now = pool_of('A=127.0.0.1:1:::2'), time.monotonic()
    pool.service.answered_at, pool.checker.fastest = now, 0.1
    for _ in range(closed):
        check = Connection(pool, now - 1)
        check.poll = select.poll().poll
        pool.checker.running[check] = gevent.Greenlet(lambda: None)
    pool.checker.stop()
    late = Connection(pool, now + 2)
    late.poll = select.poll().poll
    pool.checker.running[late] = gevent.Greenlet(lambda: None)
    pool.checker.failed(late, ServiceFailure(LATE, 'no answer within 2s'), now + 4)
    assert pool.service.state is state, 'a server that hangs is down once it could have answered them'


def test_a_late_check_of_a_full_server_is_one_more_that_the_server_has_to_answer() -> None:
    pool, now = pool_of('A=127.0.0.1:1:::2'), time.monotonic()
    pool.service.answered_at, pool.checker.fastest = now, 1.0
    for since, state in ((-1, UP), (-1, UP), (1.5, UP), (2.5, UP), (5, DOWN)):
        check = Connection(pool, now + since)
        check.poll = select.poll().poll
        pool.checker.running[check] = gevent.Greenlet(lambda: None)
        if since < 0:
            pool.checker.stop()  # two that are closed: 2 s of work
        else:
            pool.checker.failed(check, ServiceFailure(LATE, 'no answer within 2s'), now + since + 2)
        assert pool.service.state is state, since


def test_a_check_that_is_answered_and_not_yet_passed_goes_on_where_a_later_one_passes() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    unanswered, answered, later = (Connection(pool, now - ago) for ago in (3, 3, 0.1))
    answered.used = later.used = 1
    pool.checker.running = {each: gevent.Greenlet(lambda: None) for each in (unanswered, answered, later)}
    pool.checker.passed(later, '', now)
    assert [*pool.checker.running] == [answered], 'it is a connection in a moment'


@pytest.mark.parametrize(('closed', 'late'), [(-9, 7), (-1, 4)])
def test_a_check_that_may_have_waited_for_a_child_makes_no_later_check_late_later(closed: float, late: float) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    for seconds in (2, 3.5):
        pool.service.closed_at = now + closed
        check = Connection(pool, now - seconds)
        pool.checker.running[check] = gevent.Greenlet(lambda: None)
        pool.checker.passed(check, '', now)
    assert pool.checker.slow == pytest.approx(late), 'the fastest one counts, or a slow server is full'


@pytest.mark.parametrize(('waits', 'checks'), [(5.9, 1), (6.1, 2)])
def test_a_full_server_without_connections_gets_another_check_only_after_long(waits: float, checks: int) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.checker.full = 2
    wait_in_line(pool)
    pool.checker.grow(now)
    pool.checker.grow(now + waits)
    assert len(pool.checker.running) == checks, 'its children may be taken by others'


@pytest.mark.parametrize(('check', 'mail', 'state'), [
    ('connects', 'asks', UP), ('connects', 'connects', DOWN), ('connects', '', DOWN), ('asks', 'asks', DOWN),
])  # fmt: skip
def test_a_check_without_a_connection_in_time_while_mail_is_under_way_shows_a_full_backlog(
    check: str, mail: str, state: str,
) -> None:  # fmt: skip
    """As where the server is frozen for a moment; a host that is gone, or a server that hangs, is down."""
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    checks, mails = Connection(pool, now - 5), Connection(pool, now - 5)
    for connection, does in (checks, check), (mails, mail):
        connection.poll = select.poll().poll if does == 'asks' else None
    pool.checker.running[checks] = True
    pool.busy = {mails: None} if mail else {}
    pool.look = lambda: 1  # type: ignore[method-assign]  # these connections have no socket
    pool.reset = lambda: None  # type: ignore[method-assign]
    pool.checker.failed(checks, ServiceFailure(LATE, 'no connection in time'), now)
    assert pool.service.state is state and (pool.checker.full > 0) is (state is UP)


@pytest.mark.parametrize('reason', [DROPPED, REFUSED])
@pytest.mark.parametrize('full', [0, 1])
@pytest.mark.parametrize('use', [CHECKED, SINGLE_USE])
def test_a_check_that_is_hung_up_on_where_mail_was_answered_a_moment_ago_meets_a_limit(
    reason: str, full: int, use: str
) -> None:
    """Other users of a full server may have taken the places of the connections that have ended."""
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    check = Connection(pool, now - 0.1)
    pool.checker.running[check], pool.checker.full, pool.use, pool.service.answered_at = True, full, use, now - 1
    pool.checker.failed(check, ServiceFailure(reason, ''), now)
    limited = (full or use is SINGLE_USE) if reason is DROPPED else (full and use is SINGLE_USE)
    assert pool.service.state is (UP if limited else DOWN)


def test_a_full_service_that_hangs_up_on_its_checks_is_not_checked_without_a_pause() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    check = Connection(pool, now)
    pool.checker.running[check], pool.checker.full, pool.service.answered_at = True, 1, now - 1
    pool.waiting = [None]  # type: ignore[list-item]
    pool.queue.hand_over = lambda pool, now: pool.checker.grow(now)  # type: ignore[method-assign]
    pool.checker.failed(check, ServiceFailure(DROPPED, ''), now + 0.001)
    assert pool.service.state is UP and not pool.checker.running
    pool.checker.grow(now + 0.2)
    assert len(pool.checker.running) == 1


def test_a_connection_rests_soon_after_its_slow_answers_have_become_fast() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    connection = Connection(pool, now)

    def answered(seconds: float) -> float:
        connection.since, pool.busy = now, {connection: None}
        pool.answered(connection, b'DUNNO', True, now + seconds, None)
        return now + seconds

    for _ in range(9):
        now = answered(3)
    connection.silent_at = now  # 20 times 3 s would go by
    now = answered(0.01)
    assert not connection.needs_rest(now)
    while now < connection.silent_at + 1.5:
        now = answered(0.01)
    assert connection.needs_rest(now), 'after a surplus answer each request has its predecessor\'s until then'


def test_checks_that_are_answered_late_but_together_are_not_begun_anew() -> None:
    pool, now = pool_of('A=127.0.0.1:1:::30:5'), time.monotonic()
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    pool.waiting = [None] * 5  # type: ignore[list-item]
    pool.checker.grow(now)
    checks = [*pool.checker.running]
    for check in checks:
        check.used = 1
    pool.checker.grow(now + 1.02)
    assert len(checks) == 5 and [*pool.checker.running] == checks, 'they pass in a moment'


def test_a_rest_leaves_time_for_the_answer() -> None:
    rests = []

    class Resting(Connection):
        __slots__ = ()

        def listen(self, seconds: float) -> str:
            rests.append(seconds)
            return ''

    with stubs(echo) as (a,):
        connection = Resting(pool_of(a.service), time.monotonic())
        connection.user = gevent.getcurrent()
        connection.ask(request())
        connection.since = connection.idle_since = time.monotonic()
        connection.quiet = 60  # its last answer took a minute
        connection.ask(request(), 1)
        connection.close()
    assert rests == [0.5]


def test_a_connection_is_not_given_up_as_soon_as_a_slow_check_has_passed() -> None:
    pool, now = pool_of('A=127.0.0.1:1:::30:1'), time.monotonic()
    only = Connection(pool, now)
    pool.idle, pool.passed, pool.checker.began, pool.service.checked_at = [only], True, now - 2, now
    pool.checker.slowest = 2
    pool.service.tally.mean = 0.01
    pool.share(now + 0.1)
    assert only.expires > now + 0.1, 'its check took all the time after which a connection is given up'
    pool.share(now + 2)
    assert only.expires <= now + 2


@pytest.mark.parametrize(('busy', 'checks'), [(0, 8), (5, 3)])
def test_a_service_on_trial_gets_connections_for_all_that_wait_up_to_its_max(busy: int, checks: int) -> None:
    """Else mail that ends each connection, as a stranger can send it, takes the places of good mail."""
    pool, now = pool_of('A=127.0.0.1:1::::8'), time.monotonic()
    pool.checker.spawn, pool.checker.began = lambda check: None, now  # type: ignore[method-assign]
    pool.service.turn(hapolicy_gevent.TRIAL, 'late', now)
    pool.busy = {Connection(pool, now): None for _ in range(busy)}
    pool.waiting = [None] * 20  # type: ignore[list-item]
    pool.checker.grow(now)
    assert len(pool.checker.running) == checks


def test_a_new_message_waits_for_a_connection_that_no_message_holds_unless_that_takes_long() -> None:
    def slow_checks(peer: Peer, message: bytes) -> None:
        time.sleep(2 if is_check(message) else 0)
        echo(peer, message)

    with stubs(slow_checks) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as one, proxy.client() as two:
            assert one.ask_own() == 'A'
            assert seconds_of(lambda: two.ask_own() == 'A' or pytest.fail('a default')) < 1.5, 'it took the held one'
            wait_until(lambda: a.open == 2, what='the pool grew')


def test_a_full_pool_replaces_what_ended_at_once_and_at_most_doubles() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.queue.hand_over = lambda pool, now: None  # type: ignore[method-assign]
    pool.checker.full, pool.checker.at_once = 5, 1.0
    for _ in range(50):
        wait_in_line(pool)
    pool.busy = {Connection(pool, now): None for _ in range(2)}
    pool.checker.grow(now)
    assert len(pool.checker.running) == 3, 'it has served five'
    for served in (3, 4, 5, 6, 7, 8, 9):
        pool.checker.passed(next(iter(pool.checker.running)), '', now)
        pool.checker.grow(now)
        assert pool.open == served and len(pool.checker.running) <= max(5 - served, served + 1)
    assert pool.checker.full and pool.checker.at_once > 1
    pool.waiting.clear()
    pool.checker.passed(next(iter(pool.checker.running)), '', now)
    assert not pool.checker.full, 'it serves more than five, and nobody waits'


def test_how_many_connections_a_full_server_serves_is_logged_once_unless_it_is_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pool, logged = pool_of('A=127.0.0.1:1'), list[str]()
    monkeypatch.setattr(pool, 'report', logged.append)
    for open_now in (3, 1, 5, 5, 4):
        pool.look = lambda: open_now  # type: ignore[method-assign]  # noqa: B023
        pool.checker.found_full('no answer')
        pool.checker.full = 0
    assert [line.partition(' connections')[0] for line in logged] == ['is full: it serves 3', 'is full: it serves 5']


def test_connections_in_the_backlog_of_a_full_server_are_not_among_those_it_serves() -> None:
    with stubs(echo) as (a,):
        pool = pool_of(a.service)
        for used in (1, 0):
            connection = Connection(pool, time.monotonic())
            connection.open()
            connection.socket.settimeout(0)  # as a socket of gevent
            connection.used = used
            pool.busy[connection] = None
        assert pool.look() == 1
        pool.use = SINGLE_USE
        assert pool.look() == 2, 'each has answered nothing before its one mail'


def test_a_connection_that_answered_nothing_but_its_check_ends_soon_and_is_not_made_anew() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    connection = Connection(pool, now)
    connection.used, pool.idle, pool.checker.began, pool.service.checked_at = 1, [connection], now, now
    pool.prune(now + 3)
    assert not pool.idle, 'another proxy may wait for the only child of the server'
    assert not pool.checker.due(now + 5) and pool.checker.due(now + 31)
    pool.service.answered_at = now + 4
    assert pool.checker.due(now + 5), 'it has mail: the next one need not wait'


def test_mail_does_not_try_a_service_whose_checks_are_hung_up_on_late() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    for seconds, places in (0.1, 5), (3, 0):
        check = Connection(pool, now)
        pool.checker.running[check] = True
        pool.checker.failed(check, ServiceFailure(DROPPED, 'it hung up'), now + seconds)
        assert pool.service.state is DOWN and pool.places == places, 'each mail would wait as long'


def test_a_service_on_trial_is_not_chosen_for_its_idle_connection_while_its_place_is_taken() -> None:
    a, b = Queue([parse_service('A=127.0.0.1:1'), parse_service('B=127.0.0.1:1')], Log()).balancer.pools
    now = time.monotonic()
    b.service.turn(hapolicy_gevent.TRIAL, 'mail failed', now)
    for pool in (a, b):
        pool.idle, pool.service.answered_at = [Connection(pool, now)], now
    b.busy[Connection(b, now)] = None
    assert {b.queue.balancer.choose(b'', (), now) for _ in range(10)} == {a}


@pytest.mark.parametrize(
    ('others', 'check', 'longest'), [(True, 0.3, 0.09), (False, 0.06, 0.13), (False, 0.3, 0.61), (False, 9, 1)]
)
def test_a_message_waits_for_a_new_connection_before_it_takes_one_that_another_message_holds(
    others: bool, check: float, longest: float,
) -> None:  # fmt: skip
    services = [parse_service(f'{name}=127.0.0.1:1') for name in ('A', 'B') if others or name == 'A']
    pool = Queue(services, Log()).pools[services[0]]
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    near, far = socket.socketpair()
    with far, contextlib.closing(Client(near)) as client:
        now = client.asked
        pool.held, pool.checker.slowest = {Connection(pool, now): Client(near)}, check
        pool.checker.running = {Connection(pool, now): None}
        assert pool.take(client, now + longest - 0.02) is None
        assert pool.take(client, now + longest) is not None, 'before it may go to another service'


@pytest.mark.parametrize('full', [0, 1])
def test_another_check_is_made_beside_one_that_waits_long_unless_the_service_is_full(full: int) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.checker.full, pool.checker.at_once = full, 1.0 if full else 100.0
    pool.busy[Connection(pool, now)] = None
    wait_in_line(pool)
    pool.checker.grow(now)
    pool.checker.grow(now + 1.1 * hapolicy_gevent.UNANSWERED)
    assert len(pool.checker.running) == (1 if full else 2)
    if full:
        pool.checker.grow(now + 8)
        assert len(pool.checker.running) == 1
        pool.busy.clear()
        pool.checker.grow(now + 8)
        assert len(pool.checker.running) == 2, 'it serves us no more: the first one may have met a worker that hangs'


def test_a_stalled_service_has_a_second_check_soon_and_no_third() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.service.answered_at = pool.checker.began = now  # a slow mail may be all that it has
    pool.busy[Connection(pool, now)] = None
    for seconds, checks in (4.9, 0), (5.1, 1), (6, 1), (6.3, 2), (9, 2), (11, 2):
        pool.checker.grow(now + seconds)
        assert len(pool.checker.running) == checks, seconds


def test_a_service_that_is_silent_with_a_mail_is_checked_before_its_timeout() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.busy[Connection(pool, now)] = None
    pool.service.answered_at = pool.checker.began = now
    assert not pool.checker.due(now + 4.9) and pool.checker.due(now + 5.1), '--stall is 5 s'


def test_the_last_idle_connection_of_a_full_server_ends_soon() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    connection = Connection(pool, now)
    connection.used = 3
    for full in 0, 1:
        pool.idle, pool.checker.full = [connection], full
        pool.prune(now + 3)
        assert len(pool.idle) == 1 - full, 'another user may wait for the only child'


def test_a_check_that_is_answered_counts_as_served_before_it_has_passed() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    answered = Connection(pool, now)
    answered.used = 1
    pool.checker.running[answered] = None
    pool.checker.found_full('no answer')
    assert (pool.checker.full, pool.checker.at_once) == (0, 1), 'it serves one more than are open'
    pool.checker.running.clear()
    pool.checker.found_full('no answer')
    assert pool.checker.full == 1


@pytest.mark.parametrize(('running', 'full', 'at_once'), [(2, 1, 6), (3, 5, 1)])
def test_a_full_service_that_has_grown_is_found_full_anew_where_several_checks_wait(
    running: int, full: int, at_once: int,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.checker.full, pool.checker.at_once = 1, 6.0
    pool.idle = [Connection(pool, now) for _ in range(5)]
    pool.checker.running = {Connection(pool, now): gevent.Greenlet(lambda: None) for _ in range(running)}
    pool.service.newest = now + 1.1 * hapolicy_gevent.UNANSWERED
    pool.checker.watch(pool.service.newest)
    assert (pool.checker.full, pool.checker.at_once) == (full, at_once), 'others wait behind its checks'


def test_checks_that_nobody_waits_for_any_more_are_closed_but_for_the_first() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    wait_in_line(pool)
    wait_in_line(pool)
    pool.checker.grow(now)
    (first, _) = pool.checker.running
    pool.prune(now + 1.1)
    assert len(pool.checker.running) == 2
    pool.waiting.clear()
    pool.prune(now + 0.9)
    assert len(pool.checker.running) == 2, 'a server may take a second for its first answer'
    pool.prune(now + 1.1)
    assert [*pool.checker.running] == [first], 'they would keep children of the server from mail'


@pytest.mark.parametrize(('waits', 'used', 'kept'), [(0.9, 0, True), (1.1, 0, False), (1.1, 1, True)])
def test_a_connection_without_checks_ends_where_another_mail_may_lie_unread(
    waits: float, used: int, kept: bool,
) -> None:  # fmt: skip
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.use = hapolicy_gevent.UNCHECKED
    unread, served = Connection(pool, now - waits), Connection(pool, now)
    unread.used = used  # it answered before: a child reads it
    pool.busy = {unread: None, served: None}
    pool.answered(served, b'DUNNO', True, now, None)
    assert (pool.idle == [served]) is kept, 'its child may serve the other'


def test_a_service_without_checks_stays_so_where_its_connections_end() -> None:
    pool = pool_of('A=127.0.0.1:1')
    pool.use = hapolicy_gevent.UNCHECKED
    pool.use_once()
    assert pool.use is hapolicy_gevent.UNCHECKED


def test_a_server_that_hangs_up_late_on_its_checks_is_down() -> None:
    def late(peer: Peer, message: bytes) -> None:
        time.sleep(1.3)
        raise HangUp

    with stubs(late) as (a,), ProxyProcess('-s', a.service + ':::2') as proxy:
        proxy.logged('is down: its check')
        assert 'cannot be checked' not in proxy.log


def test_the_last_idle_connection_ends_for_the_check_that_follows() -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    pool.idle.append(Connection(pool, now - 31))
    pool.prune(now)
    assert not pool.idle and pool.checker.due(now), 'it may hold the only worker'


@pytest.mark.parametrize('held', [False, True])
def test_a_connection_that_needs_its_rest_is_left_to_it_while_another_does_not(held: bool) -> None:
    pool, now = pool_of('A=127.0.0.1:1'), time.monotonic()
    near, far = gevent.socket.socketpair()
    with near, far:
        client = hapolicy_gevent.Client(near)
        resting, other = Connection(pool, now), Connection(pool, now)
        other.silent_at = now - 0.3
        pool.idle = [resting] if held else [other, resting]
        pool.held = {other: hapolicy_gevent.Client(far)} if held else {}
        assert pool.take(client, now + 0.01) is other
        assert pool.take(client, now + 0.01) is resting, 'all the same, where there is no other'
        pool.idle, pool.busy = [*pool.busy], {}
        assert pool.take(client, now + 0.06) is resting, 'silent for long enough: the last used'

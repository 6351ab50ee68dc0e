"""Answers: what a server may say and how (I10), what is no answer (I1), and whose it is (I2)."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time

import gevent
import pytest

from hapolicy_gevent import Connection, Ended, Log, Pool, Queue, parse_service
from tests.servers import checked, twice
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
    stubs,
    wait_until,
)


def strangers(proxy: ProxyProcess, clients: int, requests: int, think: float = 0) -> int:
    """Return how many requests had the answer of another; `think`: seconds of a client between two of them."""

    def work(_: int) -> int:
        wrong = 0
        with proxy.client() as client:
            for _ in range(requests):
                instance = new_instance()
                action = client.ask(request(instance=instance))
                wrong += instance not in action and action != 'dunno'
                time.sleep(think)
        return wrong

    return sum(in_threads(clients, work))


@pytest.mark.parametrize('pause', [0, 0.001, 0.01, 0.03])
def test_i2_a_server_that_always_answers_twice_gives_nobody_anothers_verdict(pause: float) -> None:
    with stubs(twice(pause)) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert strangers(proxy, 8, 20) == 0
        proxy.logged('each of its connections is used once')
        assert 'given: default' not in proxy.log


@pytest.mark.parametrize('maximum', ['1', ''])
@pytest.mark.parametrize('pause', [0, 0.1])
def test_i2_a_server_that_answers_twice_now_and_then_is_found_out_at_the_first_time(pause: float, maximum: str) -> None:
    count = iter(range(10**9))
    with stubs(checked(twice(pause, lambda peer: next(count) % 5 == 4))) as (a,):
        with ProxyProcess('-s', a.service + '::::' + maximum) as proxy:
            wrong = strangers(proxy, 8, 10, think=0.7 * pause)
            # what comes after the next request was sent cannot be told from its answer: once on each connection, but
            # where all wait for the only one, for a second, as that is never silent
            assert maximum or wrong <= 8, f'{wrong} of 80'
            proxy.logged('each of its connections is used once', 5)
            assert strangers(proxy, 8, 10) == 0


@pytest.mark.parametrize('seconds', [0, 0.1])
def test_i2_one_surplus_answer_and_then_a_well_server(seconds: float) -> None:
    """Strangers' answers end, also at a server that takes longer for each than a connection has to be silent."""
    once = [1]

    def now(peer: Peer) -> bool:
        return len(peer.server.requests) > 50 and bool(once) and bool(once.pop())

    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(0 if is_check(message) else seconds)
        answer_twice(peer, message)

    answer_twice = twice(0.004, now)
    with stubs(behave) as (a,):
        with ProxyProcess('-s', a.service + '::::10') as proxy:
            wrong: list[float] = []
            end = time.monotonic() + 4 + 40 * seconds

            def work(_: int) -> None:
                with proxy.client() as client:
                    while time.monotonic() < end:
                        instance = new_instance()
                        if instance not in client.ask(request(instance=instance)):
                            wrong.append(time.monotonic())

            in_threads(20, work)
            assert not once, 'it answered twice'
            print(len(wrong), 'strangers')
            # on that one connection alone, for a twentieth of which it is silent
            assert not wrong or wrong[-1] - wrong[0] < (1.5 + 30 * seconds) * SCALE


@pytest.mark.parametrize('killed', [True, False])
def test_i2_new_workers_that_answer_twice_are_found_out(killed: bool) -> None:
    """As where a server is restarted, or new ones of its processes accept beside the old ones."""
    old: list[Peer] = []

    def is_new(peer: Peer) -> bool:
        return bool(old) and peer not in old and (killed or peer.server.peers.index(peer) % 2 == 1)

    with stubs(twice(0.005, is_new)) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert strangers(proxy, 4, 40) == 0
        old += a.peers
        for peer in old if killed else ():
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for clients in (8, 24):
            assert strangers(proxy, clients, 20) == 0
        proxy.logged('each of its connections is used once')


class Greeter(PolicyServerStub):
    """Says something before it is asked."""

    def _serve(self, peer: Peer) -> None:
        time.sleep(0.002)
        peer.send(b'action=OK greeting\n\n')
        super()._serve(peer)


def test_i2_what_a_server_says_before_it_is_asked_is_no_answer() -> None:
    with Greeter() as a, ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        proxy.logged('each of its connections is used once')
        assert [client.ask_own() for _ in range(3)] == ['default'] * 3
        assert not a.requests


@pytest.mark.parametrize('late', [0.02, 0.06, 0.2])
def test_i2_where_every_second_answer_is_late_few_get_it(late: float) -> None:
    with stubs(twice(late)) as (a,), ProxyProcess('-s', a.service) as proxy:
        wrong = strangers(proxy, 6, 20, think=late / 20)
        # of six connections each; once more where the next request left before the answer came that was in its place
        assert wrong <= 9, 'about one for each connection that passed its check'
        proxy.logged('each of its connections is used once')
        assert strangers(proxy, 6, 20) == 0


ODD: dict[str, tuple[bytes, str]] = {
    'one line end too many': (b'action=REJECT no\n\n\n', 'REJECT no'),
    'two line ends too many': (b'action=REJECT no\r\n\r\n\r\n', 'REJECT no'),
    'a second answer': (b'action=REJECT no\n\naction=OK\n\n', 'REJECT no'),
    'Latin-1': (b'action=REJECT caf\xe9\n\n', 'REJECT caf?'),
    'a NUL in its text': (b'action=REJECT a\0b\n\n', 'REJECT a?b'),
    'a NUL at its end': (b'action=REJECT\0\n\n', 'REJECT'),
    'a NUL behind its word': (b'action=REJECT\0no\n\n', 'REJECT no'),
    'a tab behind its word': (b'action=REJECT\tno\n\n', 'REJECT\tno'),
    'an escape': (b'action=REJECT \x1b[31mno\n\n', 'REJECT ?[31mno'),
    'controls around it': (b'action=\0\x1bREJECT no\0\n\n', 'REJECT no'),
    'CRLF and blanks': (b'action= REJECT no \r\n\r\n', 'REJECT no'),
    'rubbish behind it': (b'action=REJECT no\n\nrubbish', 'REJECT no'),
    'other lines': (b'hello\nx=y\naction=REJECT no\naction=OK\n\n', 'REJECT no'),
}


@pytest.mark.parametrize('bytewise', [False, True])
@pytest.mark.parametrize('kind', ODD)
def test_i10_odd_answers_are_passed_on(kind: str, bytewise: bool) -> None:
    data, action = ODD[kind]

    def behave(peer: Peer, message: bytes) -> None:
        if attributes(message)['sender'] != 'odd':
            echo(peer, message)
        elif bytewise:
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in data:
                peer.send(bytes([byte]))
                time.sleep(0.0005)
        else:
            peer.send(data)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for _ in range(3):
            assert client.ask(request(sender='odd', instance=new_instance())) == action
            if kind in ('a second answer', 'rubbish behind it'):
                time.sleep(0.1)  # what comes after the next request was sent cannot be told from its answer
            assert client.ask_own() == 'A'
        assert ') failed: ' not in proxy.log


@pytest.mark.parametrize('late', [0, 0.002, 0.2])
def test_i10_a_server_that_always_sends_an_empty_line_too_many_is_used_as_any(late: float) -> None:
    def behave(peer: Peer, message: bytes) -> None:
        echo(peer, message)
        time.sleep(late)
        peer.send(b'\n')

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert [client.ask_own() for _ in range(20)] == ['A'] * 20
        assert 'used once' not in proxy.log
        assert a.accepted < 5


def pool_of(service: str) -> Pool:
    """Return the pool of a service, without a proxy that keeps it."""
    (pool,) = Queue([parse_service(service)], Log()).pools.values()
    return pool


def test_i2_a_connection_that_speaks_after_the_pool_has_looked_is_not_asked() -> None:
    with stubs(echo) as (a,):
        pool = pool_of(a.service)
        connection = Connection(pool, time.monotonic())
        connection.user = gevent.getcurrent()
        assert connection.ask(request(instance='one')) == b'DUNNO one A'
        pool.busy[connection] = None
        a.peers[0].send(b'action=REJECT stranger\n\n')
        wait_until(lambda: gevent.sleep(0.01) or connection.poll(0))  # type: ignore[func-returns-value, misc]
        gevent.sleep(0.01)
        with pytest.raises(Ended):
            connection.ask(request(instance='two'))


def test_i2_late_second_answers_under_load_are_found_and_end() -> None:
    now = [0]

    def behave(peer: Peer, message: bytes) -> None:
        now[0] += 1
        time.sleep(0.01)
        echo(peer, message)
        if now[0] > 8 and not is_check(message):
            time.sleep(0.2)
            echo(peer, message)
        now[0] -= 1

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:
        wrong, stop = [0], threading.Event()

        def work(_: int) -> None:
            with proxy.client() as client:
                while not stop.is_set():
                    instance = new_instance()
                    wrong[0] += instance not in client.ask(request(instance=instance))
                    time.sleep(0.02)

        def watch() -> None:
            try:
                proxy.logged('each of its connections is used once')
                time.sleep(1)
                before = wrong[0]
                time.sleep(3)
                assert wrong[0] == before
            except AssertionError as error:
                errors.append(error)
            stop.set()

        errors: list[AssertionError] = []
        watching = threading.Thread(target=watch)
        watching.start()
        in_threads(20, work)
        watching.join()
        assert not errors, errors


CLIENTS, REQUESTS = 16, 25


def every_third(fault: Behaviour) -> Behaviour:
    """Misbehave in one of three requests, at random: counted, each mail of a trial could be the third for ever."""

    def behave(peer: Peer, message: bytes) -> None:
        (fault if random.randrange(3) == 0 else echo)(peer, message)

    return behave


def drip(peer: Peer, message: bytes) -> None:
    """Answer one byte at a time, slowly enough to outlast any timeout."""
    for byte in b'action=DUNNO drip drip drip drip drip drip A\n\n':
        peer.send(bytes([byte]))
        time.sleep(0.05)


def half(peer: Peer, message: bytes) -> None:
    peer.send(b'action=DUN')
    raise HangUp


def half_and_hang(peer: Peer, message: bytes) -> None:
    peer.send(b'action=DUNNO half A\n')
    peer.hang()


FAULTS: dict[str, Behaviour] = {
    'hangs up': hang_up,
    'answers half and hangs up': half,
    'drips': drip,
    'hangs': hang,
    'answers half and hangs': half_and_hang,
    'rubbish': answer(b'\x00\xff\xfe garbage \n\n'),
    'an empty line': answer(b'\n'),
    'an empty action': answer(b'action=\n\n'),
    'a bare number': answer(b'action=550\n\n'),
    'a bare number in CRLF and blanks': answer(b'action= 550 \r\n\r\n'),
    'NULs alone': answer(b'action=\0\0\n\n'),
    'too long': answer(b'action=' + b'x' * 70000 + b'\n\n'),
    'endless': answer(b'x' * 300000),
    'another case': answer(b'Action=DUNNO\n\n'),
    'blanks around =': answer(b'action = DUNNO\n\n'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_server_that_fails_its_check_is_down_and_gets_no_mail(fault: str) -> None:
    with stubs(FAULTS[fault], echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy, CLIENTS, REQUESTS)) == {'B'}
        proxy.logged(f'[A] (127.0.0.1:{a.port}) is down: its check: ')
        assert a.requests == [] and a.checks >= 1
        assert proxy.terminate() == 0


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_always_fails_at_mail(fault: str) -> None:
    behaviour = checked(FAULTS[fault])
    with stubs(behaviour, echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy, CLIENTS, REQUESTS)) == {'B'}
        assert 2 <= len(a.requests) < 100
        proxy.logged('is down: mail failed ')
        assert proxy.terminate() == 0


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_fails_now_and_then(fault: str) -> None:
    behaviour = every_third(FAULTS[fault])
    with stubs(behaviour, echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        got = set(ask_all(proxy, 8, 15))
        give_up = time.monotonic() + 30 * SCALE
        while 'A' not in got and time.monotonic() < give_up:  # two failures in a row, and it is down for a second
            got |= set(ask_all(proxy, 8, 5))
        assert got == {'A', 'B'}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('at', ['check', 'mail'])
def test_i1_holds_with_a_failing_server_alone(at: str, fault: str) -> None:
    behaviour = FAULTS[fault] if at == 'check' else checked(FAULTS[fault])
    with stubs(behaviour) as (a,), ProxyProcess('-s', a.service + ':::0.3') as proxy:
        assert set(ask_all(proxy, 8, 3)) == {'default'}
        assert a.requests or at == 'check'


def test_i6_a_server_that_sends_empty_lines_without_end_stalls_nobody() -> None:
    def flood(peer: Peer, message: bytes) -> None:
        echo(peer, message)
        with contextlib.suppress(OSError):
            while True:
                peer.sock.sendall(b'\n' * 65536)
        raise HangUp

    with stubs(echo, flood) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        wait_until(lambda: set(ask_all(proxy, 4, 10)) == {'A', 'B'}, 5)

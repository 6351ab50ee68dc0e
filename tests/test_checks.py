"""The check: what it asks, which connections mail rides on, and what it says of a server."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest

import hapolicy_gevent
from hapolicy_gevent import Connection, Log, Proxy, Queue, parse_service
from tests.servers import End, OneInTen, checked, closes_after, closes_idle
from tests.support import (
    SCALE,
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    ProxyProcess,
    SmtpdLoad,
    answer,
    ask_all,
    attributes,
    echo,
    hang_up,
    in_threads,
    is_check,
    new_instance,
    processes,
    request,
    reset,
    seconds_of,
    slow,
    stubs,
    wait_in_line,
    wait_until,
)


@pytest.mark.parametrize(('when', 'end'), [('accept', reset), ('first bytes', socket.socket.close), ('request', reset)])
def test_a_server_that_ends_one_in_ten_new_connections_stays_up(when: str, end: End) -> None:
    with OneInTen(when, end) as a, ProxyProcess('-s', a.service) as proxy:
        assert ask_all(proxy, 30, 10).count('default') == 0
        time.sleep(2.2)  # the pool shrinks, and grows again
        assert ask_all(proxy, 30, 10).count('default') == 0
        assert 'is down' not in proxy.log


@pytest.mark.parametrize('seconds', [0.002, 1.0])
def test_a_cold_start_costs_one_round_trip_and_the_silence(seconds: float) -> None:
    with stubs(slow(seconds)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients, asked = [proxy.client() for _ in range(100)], list[str]()
        took = seconds_of(lambda: asked.extend(in_threads(100, lambda i: clients[i].ask_own())))
        assert asked == ['A'] * 100
        assert took < 2.5 * seconds + 2.4 * SCALE, took  # the silence of 100, one after another, takes 5 s


@pytest.mark.parametrize('check', [hang_up, answer(b'what?\n\n')])
def test_a_server_that_cannot_be_checked_but_answers_mail_is_used(check: Behaviour) -> None:
    with stubs(checked(echo, check)) as (a,), ProxyProcess('-s', a.service) as proxy:
        proxy.logged('is down: its check: ')
        assert set(ask_all(proxy, 8, 20)) == {'A'}
        proxy.logged('but answers mail: it is used without checks')
        assert set(ask_all(proxy, 8, 20)) == {'A'}


def test_a_server_that_hangs_up_on_every_check_late_goes_down_while_requests_wait() -> None:
    def late(peer: Peer, message: bytes) -> None:
        time.sleep(1.4)
        raise HangUp

    with stubs(late) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask(request(instance=new_instance())) == 'dunno'
        proxy.logged('is down: its check: dropped')


def test_a_server_that_dies_while_it_is_checked_is_not_taken_for_one_that_hangs_up() -> None:
    with processes('A') as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(10)]
        for client in clients:  # so many checks are under way
            client.send(request(instance=new_instance()))
        time.sleep(0.03)
        a.kill()
        proxy.logged('is down')
        for client in clients:
            assert client.read_answer()


def reset_late(sock: socket.socket) -> None:
    time.sleep(0.002)  # or the answer would be lost
    reset(sock)


def close_late(sock: socket.socket) -> None:
    time.sleep(0.1)  # the next request is on its way, and lost
    sock.close()


def without_empty_line(peer: Peer, message: bytes) -> None:
    peer.send(b'other=1\naction=DUNNO %s A\n' % attributes(message)['instance'].encode())
    raise HangUp


KINDS: dict[str, Behaviour] = {
    'after each answer': closes_after(1),
    'after every 7th': closes_after(7),
    'after each answer by a reset': closes_after(1, end=reset_late),
    'after every 7th by a reset': closes_after(7, end=reset),
    'after every 7th, late': closes_after(7, end=close_late),
    'in place of the empty line': without_empty_line,
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_server_that_ends_connections_after_answers_costs_no_default(kind: str) -> None:
    with stubs(KINDS[kind]) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 20, 100)) == {'A'}
        assert 'is down' not in proxy.log and ') failed: ' not in proxy.log


def test_workers_that_hang_up_on_mail_beside_well_ones_cost_a_verdict_for_each_of_their_connections() -> None:
    """As a balancer does of whose servers one has lost its database."""
    number = itertools.count()

    def behave(peer: Peer, message: bytes) -> None:
        if peer.requests == 1:
            numbers[peer] = next(number)
        if numbers[peer] % 2 and attributes(message)['instance']:
            raise HangUp
        echo(peer, message)

    numbers: dict[Peer, int] = {}
    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert ask_all(proxy, 10, 60).count('A') >= 590


@pytest.mark.parametrize(
    ('seconds', 'end'), [(0.01, reset), (0.06, socket.socket.close), (0.06, reset), (1, socket.socket.close)]
)
def test_a_server_that_closes_idle_connections_costs_no_default(seconds: float, end: End) -> None:
    with stubs(closes_idle(seconds, end)) as (a,), ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> set[str]:
            answers = set()
            with proxy.client() as client:
                for i in range(40):
                    if seconds < 0.1 or i % 20 == 0:
                        time.sleep(random.random() * 2.2 * seconds)
                    answers.add(client.ask_own())
            return answers

        assert set().union(*in_threads(10, work)) == {'A'}
        assert 'is down' not in proxy.log


def test_a_check_writes_every_attribute_and_no_mail() -> None:
    got: list[bytes] = []

    def behave(peer: Peer, message: bytes) -> None:
        got.append(message)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service):
        wait_until(lambda: got)
    names = [line.partition(b'=')[0].decode() for line in got[0].split(b'\n') if line]
    assert names[0] == 'request' and len(names) == len(set(names)) == 32
    values = attributes(got[0])
    assert values['protocol_state'] == 'CONNECT' and values['client_address'] == '127.0.0.1'
    assert values['sender'] == values['recipient'] == values['instance'] == ''


def at_its_second_request(peer: Peer, message: bytes) -> None:
    if peer.requests > 1:
        raise HangUp
    echo(peer, message)


def some_time_later(peer: Peer, message: bytes) -> None:
    echo(peer, message)
    time.sleep(0.1)
    raise HangUp


@pytest.mark.parametrize('behaviour', [at_its_second_request, some_time_later])
def test_a_server_that_answers_once_and_ends_the_connection_later_is_found_out(behaviour: Behaviour) -> None:
    with stubs(behaviour) as (a,), ProxyProcess('-s', a.service) as proxy:
        for _ in range(2):
            assert ask_all(proxy, 5, 20) == ['A'] * 100
        assert ') failed: ' not in proxy.log
        assert ' answered after ' not in proxy.log


def test_a_worker_that_hangs_holds_up_no_check_that_is_answered_in_its_quiet_time() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if peer is peer.server.peers[0]:
            peer.hang()
        elif is_check(message):
            time.sleep(0.075)  # so that a tick falls into the 50 ms behind its answer
        echo(peer, message)

    with stubs(*[behave] * 8) as servers, contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(ProxyProcess('-s', each.service + ':::20')) for each in servers]
        began = time.monotonic()
        got = in_threads(8, lambda i: ask_all(proxies[i], 1, 1))
        assert 'default' not in [server for each in got for server in each]
        assert time.monotonic() - began < 8 * SCALE, 'its timeout is 20 s'


def test_a_check_that_a_fault_of_ours_ends_takes_no_service_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(hapolicy_gevent, 'connect', connect)
    path = tmp_path / 'log'
    log = Log(fd=os.open(path, os.O_WRONLY | os.O_CREAT))
    (pool,) = Proxy([parse_service('A=127.0.0.1:1')], b'dunno', b'dunno', 90, log).pools.values()
    told = ' cannot be checked: Too many open files\n'
    wait_until(lambda: gevent.sleep(0.01) or told in path.read_text())  # type: ignore[func-returns-value]
    assert pool.service.state == 'up'
    for _ in range(20):
        wait_in_line(pool)
    gevent.sleep(0.2)
    before = path.read_text().count(told)
    gevent.sleep(1)
    assert path.read_text().count(told) - before <= 11, 'a line for each round, not for each request that waits'


def test_connections_that_have_ended_a_moment_ago_are_not_counted_as_open() -> None:
    with stubs(echo) as (a,):
        (pool,) = Queue([parse_service(a.service)], Log()).pools.values()
        connection = Connection(pool, time.monotonic())
        connection.user = gevent.getcurrent()
        assert connection.ask(request(instance='one')) == b'DUNNO one A'
        pool.idle.append(connection)
        assert pool.look() == 1
        a.stop()
        time.sleep(0.1)  # and the loop has not run
        assert pool.look() == 0 and not pool.idle


class OneHangs(PolicyServerStub):
    """Never reads some of its connections, as where one of several workers hangs."""

    def __init__(self, hangs: Callable[[int], bool], behaviour: Behaviour = echo) -> None:
        self._hangs, self._count = hangs, itertools.count(1)
        super().__init__(behaviour)

    def _serve(self, peer: Peer) -> None:
        if self._hangs(next(self._count)):
            wait_until(lambda: self._listener is None, 120)
        else:
            super()._serve(peer)


def test_a_worker_that_hangs_among_several_takes_the_others_from_nobody() -> None:
    with OneHangs(lambda number: number % 4 == 0, slow(0.02)) as a, ProxyProcess('-s', a.service) as proxy:
        with SmtpdLoad(proxy.port, 12, 0, second_try=False) as load:
            time.sleep(6)
        assert load.held()[-1] < 10 * SCALE, 'its timeout is 30 s'


@pytest.mark.parametrize('number', [1, 2])
def test_a_check_that_meets_a_worker_that_hangs_is_not_the_only_one(number: int) -> None:
    with OneHangs(lambda count: count == number) as a, ProxyProcess('-s', a.service + ':::8') as proxy:
        assert ask_all(proxy, 1, 3) == ['A'] * 3
        assert 'is down' not in proxy.log


def test_a_request_is_sent_again_however_long_the_check_takes() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if peer.requests == 3:
            raise HangUp
        time.sleep(1.3)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::5') as proxy:
        assert ask_all(proxy, 1, 2) == ['A'] * 2


def test_one_in_ten_hang_ups_of_a_single_use_server_cost_no_verdict() -> None:
    with OneInTen('request', reset) as a, ProxyProcess('-s', a.service) as proxy:
        a.behaviour = closes_after(1)
        assert ask_all(proxy, 1, 60) == ['A'] * 60


def test_a_server_without_checks_that_ends_its_connections_costs_no_verdict() -> None:
    def mail(peer: Peer, message: bytes) -> None:
        if peer.requests == 6:
            raise HangUp
        echo(peer, message)

    with stubs(checked(mail, hang_up)) as (a,), ProxyProcess('-s', a.service + '::::5') as proxy:
        proxy.logged('is down: its check: ')
        assert set(ask_all(proxy, 10, 20)) == {'A'}

"""A server that is full: prefork servers, limits of connections, `max`, and who waits for a place."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import Counter

import gevent
import gevent.socket
import pytest

from hapolicy_gevent import RESET, Client, ClientFault, Connection, Log, Queue, parse_service
from tests.servers import End, FewAtATime, Prefork, closes_after, for_sender
from tests.support import (
    SCALE,
    HangUp,
    Peer,
    PostfixClient,
    ProxyProcess,
    SmtpdLoad,
    ask_all,
    echo,
    hang_up,
    in_threads,
    is_check,
    new_instance,
    request,
    reset,
    seconds_of,
    slow,
    stubs,
    wait_until,
)


@pytest.mark.parametrize('takes', [0.005, 0.05, 0.5])
def test_one_prefork_server_with_fewer_children_than_clients_answers_every_request(takes: float) -> None:
    children, clients = 5, 30
    requests = {0.005: 20, 0.05: 8, 0.5: 1}[takes]
    with Prefork(children, slow(takes)) as a, ProxyProcess('-s', a.service) as proxy:
        seconds = seconds_of(lambda: set(ask_all(proxy, clients, requests)) == {'A'} or pytest.fail('a default'))
        needed = takes * clients * requests / children
        print(f'{takes}s a request: {seconds:.2f}s, {needed:.2f}s are needed')
        assert seconds < 1.5 * needed + 10 * SCALE, 'its timeout is 30 s'
        assert proxy.log.count('is full: it serves ') <= 1 and 'is down' not in proxy.log


@pytest.mark.parametrize(('children', 'clients', 'most'), [(5, 10, ''), (1, 3, '::::1'), (1, 1, '::::1')])
def test_the_same_prefork_server_behind_two_proxies_answers_both(children: int, clients: int, most: str) -> None:
    with (
        Prefork(children, slow(0.005)) as a,
        ProxyProcess('-s', a.service + most) as one,
        ProxyProcess('-s', a.service + most) as other,
    ):
        with SmtpdLoad(one.port, clients, 0, second_try=False) as first:
            time.sleep(2)  # it has all children
            with SmtpdLoad(other.port, clients, 0, second_try=False) as second:
                time.sleep(7 * SCALE)
        assert max(first.held()[-1], second.held()[-1]) < 6 * SCALE


def test_two_proxies_share_a_server_although_its_timeout_is_short_and_neither_is_busy() -> None:
    with (
        Prefork(4, slow(0.02)) as a,
        ProxyProcess(f'-s{a.service}:::{3 * SCALE:g}') as one,
        ProxyProcess(f'-s{a.service}:::{3 * SCALE:g}') as other,
    ):

        def ask(number: int) -> set[str]:
            answers = set()
            time.sleep(number % 2 * 3)  # the first four clients have all children by then
            with (one, other)[number % 2].client(60) as client:
                for _ in range(12 - number % 2 * 4):
                    instance = new_instance()
                    for _ in range(5):
                        answers.add(client.ask(request(instance=instance)).split()[0])
                        time.sleep(0.15)
            return answers

        assert set().union(*in_threads(8, ask)) == {'DUNNO'}


def test_requests_of_smtpds_that_were_killed_come_last_and_are_answered_all_the_same() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service + '::::1') as proxy:
        assert ask_all(proxy, 1, 1) == ['A']
        killed = [proxy.client() for _ in range(8)]
        for client in killed:
            client.send(request(instance=new_instance()))
            client.sock.shutdown(socket.SHUT_WR)  # as its death looks to the proxy
        time.sleep(0.3)  # they are in line
        wanted = request(instance=new_instance())
        with proxy.client() as client:
            assert client.ask(wanted).endswith(' A')
        assert a.requests.index(wanted) <= 5, 'the first one, and what was asked until then'
        assert all(client.read_answer().endswith(b' A\n\n') for client in killed), 'perhaps it asks, and waits'


def test_two_proxies_that_share_a_full_server_come_to_have_about_as_many_answers_each() -> None:
    with (
        Prefork(5, slow(0.02)) as a,
        ProxyProcess('-s', a.service) as one,
        ProxyProcess('-s', a.service) as other,
        SmtpdLoad(one.port, 15, 0, second_try=False) as first,
    ):
        time.sleep(2)  # it has all children
        with SmtpdLoad(other.port, 15, 0, second_try=False) as second:
            time.sleep(2 * SCALE)
            before = len(first.held()), len(second.held())
            time.sleep(5 * SCALE)
            mine, its = len(first.held()) - before[0], len(second.held()) - before[1]
    assert mine < 4 * its and its < 4 * mine, (mine, its)


def test_a_slow_server_of_one_child_is_neither_down_nor_slower_for_its_turns() -> None:
    with Prefork(1, slow(0.3)) as a, ProxyProcess('-s', a.service + ':::3') as proxy:
        assert set(ask_all(proxy, 12, 3)) == {'A'}
        assert a.checks < 5 and 'is down' not in proxy.log, 'the checks of a cold start wait in its backlog'


def test_the_checks_of_a_burst_that_were_closed_take_no_full_server_down() -> None:
    def slow_at_first(peer: Peer, message: bytes) -> None:
        time.sleep(0.3 if is_check(message) else 0)
        echo(peer, message)

    with Prefork(1, for_sender('poison', hang_up, slow_at_first)) as a:
        with ProxyProcess('-s', a.service + ':::2') as proxy:
            with SmtpdLoad(proxy.port, 24, 0.05, second_try=False), proxy.client() as client:
                time.sleep(2)
                client.ask(request(sender='poison'))
                wait_until(lambda: a.checks > 15, what='its child works through them')
            assert 'is down' not in proxy.log


def test_a_server_of_one_connection_that_nobody_else_uses_loses_no_verdict_by_giving_it_up() -> None:
    with Prefork(1, slow(0.005)) as a, ProxyProcess('-s', a.service + '::::1') as proxy, proxy.client() as client:
        end, held = time.monotonic() + 6, 0.0
        while time.monotonic() < end:
            held = max(held, seconds_of(lambda: client.ask_own() == 'A' or pytest.fail('a default')))
        assert held < SCALE and 'is down' not in proxy.log
        assert a.accepted > 1, 'it was given up'


def test_a_prefork_server_that_postfix_asks_directly_too_answers_both() -> None:
    with Prefork(5, slow(0.005)) as a, ProxyProcess('-s', a.service) as proxy:
        with (SmtpdLoad(proxy.port, 8, 0.01, second_try=False, request_limit=5) as ours,
              SmtpdLoad(a.port, 4, 0.01, second_try=False, request_limit=5) as direct):  # fmt: skip
            time.sleep(6 * SCALE)
        assert max(ours.held()[-1], direct.held()[-1]) < 6 * SCALE


def test_the_last_idle_connection_to_a_full_server_is_not_kept_from_others() -> None:
    with Prefork(1, slow(0.05)) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 3, 20)) == {'A'}
        proxy.logged('is full')
        with PostfixClient(a.port) as client:
            assert seconds_of(client.ask_own) < 15 * SCALE, 'it would be kept for 30 s'


@pytest.mark.parametrize('end', [socket.socket.close, reset])
def test_a_server_that_ends_connections_beyond_its_limit_is_used_up_to_it(end: End) -> None:
    with FewAtATime(5, slow(0.02), end) as a, ProxyProcess('-s', a.service) as proxy:
        seconds = seconds_of(lambda: set(ask_all(proxy, 20, 15)) == {'A'} or pytest.fail('a default'))
        assert seconds < 2 * 20 * 15 * 0.02 / 5 + 10 * SCALE
        assert 'is down' not in proxy.log
        assert proxy.log.count('is full: it serves 5 connections') <= 1


def test_a_server_with_a_limit_whose_first_answers_take_long_is_not_taken_for_dead() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if peer.requests == 1:
            time.sleep(1.5)  # what began a second later is hung up on before that
        echo(peer, message)

    with FewAtATime(5, behave) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 20, 3)) == {'A'}, 'a default'
        assert 'is down' not in proxy.log
        assert a.accepted < 100, 'it was asked again and again, though it had just hung up'


@pytest.mark.parametrize(('most', 'takes'), [(8, 0.01), (30, 0.05)])
def test_a_server_of_few_children_that_hangs_up_at_one_request_more_loses_no_verdict(most: int, takes: float) -> None:
    def behave(peer: Peer, message: bytes) -> None:
        if peer.requests > most:
            raise HangUp
        time.sleep(takes)
        echo(peer, message)

    with Prefork(4, behave) as a, ProxyProcess('-s', a.service) as proxy:
        with SmtpdLoad(proxy.port, 20, 0.1, second_try=False):
            time.sleep(8)
        assert 'is full' in proxy.log and 'is down' not in proxy.log


def test_a_full_server_has_a_message_that_makes_it_hang_up_twice_at_most() -> None:
    with Prefork(3, for_sender('poison', hang_up, slow(0.005))) as a, ProxyProcess('-s', a.service) as proxy:
        with SmtpdLoad(proxy.port, 10, 0.01, second_try=False), proxy.client() as client:
            wait_until(lambda: 'is full' in proxy.log)
            for _ in range(20):
                assert client.ask(request(sender='poison', instance=new_instance())) == 'dunno'
        assert b''.join(a.requests).count(b'sender=poison\n') <= 40


def test_a_server_without_a_limit_whose_answers_take_long_each_is_not_full() -> None:
    takes = itertools.cycle([0.2, 0.5, 0.9, 1.4, 1.9, 2.3])  # the checks' answers, too

    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(next(takes))
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:
        seconds = seconds_of(lambda: ask_all(proxy, 40, 4))
        assert 'is full' not in proxy.log
        print(f'four answers of 1.2 s, behind a check of as much, took {seconds:.1f} s')


def test_a_server_without_a_limit_whose_new_connections_take_long_is_not_full() -> None:
    """As one that starts a process for each, on a small host; some start at once."""
    number = itertools.count()

    def behave(peer: Peer, message: bytes) -> None:
        if peer.requests > 1:
            time.sleep(0.1)
        elif next(number) % 8 != 1:
            time.sleep(2)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:
        time.sleep(3)  # the first check shows how long that takes
        ask_all(proxy, 30, 30)
        assert 'is full' not in proxy.log


def test_max_holds_for_connections_and_checks_together() -> None:
    with stubs(slow(0.05)) as (a,), ProxyProcess('-s', a.service + '::::3') as proxy:
        seen: Counter[int] = Counter()
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                seen[a.open] += 1
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert set(ask_all(proxy, 20, 10)) == {'A'}
        stop.set()
        watcher.join()
        assert seen[3] > 0.5 * seen.total()
        # the server may see the end of a connection a moment after it has accepted the next
        assert sum(count for number, count in seen.items() if number > 3) < 0.1 * seen.total(), seen


@pytest.mark.parametrize('end', [socket.socket.close, reset])
def test_a_server_that_answers_once_on_each_of_a_few_connections_is_used_up_to_its_limit(end: End) -> None:
    with (
        FewAtATime(5, closes_after(1, slow(0.01)), end) as a,
        ProxyProcess('-s', a.service) as proxy,
    ):
        began = time.monotonic()
        got = Counter(ask_all(proxy, 20, 100))
        assert got['A'] > 0.97 * 2000, got  # all but some at the start
        assert time.monotonic() - began < 2000 * 0.01 * SCALE, 'one at a time'
        proxy.logged('is full')
        assert 'is down' not in proxy.log


def test_a_check_that_is_hung_up_on_while_connections_are_used_once_slows_nobody_for_long() -> None:
    hangs, slowly, stop, hung_up = threading.Event(), threading.Event(), threading.Event(), itertools.count(1)

    def behave(peer: Peer, message: bytes) -> None:
        if is_check(message) and hangs.is_set():
            if next(hung_up) == 60:  # so that some check is hung up on twice
                hangs.clear()
            raise HangUp
        if slowly.is_set() and not is_check(message):
            time.sleep(0.02)  # some connections are open when the check is hung up on
        echo(peer, message)
        if not is_check(message) and len(peer.server.requests) % 20 == 0:
            echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> None:
            with proxy.client() as client:
                while not stop.is_set():
                    client.ask(request(instance=new_instance()))

        def count() -> int:
            before = len(a.requests)
            time.sleep(2)
            return len(a.requests) - before

        def measure() -> None:
            try:
                proxy.logged('each of its connections is used once')
                counted.append(count())
                slowly.set()
                time.sleep(0.5)
                hangs.set()
                proxy.logged('is full')
                slowly.clear()
                time.sleep(1)
                counted.append(count())
            finally:
                stop.set()

        counted: list[int] = []
        measuring = threading.Thread(target=measure)
        measuring.start()
        in_threads(40, work)
        measuring.join()
        assert counted[1] > counted[0] / 5, counted


def test_connections_that_messages_hold_are_given_up_too() -> None:
    with Prefork(2, slow(0.01)) as a, ProxyProcess('-s', a.service) as proxy:
        with SmtpdLoad(proxy.port, 10, 0.1, second_try=False):
            time.sleep(2)
            for _ in range(4):
                with PostfixClient(a.port, 40) as client:
                    assert seconds_of(client.ask_own) < 12 * SCALE


@pytest.mark.parametrize('ending', ['returned', 'died', 'timed out', 'client gone'])
def test_a_freed_place_wakes_a_waiter_whatever_freed_it(ending: str) -> None:
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


def test_a_waiter_that_leaves_does_not_take_a_place_with_it() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service + '::::1') as proxy:
        for _ in range(3):
            clients = [proxy.client() for _ in range(6)]
            for client in clients:
                client.send(request(instance=new_instance()))
            for client in clients[1::2]:
                reset(client.sock)
            for client in clients[::2]:
                assert client.read_answer().startswith(b'action=DUNNO')


def test_a_client_that_leaves_in_the_moment_when_a_place_is_free_gives_it_back() -> None:
    queue = Queue([parse_service('A=127.0.0.1:1')], Log())
    (pool,) = queue.pools.values()
    pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
    near, far = gevent.socket.socketpair()
    now = time.monotonic()
    with near, far:
        waits = gevent.spawn(queue.wait, Client(near), pool, [], now + 60, now)
        gevent.sleep(0.01)
        pool.idle.append(Connection(pool, now))
        waits.kill(ClientFault(RESET), block=False)
        queue.hand_over(pool, now)
        assert len(pool.busy) == 1
        gevent.sleep(0.01)
        assert not pool.busy and not pool.waiting


def test_more_mail_than_a_server_can_answer_in_time_costs_it_none_of_its_answers() -> None:
    """Who has waited for too long must not have a connection for which no time is left."""
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service + '::::2', '--deadline=2') as proxy:
        end = time.monotonic() + 8

        def work(_: int) -> list[str]:
            actions = []
            with proxy.client() as client:
                while time.monotonic() < end:
                    actions.append(client.ask_own())
            return actions

        actions = Counter(action for actions in in_threads(40, work) for action in actions)
        assert actions['A'] > 40, f'{actions}, and 80 are possible'
        assert actions['default'] == proxy.log.count("given: default, deadline") > 40

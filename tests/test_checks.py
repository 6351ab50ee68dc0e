"""The check: which connections mail rides on, and what a server is that lets one wait, ends it or cannot answer it."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import gevent
import pytest

from hapolicy_gevent import Connection, Ended, Log, Queue, StreamSink, parse_service
from tests.servers import (
    ClosesIdle,
    FewAtATime,
    OneInTen,
    Prefork,
    checked,
    closes_after,
    for_sender,
    processes,
    twice,
)
from tests.support import (
    MODULE,
    SCALE,
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    answer,
    attributes,
    echo,
    hang,
    hang_up,
    in_threads,
    is_check,
    new_instance,
    request,
    reset,
    slow,
    stubs,
    wait_until,
)


def ask_all(proxy: ProxyProcess, clients: int, requests: int) -> list[str]:
    """Ask from many clients at once; return who answered."""

    def work(_: int) -> list[str]:
        with proxy.client(120) as client:
            return [client.ask_own() for _ in range(requests)]

    return [server for each in in_threads(clients, work) for server in each]


def timed(work: object) -> float:
    started = time.monotonic()
    work()  # type: ignore[operator]
    return time.monotonic() - started


@pytest.mark.parametrize('takes', [0.005, 0.05, 0.5])
def test_one_prefork_server_with_fewer_children_than_clients_answers_every_request(takes: float) -> None:
    children, clients = 5, 30
    requests = {0.005: 20, 0.05: 8, 0.5: 1}[takes]
    with Prefork(children, slow(takes)) as a, ProxyProcess('-s', a.service) as proxy:
        seconds = timed(lambda: set(ask_all(proxy, clients, requests)) == {'A'} or pytest.fail('a default'))
        needed = takes * clients * requests / children
        print(f'{takes}s a request: {seconds:.2f}s, {needed:.2f}s are needed')
        assert seconds < 1.5 * needed + 10 * SCALE, 'its timeout is 30 s'
        assert proxy.log.count('is full: it serves ') <= 1 and 'is down' not in proxy.log


def test_the_same_prefork_server_behind_two_proxies_answers_both() -> None:
    with Prefork(5, slow(0.005)) as a, ProxyProcess('-s', a.service) as one, ProxyProcess('-s', a.service) as other:
        assert set(ask_all(one, 10, 20)) == {'A'}
        end = time.monotonic() + 4 * SCALE

        def work(i: int) -> int:
            answers = -1  # the last comes after the load
            with (one, other)[i % 2].client() as client:
                while time.monotonic() < end:
                    answers += client.ask_own() == 'A' or pytest.fail('a default')
            return answers

        answers = in_threads(20, work)
        assert min(answers) > 0, answers


def test_a_prefork_server_that_postfix_asks_directly_too_answers_both() -> None:
    with Prefork(5, slow(0.005)) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 10, 20)) == {'A'}
        end = time.monotonic() + 6 * SCALE

        def work(i: int) -> int:
            visits = -1  # the last comes after the load
            while time.monotonic() < end:
                with proxy.client() if i % 3 else PostfixClient(a.port) as client:
                    assert [client.ask_own() for _ in range(5)] == ['A'] * 5
                visits += 1
                time.sleep(0.05)
            return visits

        visits = in_threads(12, work)
        assert min(visits) > 0, visits


def test_the_last_idle_connection_to_a_full_server_is_not_kept_from_others() -> None:
    with Prefork(1, slow(0.05)) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 3, 20)) == {'A'}
        proxy.logged('is full')
        with PostfixClient(a.port) as client:
            assert timed(client.ask_own) < 15


@pytest.mark.parametrize('end', [socket.socket.close, reset])
def test_a_server_that_ends_connections_beyond_its_limit_is_used_up_to_it(end: object) -> None:
    with FewAtATime(5, slow(0.02), end) as a, ProxyProcess('-s', a.service) as proxy:  # type: ignore[arg-type]
        seconds = timed(lambda: set(ask_all(proxy, 20, 15)) == {'A'} or pytest.fail('a default'))
        assert seconds < 2 * 20 * 15 * 0.02 / 5 + 10 * SCALE
        assert 'is down' not in proxy.log
        assert proxy.log.count('is full: it serves 5 connections') <= 1


@pytest.mark.parametrize(('when', 'end'), [('accept', reset), ('first bytes', socket.socket.close), ('request', reset)])
def test_a_server_that_ends_one_in_ten_new_connections_stays_up(when: str, end: object) -> None:
    with OneInTen(when, end) as a, ProxyProcess('-s', a.service) as proxy:  # type: ignore[arg-type]
        assert ask_all(proxy, 30, 10).count('default') == 0
        time.sleep(2.2)  # the pool shrinks, and grows again
        assert ask_all(proxy, 30, 10).count('default') == 0
        assert 'is down' not in proxy.log


@pytest.mark.parametrize('seconds', [0.002, 1.0])
def test_a_cold_start_costs_one_round_trip_and_the_silence(seconds: float) -> None:
    with stubs(slow(seconds)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(100)]
        took = timed(lambda: in_threads(100, lambda i: clients[i].ask_own()) == ['A'] * 100 or pytest.fail('a default'))
        assert took < 2.5 * seconds + 2.4 * SCALE, took  # the silence of 100, one after another, takes 5 s


@pytest.mark.parametrize('check', [hang_up, answer(b'what?\n\n')])
def test_a_server_that_cannot_be_checked_but_answers_mail_is_used(check: Behaviour) -> None:
    with stubs(checked(echo, check)) as (a,), ProxyProcess('-s', a.service) as proxy:
        proxy.logged('is down: its check: ')
        assert set(ask_all(proxy, 8, 20)) == {'A'}
        proxy.logged('but answers mail: it is used without checks')
        assert set(ask_all(proxy, 8, 20)) == {'A'}


def test_a_server_that_hangs_with_mail_holds_few_of_it_beside_another() -> None:
    with stubs(checked(hang), slow(0.005)) as (a, b):
        with ProxyProcess('-s', a.service + ':::1', '-s', b.service) as proxy, proxy.client() as client:
            end, held = time.monotonic() + 4, 0
            while time.monotonic() < end:
                started = time.monotonic()
                assert client.ask_own() == 'B'
                held += time.monotonic() - started > 0.99
            assert 2 <= held <= 2 + 5, held


def test_a_server_that_hangs_with_mail_holds_five_smtpds_where_it_is_alone() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def behave(peer: Peer, message: bytes) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            peer.hang() if broken.is_set() else echo(peer, message)
        finally:
            with lock:
                now[0] -= 1

    broken = threading.Event()
    broken.set()
    with stubs(checked(behave)) as (a,), ProxyProcess('-s', a.service + ':::2') as proxy:
        in_threads(2, lambda i: ask_all(proxy, 1, 1))
        proxy.logged('is on trial')
        most[0] = 0
        end = time.monotonic() + 4.5
        held: list[float] = []

        def work(_: int) -> None:
            with proxy.client() as client:
                while time.monotonic() < end:
                    held.append(timed(lambda: client.ask_own() == 'default' or pytest.fail('a verdict')))
                    time.sleep(0.01)

        in_threads(20, work)
        assert most[0] <= 5 + 5, 'five, while the server has not yet seen the end of the five before'
        assert sum(seconds > 1 for seconds in held) <= 5 * 4
        broken.clear()
        wait_until(lambda: 'is up: mail was answered' in proxy.log or ask_all(proxy, 1, 1) == ['A'])
        assert set(ask_all(proxy, 20, 5)) == {'A'}


def test_a_dead_server_is_seen_when_nothing_is_asked() -> None:
    with processes('A') as (a,), ProxyProcess('-s', a.service) as proxy:
        assert ask_all(proxy, 1, 1) == ['A']
        a.kill()
        proxy.logged('is down', 35)


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


def test_the_only_server_is_used_again_soon_after_its_return_and_each_default_is_at_once() -> None:
    with processes('A') as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        a.kill()
        client.ask_own()
        held, end = [], time.monotonic() + 4
        while time.monotonic() < end:
            held.append(timed(lambda: client.ask_own() == 'default' or pytest.fail('a verdict')))
            time.sleep(0.05)
        assert sorted(held)[len(held) // 2] < 0.25 * SCALE
        a.start()
        back = time.monotonic()
        wait_until(lambda: client.ask_own() == 'A')
        assert time.monotonic() - back < 8 * SCALE


@pytest.mark.parametrize('names', ['A', 'AB'])
def test_a_stopped_server_costs_mail_nothing_once_its_check_has_failed(names: str) -> None:
    with processes(names) as running:
        services = [f'-s{server.service}:::{SCALE:g}' for server in running]
        with ProxyProcess(*services) as proxy, proxy.client() as client:
            assert {client.ask_own() for _ in range(10)} == set(names)
            running[0].pause()
            wait_until(lambda: client.ask_own() and '[A] (' + running[0].service[2:] + ') is down' in proxy.log)
            expected = {'default' if names == 'A' else 'B'}
            held, end = 0, time.monotonic() + 5
            while time.monotonic() < end:
                started = time.monotonic()
                assert client.ask_own() in expected
                held += time.monotonic() - started > 0.99 * SCALE
                time.sleep(0.02)
            assert held == 0, held
            running[0].process.send_signal(signal.SIGCONT)
            back = time.monotonic()
            wait_until(lambda: client.ask_own() == 'A')
            assert time.monotonic() - back < 2 * SCALE


def test_few_requests_are_held_by_a_server_that_hangs_under_load() -> None:
    with processes('AB') as (a, b):
        services = ['-s', a.service, '-s', b.service]
        with ProxyProcess(*services, '--deadline=60') as proxy:
            waiting: set[int] = set()
            stop = time.monotonic() + 4.5

            def work(i: int) -> None:
                with proxy.client() as client:
                    time.sleep(random.random() * 0.3)
                    while time.monotonic() < stop:
                        waiting.add(i)
                        client.ask_own()
                        waiting.discard(i)
                        time.sleep(0.29)

            def hang_a() -> None:
                time.sleep(1)
                a.pause()
                time.sleep(3)
                held.append(len(waiting))
                time.sleep(1)
                a.process.send_signal(signal.SIGCONT)

            held: list[int] = []
            stopper = threading.Thread(target=hang_a)
            stopper.start()
            in_threads(120, work)
            stopper.join()
            assert held[0] < 60, f'{held[0]} of 120'


def test_a_paused_proxy_passes_on_the_answers_that_came_meanwhile() -> None:
    with stubs(slow(0.5)) as (a,), ProxyProcess('-s', a.service + ':::2') as proxy:
        clients = [proxy.client() for _ in range(100)]
        assert in_threads(100, lambda i: clients[i].ask_own()) == ['A'] * 100
        instances = [new_instance() for _ in clients]
        asked = len(a.requests)
        for client, instance in zip(clients, instances, strict=True):
            client.send(request(instance=instance))
        wait_until(lambda: len(a.requests) == asked + 100)
        proxy.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        proxy.process.send_signal(signal.SIGCONT)
        for client, instance in zip(clients, instances, strict=True):
            assert client.read_answer() == f'action=DUNNO {instance} A\n\n'.encode()
        time.sleep(1)
        assert 'is down' not in proxy.log and 'is on trial' not in proxy.log


KINDS: dict[str, Behaviour] = {
    'after each answer': closes_after(1),
    'after every 7th': closes_after(7),
    'after every 7th by a reset': closes_after(7, end=reset),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_server_that_ends_connections_after_answers_costs_no_default(kind: str) -> None:
    with stubs(KINDS[kind]) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 20, 100)) == {'A'}
        assert 'is down' not in proxy.log


@pytest.mark.parametrize(
    ('seconds', 'end'), [(0.01, reset), (0.06, socket.socket.close), (0.06, reset), (1, socket.socket.close)]
)
def test_a_server_that_closes_idle_connections_costs_no_default(seconds: float, end: object) -> None:
    with ClosesIdle(seconds, end) as a, ProxyProcess('-s', a.service) as proxy:  # type: ignore[arg-type]

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


def test_the_recipients_of_a_message_meet_the_connection_that_knows_it() -> None:
    seen: dict[str, set[int]] = {}

    def behave(peer: Peer, message: bytes) -> None:
        seen.setdefault(attributes(message)['instance'], set()).add(id(peer))
        echo(peer, message)

    with stubs(checked(behave)) as (a,), ProxyProcess('-s', a.service) as proxy:

        def session(_: int) -> None:
            with proxy.client() as client:
                for _ in range(10):
                    instance = new_instance()
                    for state in ('RCPT', 'RCPT', 'RCPT', 'DATA'):
                        client.ask(request(instance=instance, protocol_state=state))
                        time.sleep(random.random() * 0.1)

        in_threads(10, session)
    split = sum(len(peers) > 1 for peers in seen.values())
    assert len(seen) == 100 and split < 5, f'{split} of 100 messages met several connections'


def test_a_service_has_its_exact_share_from_the_first_second_of_its_return() -> None:
    with processes('AB') as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        ask_all(proxy, 8, 10)
        a.kill()
        proxy.logged('[A] (' + a.service[2:] + ') is down')
        got: list[tuple[float, str]] = []
        stop = threading.Event()

        def work(_: int) -> None:
            with proxy.client() as client:
                while not stop.is_set():
                    got.append((time.monotonic(), client.ask_own()))
                    time.sleep(0.01)

        loads = threading.Thread(target=in_threads, args=(16, work))
        loads.start()
        time.sleep(0.5)
        a.start()
        proxy.logged('[A] (' + a.service[2:] + ') is up')
        back = time.monotonic()
        time.sleep(1)
        end = time.monotonic()
        stop.set()
        loads.join()
        servers = [server for when, server in got if back + 0.1 < when < end]
        assert 'default' not in {server for _, server in got}
        assert abs(servers.count('A') / len(servers) - 0.5) < 0.02 + 8 / len(servers)


def test_a_proxy_in_front_of_a_proxy_sees_its_servers_end_at_the_right_place() -> None:
    with processes('A') as (a,), ProxyProcess('-s', a.service + ':::1', '--deadline=3', '-d', '451 inner') as inner:
        with ProxyProcess(f'-sI=127.0.0.1:{inner.port}:::10', '-d', '451 outer') as outer, outer.client() as client:
            assert client.ask_own() == 'A'
            a.pause()
            started = time.monotonic()
            assert client.ask(request(instance=new_instance())) == '451 inner'
            assert time.monotonic() - started < 3 + 10 * SCALE
            a.process.send_signal(signal.SIGCONT)
            wait_until(lambda: client.ask(request(instance=new_instance())).startswith('DUNNO'))
            a.kill()
            wait_until(lambda: client.ask(request(instance=new_instance())) == '451 inner')
            inner.logged('is down')
            assert 'is down' not in outer.log
            inner.process.kill()
            wait_until(lambda: client.ask(request(instance=new_instance())) == '451 outer')
            outer.logged('is down')


def test_max_holds_for_connections_and_checks_together() -> None:
    with stubs(slow(0.05)) as (a,), ProxyProcess('-s', a.service + '::::3') as proxy:
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], a.open)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert set(ask_all(proxy, 20, 10)) == {'A'}
        stop.set()
        watcher.join()
        assert most[0] == 3


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


# -- servers that answer twice


def strangers(proxy: ProxyProcess, clients: int, requests: int) -> int:
    """Return how many requests had the answer of another."""

    def work(_: int) -> int:
        wrong = 0
        with proxy.client() as client:
            for _ in range(requests):
                instance = new_instance()
                action = client.ask(request(instance=instance))
                wrong += instance not in action and action != 'dunno'
        return wrong

    return sum(in_threads(clients, work))


@pytest.mark.parametrize('pause', [0, 0.001, 0.01, 0.04])
def test_i2_a_server_that_always_answers_twice_gives_nobody_anothers_verdict(pause: float) -> None:
    with stubs(twice(pause)) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert strangers(proxy, 8, 20) == 0
        proxy.logged('each of its connections is used once')
        assert 'given: default' not in proxy.log


@pytest.mark.parametrize('maximum', ['1', ''])
@pytest.mark.parametrize('pause', [0, 0.01])
def test_i2_a_server_that_answers_twice_now_and_then_is_found_out_at_the_first_time(pause: float, maximum: str) -> None:
    count = iter(range(10**9))
    with stubs(checked(twice(pause, lambda peer: next(count) % 5 == 4))) as (a,):
        with ProxyProcess('-s', a.service + '::::' + maximum) as proxy:
            wrong = strangers(proxy, 8, 10)
            # what comes after the next request was sent cannot be told from its answer: once on each connection
            assert wrong <= (3 if maximum else 8), f'{wrong} of 80'
            proxy.logged('each of its connections is used once')


def test_i2_one_surplus_answer_and_then_a_well_server() -> None:
    once = [1]

    def now(peer: Peer) -> bool:
        return len(peer.server.requests) > 200 and bool(once) and bool(once.pop())

    with stubs(slow(0), slow(0)) as (a, _):
        a.behaviour = twice(0.004, now)
        with ProxyProcess('-s', a.service + '::::10') as proxy:
            wrong: list[float] = []
            end = time.monotonic() + 4

            def work(_: int) -> None:
                with proxy.client() as client:
                    while time.monotonic() < end:
                        instance = new_instance()
                        if instance not in client.ask(request(instance=instance)):
                            wrong.append(time.monotonic())

            in_threads(20, work)
            assert not once, 'it answered twice'
            print(len(wrong), 'strangers')
            assert not wrong or wrong[-1] - wrong[0] < 1.5 * SCALE


TWICE = """
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


@pytest.mark.parametrize('killed', [True, False])
def test_i2_new_workers_that_answer_twice_are_found_out(killed: bool) -> None:
    def start(pause: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, '-c', TWICE, str(listener.fileno()), str(pause)]
        return subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )

    with socket.create_server(('127.0.0.1', 0), backlog=200) as listener, start(0) as old, start(0.005) as new:
        assert old.stdin and new.stdin
        old.stdin.write(b'\n')
        with ProxyProcess('-s', f'A=127.0.0.1:{listener.getsockname()[1]}') as proxy:
            assert strangers(proxy, 4, 40) == 0
            new.stdin.write(b'\n')
            if killed:
                old.kill()
                old.wait()
            for clients in (8, 24):
                assert strangers(proxy, clients, 20) == 0
            proxy.logged('each of its connections is used once')
        new.kill()
        old.kill()


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
        wrong = strangers(proxy, 6, 20)
        assert wrong <= 6, 'at most one for each connection that passed its check'
        proxy.logged('each of its connections is used once')
        assert strangers(proxy, 6, 20) == 0


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
        assert 'failed: ' not in proxy.log.replace('failed: 0', '')
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
            if kind == 'a second answer':
                time.sleep(0.1)  # what comes after the next request was sent cannot be told from its answer
            assert client.ask_own() == 'A'
        assert 'failed: ' not in proxy.log.replace('failed: 0', '')


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


def test_an_empty_line_behind_a_request_is_no_request() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for extra in (b'\n', b'\r\n', b'\n\n\n'):
            client.send(request(instance='one') + extra)
            assert client.read_answer() == b'action=DUNNO one A\n\n'
            time.sleep(0.05)
            assert client.ask_own() == 'A'
        assert not client.buffer and len(a.requests) == 6


def test_thousands_of_waiting_clients_slow_nobody_down() -> None:
    with processes('A') as (a,), PolicyServerStub(slow(0.01), 'B') as b:
        arguments = ['-s', a.service, '-s', b.service + '::::5', '--stall=1', '--deadline=25']
        with ProxyProcess(*arguments) as proxy:
            assert {server for server in ask_all(proxy, 4, 5)} == {'A', 'B'}
            a.pause()
            clients = [proxy.client(60) for _ in range(3000)]
            for client in clients:
                client.send(request(instance=new_instance()))
            before = len(b.requests)
            time.sleep(3)
            assert len(b.requests) - before > 3 / 0.01 * 5 * 0.3 / SCALE
            a.process.send_signal(signal.SIGCONT)
            for client in clients:
                assert client.read_answer()
                client.close()


# -- servers of which a part is ill


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
        end = time.monotonic() + 6

        def work(_: int) -> list[float]:
            waited = []
            with proxy.client() as client:
                while time.monotonic() < end:
                    waited.append(timed(lambda: client.ask_own() == 'A' or pytest.fail('a default')))
            return waited

        waited = in_threads(12, work)
        assert max(seconds for each in waited for seconds in each) < 10 * SCALE, 'its timeout is 30 s'
        assert min(len(each) for each in waited) > max(len(each) for each in waited) / 50


@pytest.mark.parametrize('number', [1, 2])
def test_a_check_that_meets_a_worker_that_hangs_is_not_the_only_one(number: int) -> None:
    with OneHangs(lambda count: count == number) as a, ProxyProcess('-s', a.service + ':::8') as proxy:
        assert ask_all(proxy, 1, 3) == ['A'] * 3
        assert 'is down' not in proxy.log


@pytest.mark.parametrize('end', [socket.socket.close, reset])
def test_a_server_that_answers_once_on_each_of_a_few_connections_is_used_up_to_its_limit(end: object) -> None:
    with (
        FewAtATime(5, closes_after(1, slow(0.01)), end) as a,  # type: ignore[arg-type]
        ProxyProcess('-s', a.service) as proxy,
    ):
        began = time.monotonic()
        got = Counter(ask_all(proxy, 20, 100))
        assert got['A'] > 0.97 * 2000, got  # all but some at the start
        assert time.monotonic() - began < 2000 * 0.01 * SCALE, 'one at a time'
        proxy.logged('is full')
        assert 'is down' not in proxy.log


def test_i9_mail_that_is_hung_up_on_slows_no_other_where_each_connection_is_used_once() -> None:
    evil = for_sender('evil', hang_up, closes_after(1, slow(0.2)))
    with stubs(evil) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert ask_all(proxy, 40, 1) == ['A'] * 40
        stop = threading.Event()

        def disturb() -> None:
            with proxy.client() as stranger:
                while not stop.wait(0.1):
                    stranger.ask(request(sender='evil', instance=new_instance()))

        stranger = threading.Thread(target=disturb)
        stranger.start()
        began = time.monotonic()
        assert ask_all(proxy, 40, 10) == ['A'] * 400
        stop.set()
        stranger.join()
        assert time.monotonic() - began < 3 * 2.0 * SCALE, 'ten times 0.2 s is what 40 places need'


def test_i9_mail_that_is_answered_twice_costs_the_mail_at_a_server_with_a_limit_no_verdict() -> None:
    evil = for_sender('evil', twice(0), slow(0.005))
    with FewAtATime(5, evil) as a, ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 20, 5)) == {'A'}
        with proxy.client() as stranger:
            stranger.ask(request(sender='evil', instance=new_instance()))
        assert set(ask_all(proxy, 20, 5)) == {'A'}
        proxy.logged('each of its connections is used once')


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


def test_a_short_restart_of_the_only_server_costs_few_verdicts() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        a.stop()
        time.sleep(0.2)
        a.start()
        started = time.monotonic()
        wait_until(lambda: client.ask_own() == 'A')
        assert time.monotonic() - started < 3 * SCALE


def test_i2_a_connection_that_speaks_after_the_pool_has_looked_is_not_asked() -> None:
    with stubs(echo) as (a,):
        log = Log(StreamSink(os.open(os.devnull, os.O_WRONLY)))
        (pool,) = Queue([parse_service(a.service)], log).pools.values()
        connection = Connection(pool, time.monotonic())
        assert connection.ask(request(instance='one'), time.monotonic()) == b'DUNNO one A'
        pool.busy[connection] = None
        a.peers[0].send(b'action=REJECT stranger\n\n')
        wait_until(lambda: gevent.sleep(0.01) or connection.poll(0))  # type: ignore[func-returns-value, misc]
        gevent.sleep(0.01)
        with pytest.raises(Ended):
            connection.ask(request(instance='two'), time.monotonic())


def test_by_spawn_a_server_that_hangs_costs_few_mails_its_timeout() -> None:
    with stubs(hang, echo) as (a, b):
        command: list[str] = [sys.executable, str(MODULE), '-s', a.service + ':::0.5', '-s', b.service]
        near, far = socket.socketpair()
        silent = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=far.fileno(), stdout=far.fileno(), stderr=silent) as process:
            far.close()
            near.settimeout(60)
            held, end = 0, time.monotonic() + 5
            while time.monotonic() < end:
                started = time.monotonic()
                near.sendall(request(instance=new_instance()))
                assert near.recv(1000).endswith(b' B\n\n')
                held += time.monotonic() - started > 0.45
                time.sleep(0.02)
            near.close()
            assert process.wait(60) == 0
        assert 2 <= held <= 5, held


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


def test_connections_that_messages_hold_are_given_up_too() -> None:
    with Prefork(2, slow(0.01)) as a, ProxyProcess('-s', a.service) as proxy:
        stop = threading.Event()

        def work(_: int) -> None:
            with proxy.client() as client:
                while not stop.is_set():
                    client.ask_own()
                    time.sleep(0.1)

        def direct() -> float:
            time.sleep(2)
            try:
                longest = 0.0
                for _ in range(4):
                    with PostfixClient(a.port, 40) as client:
                        longest = max(longest, timed(client.ask_own))
                return longest
            finally:
                stop.set()

        waited = in_threads(11, lambda i: work(i) if i else direct())[0]
        assert waited is not None and waited < 12, waited


def test_a_restart_of_the_only_server_that_was_seen_costs_little_more_than_it_takes() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        a.stop()
        wait_until(lambda: client.ask_own() == 'default' and 'is down' in proxy.log)
        a.start()
        assert timed(lambda: wait_until(lambda: client.ask_own() == 'A')) < 0.6 * SCALE

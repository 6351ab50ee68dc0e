"""A server that hangs or is slow: what it holds and for how long, stalls, timeouts and the deadline."""

from __future__ import annotations

import threading
import time

import pytest

from hapolicy_gevent import Log, Proxy, Sticky, parse_service
from tests.servers import checked, for_sender
from tests.support import (
    SCALE,
    Peer,
    PolicyServerStub,
    ProxyProcess,
    SmtpdLoad,
    ask_all,
    echo,
    free_port,
    hang,
    in_threads,
    is_check,
    new_instance,
    processes,
    request,
    seconds_of,
    slow,
    stubs,
    wait_until,
)


def test_a_server_that_hangs_with_mail_holds_few_of_it_beside_another() -> None:
    with stubs(checked(hang), slow(0.005)) as (a, b):
        with ProxyProcess('-s', a.service + ':::1', '-s', b.service) as proxy, proxy.client() as client:
            end, held = time.monotonic() + 4, 0
            while time.monotonic() < end:
                started = time.monotonic()
                assert client.ask_own() == 'B'
                held += time.monotonic() - started > 0.99
            assert 2 <= held <= 2 + 5, held


def test_servers_that_hang_with_mail_are_down_also_where_they_leave_a_mail_no_time_for_the_well_one() -> None:
    gone = checked(hang)
    with stubs(gone, gone, echo) as services:
        options = [f'-s{each.service}:::{0.4 * SCALE:g}' for each in services]
        pools = Proxy([parse_service(each[2:]) for each in options], b'', b'', 1, Log()).pools.values()
        order = {name: ''.join(pool.service.name for pool in Sticky.order(name.encode(), pools))
                 for name in map(str, range(50))}  # fmt: skip
        well, unlucky = (next(name for name in order if order[name][i] == 'C') for i in (0, 2))
        options += [f'--deadline={0.8 * SCALE:g}', '--sticky=sender']
        ended = threading.Event()

        def ask(number: int) -> int:
            lost = 0
            with proxy.client() as client:
                if number:
                    for _ in range(12):
                        lost += client.ask(request(sender=unlucky, instance=new_instance())) == 'dunno'
                    ended.set()
                while not ended.wait(0.02):
                    lost += client.ask(request(sender=well, instance=new_instance())) == 'dunno'
            return lost

        with ProxyProcess(*options) as proxy:
            others, lost = in_threads(2, ask)
        assert not others and lost <= 5, 'the first ones, and those that try the two'


def test_a_server_that_hangs_with_mail_holds_five_smtpds_where_it_is_alone() -> None:
    asked, now, most, lock = [0], [0], [0], threading.Lock()

    def behave(peer: Peer, message: bytes) -> None:
        with lock:
            asked[0] += 1
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
        asked[0] = most[0] = 0
        end = time.monotonic() + 4.5

        def work(_: int) -> None:
            with proxy.client() as client:
                while time.monotonic() < end:
                    assert client.ask_own() == 'default'
                    time.sleep(0.01)

        in_threads(20, work)
        assert most[0] <= 5 + 5, 'five, while the server has not yet seen the end of the five before'
        assert asked[0] <= 5 * 4, 'each is held for 2 s'
        broken.clear()
        wait_until(lambda: 'is up: mail was answered' in proxy.log or ask_all(proxy, 1, 1) == ['A'])
        assert set(ask_all(proxy, 20, 5)) == {'A'}


@pytest.mark.parametrize('names', ['A', 'AB'])
def test_a_stopped_server_costs_mail_nothing_once_its_check_has_failed(names: str) -> None:
    with processes(names) as running:
        services = [f'-s{server.service}:::{SCALE:g}' for server in running]
        with ProxyProcess(*services) as proxy, proxy.client() as client:
            assert {client.ask_own() for _ in range(10)} == set(names)
            running[0].hang()
            wait_until(lambda: client.ask_own() and '[A] (' + running[0].service[2:] + ') is down' in proxy.log)
            expected = {'default' if names == 'A' else 'B'}
            held, end = 0, time.monotonic() + 5
            while time.monotonic() < end:
                started = time.monotonic()
                assert client.ask_own() in expected
                held += time.monotonic() - started > 0.99 * SCALE
                time.sleep(0.02)
            assert held == 0, held
            running[0].wake()
            back = time.monotonic()
            wait_until(lambda: client.ask_own() == 'A')
            assert time.monotonic() - back < 2 * SCALE


@pytest.mark.parametrize('prio', ['', '20'])
def test_a_server_that_hangs_under_load_holds_few_requests_and_none_for_longer_than_its_timeout(prio: str) -> None:
    with processes('AB') as (a, b), ProxyProcess('-s', a.service + ':::2', '-s', b.service + f':{prio}::2') as proxy:
        with SmtpdLoad(proxy.port, 120, 0.3, second_try=False) as load:
            a.hang()
            stopped = time.monotonic()
            proxy.logged('[A] (' + a.service[2:] + ') is down', 40)
            time.sleep(1)
            a.wake()
            proxy.logged('[A] (' + a.service[2:] + ') is up', 40)
        assert load.held(stopped)[-1] < 2 + 10 * SCALE
        held = sum(seconds > 1.9 for seconds in load.held(stopped))
        assert held < 40, f'{held} of 120 clients, which sent 800 requests meanwhile'


def test_slow_messages_in_flight_send_no_other_mail_to_another_service() -> None:
    with processes('B') as (b,), stubs(for_sender('tarpit', slow(4), slow(0.001))) as (a,):
        with ProxyProcess('-s', a.service, '-s', b.service + ':20') as proxy, proxy.client() as client:
            assert client.ask_own() == 'A'
            tarpits = [proxy.client() for _ in range(15)]
            for tarpit in tarpits:
                tarpit.send(request(sender='tarpit', instance=new_instance()))
            wait_until(lambda: len(a.requests) > 15, what='the slow ones are in flight')
            checks, end = a.checks, time.monotonic() + 3
            while time.monotonic() < end:
                assert client.ask_own() == 'A'
                time.sleep(0.1)
            assert a.checks - checks < 5


def test_a_paused_proxy_passes_on_the_answers_that_came_meanwhile() -> None:
    with stubs(slow(0.5)) as (a,), ProxyProcess('-s', a.service + ':::2') as proxy:
        clients = [proxy.client() for _ in range(100)]
        assert in_threads(100, lambda i: clients[i].ask_own()) == ['A'] * 100
        instances = [new_instance() for _ in clients]
        asked = len(a.requests)
        for client, instance in zip(clients, instances, strict=True):
            client.send(request(instance=instance))
        wait_until(lambda: len(a.requests) == asked + 100)
        proxy.hang()
        time.sleep(3)
        proxy.wake()
        for client, instance in zip(clients, instances, strict=True):
            assert client.read_answer() == f'action=DUNNO {instance} A\n\n'.encode()
        time.sleep(1)
        assert 'is down' not in proxy.log and 'is on trial' not in proxy.log


def test_a_stall_is_seen_before_the_timeout() -> None:
    with processes('AB') as (a, b):
        with ProxyProcess('-s', a.service, '-s', b.service, '--stall=0.5') as proxy, proxy.client() as first:
            while first.ask_own() != 'A':
                pass
            a.hang()
            held = [proxy.client() for _ in range(2)]
            for client in held:
                client.send(request(instance=new_instance()))
            time.sleep(1)
            with proxy.client() as client:
                assert [client.ask_own() for _ in range(50)] == ['B'] * 50
            proxy.logged('is stalled')
            a.wake()
            for client in held:
                assert client.read_answer().startswith(b'action=DUNNO')
            proxy.logged('no longer stalled')
            with proxy.client() as client:
                assert {client.ask_own() for _ in range(20)} == {'A', 'B'}
            assert 'is down' not in proxy.log


def test_a_stalled_server_gets_nothing_while_another_is_busy() -> None:
    with processes('AB', '--delay=0.2') as (a, b):
        with ProxyProcess('-s', a.service + ':::90', '-s', b.service + ':::90', '--stall=2') as proxy:
            assert set(ask_all(proxy, 12, 4)) == {'A', 'B'}
            a.hang()
            early = [proxy.client() for _ in range(6)]
            for client in early:
                client.send(request(instance=new_instance()))
            proxy.logged('is stalled')
            answered: list[str] = []
            assert seconds_of(lambda: answered.extend(ask_all(proxy, 40, 4))) < 10 * SCALE, 'its timeout is 45 s'
            assert set(answered) == {'B'}


def test_i2_a_late_answer_reaches_nobody() -> None:
    late = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        if not is_check(message) and not late.is_set():
            late.set()
            time.sleep(0.8 * SCALE)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', f'{a.service}:::{0.4 * SCALE:g}') as proxy, proxy.client() as client:
        assert client.ask_own() == 'default'
        for _ in range(20):
            assert client.ask_own() == 'A'
            time.sleep(0.05)


def test_each_query_has_the_whole_timeout() -> None:
    # a timer that goes on with what the last query left of it would end the third of these
    with stubs(slow(0.4 * SCALE)) as (a,), ProxyProcess('-s', f'{a.service}:::{SCALE:g}') as proxy:
        with proxy.client() as client:
            assert [client.ask_own() for _ in range(4)] == ['A'] * 4


def test_the_deadline_is_over_all_services_and_the_default_comes_before_it_passes() -> None:
    with stubs(*[checked(hang)] * 3) as servers:
        services = [f'-s{server.service}:::1' for server in servers]
        with ProxyProcess(*services, '--deadline=1.5') as proxy, proxy.client() as client:
            started = time.monotonic()
            assert client.ask(request()) == 'dunno'
            assert 1.4 < time.monotonic() - started < 1.5 + 10 * SCALE
            proxy.logged('given: default, deadline')


def test_a_stopped_server_is_found_within_the_deadline_although_its_timeout_is_longer() -> None:
    with processes('A') as (a,), ProxyProcess('-s', a.service, '--deadline=1') as proxy, proxy.client() as client:
        proxy.logged('The timeout of A, 30s, is cut to 1s by --deadline')
        assert client.ask_own() == 'A'
        a.hang()
        assert client.ask_own() == 'default'
        proxy.logged('is down: its check: timeout', 10)
        assert seconds_of(client.ask_own) < 0.9
        a.wake()
        wait_until(lambda: client.ask_own() == 'A')


def test_waiting_for_a_place_ends_at_the_deadline() -> None:
    with stubs(hang) as (a,), ProxyProcess('-s', a.service + ':::60:1', '--deadline=1') as proxy:
        started = time.monotonic()
        assert ask_all(proxy, 5, 1) == ['default'] * 5
        assert time.monotonic() - started < 1 + 10 * SCALE


def test_time_spent_waiting_for_a_place_is_taken_from_the_deadline() -> None:
    with stubs(slow(0.9)) as (a,), ProxyProcess('-s', a.service + ':::5:1', '--deadline=1.5') as proxy:
        assert ask_all(proxy, 3, 1).count('default') >= 2, 'the second waits 0.9 s and needs as long'


@pytest.mark.slow
def test_mail_that_stood_in_line_for_long_waits_half_a_second_for_a_check_of_a_service_that_is_down() -> None:
    hangs, port = threading.Event(), free_port()

    def behave(peer: Peer, message: bytes) -> None:
        (hang if hangs.is_set() else echo)(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', f'{a.service}:10::3:2', f'-sB=127.0.0.1:{port}:20::12') as proxy:
        with proxy.client() as client:
            end = time.monotonic() + 8  # the checks of B become rare
            while time.monotonic() < end:
                assert client.ask_own() == 'A'
                time.sleep(0.2)
        hangs.set()

        def ask(_: int) -> float:
            with proxy.client() as client:
                return seconds_of(lambda: client.ask(request(instance=new_instance())))

        held: list[float] = []
        asking = threading.Thread(target=lambda: held.extend(in_threads(6, ask)))
        asking.start()
        time.sleep(2.3)
        with PolicyServerStub(hang, 'B', port):  # it listens now, and answers nothing yet
            asking.join()
        assert max(held) < 3 + 5 * SCALE, 'the checks of B take 12 s'

"""I9: what one message does to a server costs that message alone."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from tests.servers import FewAtATime, checked, closes_after, for_sender, twice
from tests.support import (
    SCALE,
    Behaviour,
    HangUp,
    Peer,
    ProxyProcess,
    SmtpdLoad,
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
    reset,
    slow,
    stubs,
)


def half(peer: Peer, message: bytes) -> None:
    peer.send(b'action=DUN')
    raise HangUp


POISON: dict[str, Behaviour] = {
    'hangs up': hang_up,
    'resets': lambda peer, message: reset(peer.sock),
    'answers rubbish': answer(b'Traceback (most recent call last):\n\n'),
    'answers half and ends': half,
}


SETS = {'one': ('',), 'two': ('', ''), 'three of two prios': (':10', ':10', ':20')}


@pytest.mark.parametrize('services', SETS)
@pytest.mark.parametrize('poison', POISON)
def test_i9_mail_that_makes_a_server_fail_costs_no_other_mail_its_verdict(poison: str, services: str) -> None:
    fields = SETS[services]
    with stubs(*[for_sender('poison', POISON[poison]) for _ in fields]) as running:
        arguments = [f'-s{server.service}{field}' for server, field in zip(running, fields, strict=True)]
        with (ProxyProcess(*arguments) as proxy, proxy.client() as stranger,
              SmtpdLoad(proxy.port, 3, 0.1, second_try=False) as good):  # fmt: skip
            for _ in range(5):
                asked = [len(server.requests) for server in running]
                instance = new_instance()
                assert stranger.ask(request(sender='poison', instance=instance)) == 'dunno'
                for server, before in zip(running, asked, strict=True):
                    times = sum(instance.encode() in message for message in server.requests[before:])
                    assert times <= 2, f'delivered {times} times to {server.name}'
                time.sleep(0.2)
        assert good.held()[-1] < 10 * SCALE, 'its timeout is 30 s'


@pytest.mark.parametrize(('field', 'option'), [(':20', '--stall=5'), ('', '--sticky=recipient')])
def test_i9_mail_that_every_server_hangs_up_on_sends_no_other_mail_to_another_server(field: str, option: str) -> None:
    behave = for_sender('poison', hang_up, slow(0.02))
    with stubs(behave, behave) as (a, b), ProxyProcess('-s', a.service, '-s', b.service + field, option) as proxy:
        good, bad = [proxy.client() for _ in range(6)], [proxy.client() for _ in range(3)]

        def server_of(i: int) -> str:
            return good[i].ask(request(instance=new_instance(), recipient=f'{i}@b.example')).split()[-1]

        own = [server_of(i) for i in range(6)]
        for _ in range(8):  # bursts, so that two of them fail with no answer between them
            in_threads(3, lambda i: bad[i].ask(request(sender='poison', instance=new_instance(), recipient=f'{i}@b')))
            assert in_threads(6, server_of) == own
        assert 'is down' not in proxy.log


def test_i9_mail_that_every_server_hangs_up_on_keeps_no_service_on_trial() -> None:
    database_is_gone, end = threading.Event(), threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        gone = peer.server.name == 'A' and database_is_gone.is_set()
        if not is_check(message) and (gone or attributes(message)['sender'] == 'poison'):
            raise HangUp
        time.sleep(0.3)
        echo(peer, message)

    with stubs(behave, behave) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:

        def send(i: int) -> None:
            with proxy.client(60) as client:
                while not end.is_set():
                    client.ask(request(sender='poison' if i < 4 else 'good', instance=new_instance()))
                    time.sleep(0.2)

        database_is_gone.set()
        senders = threading.Thread(target=in_threads, args=(10, send))
        senders.start()
        try:
            proxy.logged('[A] (127.0.0.1:%d) is on trial' % a.port)
            time.sleep(1)
            database_is_gone.clear()
            proxy.logged('[A] (127.0.0.1:%d) is up: mail was answered' % a.port, 5)
        finally:
            end.set()
            senders.join()


@pytest.mark.parametrize(('messages', 'maximum'), [(200, ''), (50, '5')])
def test_i9_messages_that_no_server_answers_in_time_cost_good_mail_its_wait_alone(messages: int, maximum: str) -> None:
    behaviour = for_sender('tarpit', hang)
    with stubs(behaviour, behaviour) as (a, b):
        services = [f'-s{server.service}:::{0.5 * SCALE:g}:{maximum}' for server in (a, b)]
        with ProxyProcess(*services, '--deadline=90') as proxy:

            def tarpit(_: int) -> str:
                with proxy.client(120) as client:
                    return client.ask(request(sender='tarpit', instance=new_instance()))

            with SmtpdLoad(proxy.port, 5, 0.05, second_try=False) as good:
                assert set(in_threads(messages, tarpit)) == {'dunno'}
                time.sleep(0.5)
            print(f'{messages} messages, max {maximum or 100}: good mail waited {good.held()[-1]:.1f}s at most')


def test_i9_messages_that_no_server_answers_in_time_take_no_backup_down() -> None:
    tarpits, seconds = for_sender('tarpit', hang), f'{0.5 * SCALE:g}'
    with stubs(tarpits, tarpits) as (a, b):
        with (ProxyProcess(f'-s{a.service}:10::{seconds}', f'-s{b.service}:20::{seconds}') as proxy,
              SmtpdLoad(proxy.port, 3, 0.1, second_try=False) as good):  # fmt: skip

            def ask(_: int) -> None:
                with proxy.client() as client:
                    for _ in range(3):
                        assert client.ask(request(sender='tarpit', instance=new_instance())) == 'dunno'

            in_threads(4, ask)
            a.stop()
            time.sleep(1)
        assert f'[B] ({b.service[2:]}) is' not in proxy.log, proxy.log
        assert set(good.servers()) == {'A', 'B'}


@pytest.mark.parametrize('position', ['oldest', 'middle', 'youngest'])
def test_i9_slow_messages_teach_nothing_of_how_many_connections_are_served(position: str) -> None:
    with stubs(for_sender('slow', slow(3), slow(0.2))) as (a,), ProxyProcess('-s', a.service + ':::1') as proxy:
        clients = [proxy.client() for _ in range(40)]

        def burst() -> float:
            started = time.monotonic()
            assert in_threads(40, lambda i: clients[i].ask_own()) == ['A'] * 40
            return time.monotonic() - started

        burst()
        before = burst()
        if position == 'oldest':
            time.sleep(2.5)  # one idle connection is left
        elif position == 'middle':
            in_threads(10, lambda i: clients[i].ask_own())
        slow_ones = [proxy.client() for _ in range(3)]
        answers = in_threads(3, lambda i: slow_ones[i].ask(request(sender='slow', instance=new_instance())))
        assert answers == ['dunno'] * 3
        burst()
        assert burst() < 2 * before + 3 * SCALE
        assert 'is full' not in proxy.log


def test_i9_a_slow_message_alone_stops_no_other() -> None:
    with stubs(for_sender('slow', slow(20))) as (a,), ProxyProcess('-s', a.service + ':::3', '--stall=1') as proxy:
        with proxy.client() as stranger, SmtpdLoad(proxy.port, 2, 0.1, second_try=False) as good:
            assert stranger.ask(request(sender='slow', instance=new_instance())) == 'dunno'
        assert good.held()[len(good.held()) // 2] < 0.5 * SCALE
        assert 'is down' not in proxy.log and 'is on trial' not in proxy.log


def test_i9_a_message_that_fails_everywhere_gets_the_action_of_failed_and_others_the_default() -> None:
    with stubs(for_sender('poison', hang_up)) as (a,):
        with ProxyProcess('-s', a.service, '--failed=451 4.7.1 try again later') as proxy, proxy.client() as client:
            assert client.ask_own() == 'A'
            assert client.ask(request(sender='poison', instance=new_instance())) == '451 4.7.1 try again later'
            a.stop()
            proxy.logged('is down')
            assert client.ask(request(instance=new_instance())) == 'dunno'


def test_mail_that_a_server_fails_at_while_its_check_passes_takes_it_down_beside_another() -> None:
    with stubs(checked(hang_up), echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        with proxy.client() as client:
            assert {client.ask_own() for _ in range(10)} == {'B'}
            proxy.logged('[A] (' + a.service[2:] + ') is down: mail failed 2 times in a row')
            proxy.logged('[A] (' + a.service[2:] + ') is on trial')
            a.behaviour = echo
            assert {client.ask_own() for _ in range(10)} == {'A', 'B'}
            proxy.logged('[A] (' + a.service[2:] + ') is up: mail was answered')


def test_i9_mail_that_is_hung_up_on_and_then_hangs_costs_no_other_its_answer() -> None:
    seen: Counter[str] = Counter()

    def behave(peer: Peer, message: bytes) -> None:
        if attributes(message)['sender'] == 'evil':
            seen[attributes(message)['instance']] += 1
            if seen[attributes(message)['instance']] == 1:
                raise HangUp
            peer.hang()
        time.sleep(0.05)
        echo(peer, message)
        raise HangUp  # so each connection is used once, and a request that is sent again waits in line

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::1') as proxy:
        with SmtpdLoad(proxy.port, 8, 0, second_try=False), proxy.client() as stranger:
            for _ in range(3):
                assert stranger.ask(request(sender='evil', instance=new_instance())) == 'dunno'


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
            proxy.logged('each of its connections is used once')
        assert set(ask_all(proxy, 20, 5)) == {'A'}

"""I9: what one message does to a server costs that message alone."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from tests.servers import checked, for_sender
from tests.support import (
    SCALE,
    Behaviour,
    HangUp,
    Peer,
    PostfixClient,
    ProxyProcess,
    answer,
    attributes,
    echo,
    hang,
    hang_up,
    in_threads,
    new_instance,
    request,
    reset,
    slow,
    stubs,
    wait_until,
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


class GoodMail:
    """Good mail, a message each time, from some clients; how long each request waited, and what it got."""

    def __init__(self, proxy: ProxyProcess, clients: int, pause: float) -> None:
        self.waited: list[float] = []
        self.servers: list[str] = []
        self._pause, self._stop = pause, threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(proxy.client(120),), daemon=True) for _ in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: PostfixClient) -> None:
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                self.servers.append(client.ask_own())
                self.waited.append(time.monotonic() - started)
                time.sleep(self._pause)
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> GoodMail:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120 * SCALE)
            assert not thread.is_alive(), 'good mail still waits'
        assert kind is not None or not self._errors, self._errors[0]


@pytest.mark.parametrize('services', SETS)
@pytest.mark.parametrize('poison', POISON)
def test_i9_mail_that_makes_a_server_fail_costs_no_other_mail_its_verdict(poison: str, services: str) -> None:
    fields = SETS[services]
    with stubs(*[for_sender('poison', POISON[poison]) for _ in fields]) as running:
        arguments = [f'-s{server.service}{field}' for server, field in zip(running, fields, strict=True)]
        with ProxyProcess(*arguments) as proxy, proxy.client() as stranger, GoodMail(proxy, 3, 0.1) as good:
            for _ in range(5):
                asked = [len(server.requests) for server in running]
                instance = new_instance()
                assert stranger.ask(request(sender='poison', instance=instance)) == 'dunno'
                for server, before in zip(running, asked, strict=True):
                    times = sum(instance.encode() in message for message in server.requests[before:])
                    assert times <= 2, f'delivered {times} times to {server.name}'
                time.sleep(0.2)
            wait_until(lambda: len(good.servers) > 10)
        assert 'default' not in good.servers
        assert max(good.waited) < 10 * SCALE, 'its timeout is 30 s'


def test_a_poisonous_message_is_delivered_once_where_no_connection_had_ended() -> None:
    # the connection that it rides on has just been checked: what ends it is the message
    with stubs(for_sender('poison', hang_up)) as (a,), ProxyProcess('-s', a.service) as proxy:
        time.sleep(0.5)
        with proxy.client() as client:
            client.ask(request(sender='poison', instance=new_instance()))
        assert len(a.requests) <= 2


@pytest.mark.parametrize(('messages', 'maximum'), [(200, ''), (50, '5')])
def test_i9_messages_that_no_server_answers_in_time_cost_good_mail_its_wait_alone(messages: int, maximum: str) -> None:
    behaviour = for_sender('tarpit', hang)
    with stubs(behaviour, behaviour) as (a, b):
        services = [f'-s{server.service}:::0.5:{maximum}' for server in (a, b)]
        with ProxyProcess(*services, '--deadline=90') as proxy:

            def tarpit(_: int) -> str:
                with proxy.client(120) as client:
                    return client.ask(request(sender='tarpit', instance=new_instance()))

            with GoodMail(proxy, 5, 0.05) as good:
                time.sleep(0.5)
                assert set(in_threads(messages, tarpit)) == {'dunno'}
                time.sleep(0.5)
            print(f'{messages} messages, max {maximum or 100}: good mail waited {max(good.waited):.1f}s at most')
            assert 'default' not in good.servers, f'{good.servers.count("default")} of {len(good.servers)}'


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
        with proxy.client() as stranger, GoodMail(proxy, 2, 0.1) as good:
            assert stranger.ask(request(sender='slow', instance=new_instance())) == 'dunno'
        assert set(good.servers) == {'A'} and sorted(good.waited)[len(good.waited) // 2] < 0.5 * SCALE
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
        with GoodMail(proxy, 8, 0) as good, proxy.client() as stranger:
            wait_until(lambda: len(good.servers) > 20)
            for _ in range(3):
                assert stranger.ask(request(sender='evil', instance=new_instance())) == 'dunno'
        assert set(good.servers) == {'A'}
        assert 'Internal error' not in proxy.log

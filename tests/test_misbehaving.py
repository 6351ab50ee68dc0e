"""Servers that misbehave beside a good one: I1, one answer for each request, and I2, its own."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import pytest

from tests.support import (
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    answer,
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

CLIENTS, REQUESTS = 16, 25


def every_third(fault: Behaviour) -> Behaviour:
    """Misbehave in one of three requests."""
    count = itertools.count(1)

    def behave(peer: Peer, message: bytes) -> None:
        (fault if next(count) % 3 == 0 else echo)(peer, message)

    return behave


def twice(pause: float) -> Behaviour:
    """Answer, and answer again after a pause."""

    def behave(peer: Peer, message: bytes) -> None:
        echo(peer, message)
        if pause:
            time.sleep(pause)
        echo(peer, message)

    return behave


def twice_at_once(peer: Peer, message: bytes) -> None:
    one = b'action=DUNNO twice A\n\n'
    peer.send(one + one)


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


def close_after_answer(peer: Peer, message: bytes) -> None:
    echo(peer, message)
    raise HangUp


def reset_after_answer(peer: Peer, message: bytes) -> None:
    echo(peer, message)
    time.sleep(0.002)
    reset(peer.sock)
    raise HangUp


def crlf(peer: Peer, message: bytes) -> None:
    instance = message.split(b'instance=')[1].split(b'\n')[0]
    peer.send(b'action= DUNNO %s %s \r\n\r\n' % (instance, peer.server.name.encode()))


def without_empty_line(peer: Peer, message: bytes) -> None:
    instance = message.split(b'instance=')[1].split(b'\n')[0]
    peer.send(b'other=1\naction=DUNNO %s %s\n' % (instance, peer.server.name.encode()))
    raise HangUp


FAULTS: dict[str, Behaviour] = {
    'hangs up': hang_up,
    'answers half and hangs up': half,
    'drips': drip,
    'hangs': hang,
    'answers half and hangs': half_and_hang,
    'answers twice at once': twice_at_once,
    'rubbish': answer(b'\x00\xff\xfe garbage \n\n'),
    'an empty line': answer(b'\n'),
    'an empty action': answer(b'action=\n\n'),
    'a bare number': answer(b'action=550\n\n'),
    'a bare number in CRLF and blanks': answer(b'action= 550 \r\n\r\n'),
    'NULs': answer(b'action=DUNNO\0\n\n'),
    'not UTF-8': answer(b'action=REJECT caf\xe9\n\n'),
    'too long': answer(b'action=' + b'x' * 70000 + b'\n\n'),
    'endless': answer(b'x' * 300000),
    'another case': answer(b'Action=DUNNO\n\n'),
    'blanks around =': answer(b'action = DUNNO\n\n'),
}
FINE: dict[str, Behaviour] = {
    'slow': slow(0.05),
    'closes after each answer': close_after_answer,
    'resets after each answer': reset_after_answer,
    'CRLF and blanks': crlf,
    'closes instead of an empty line': without_empty_line,
    'other lines first': lambda peer, message: peer.send(
        b'foo=bar\nhello\naction=DUNNO ' + message.split(b'instance=')[1].split(b'\n')[0] + b' A\naction=REJECT\n\n'
    ),
}


def ask_all(proxy: ProxyProcess, clients: int = CLIENTS, requests: int = REQUESTS) -> list[str]:
    """Ask from many clients at once, each answer checked to be one, and its own; return who answered."""

    def work(_: int) -> list[str]:
        with proxy.client() as client:
            return [client.ask_own() for _ in range(requests)]

    return [server for each in in_threads(clients, work) for server in each]


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_always_fails(fault: str) -> None:
    with stubs(FAULTS[fault], echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy)) == {'B'}
        proxy.logged('[A]')
        assert proxy.terminate() == 0


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_fails_now_and_then(fault: str) -> None:
    behaviour = every_third(FAULTS[fault])
    with stubs(behaviour, echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy, 8, 15)) <= {'A', 'B'}


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_holds_with_the_failing_server_alone(fault: str) -> None:
    with stubs(FAULTS[fault]) as (a,), ProxyProcess('-s', a.service + ':::0.3', '-d', 'dunno') as proxy:
        assert set(ask_all(proxy, 8, 3)) == {'default'}


@pytest.mark.parametrize('kind', FINE)
def test_servers_that_are_odd_and_right_are_heard(kind: str) -> None:
    with stubs(FINE[kind]) as (a,), ProxyProcess('-s', a.service) as proxy:
        assert set(ask_all(proxy, 8, 15)) == {'A'}
        assert 'failed: ' not in proxy.log.replace('failed: 0', '')


@pytest.mark.parametrize('pause', [0, 0.001, 0.01, 0.03])
def test_i2_an_answer_sent_twice_never_reaches_another_request(pause: float) -> None:
    with stubs(twice(pause), echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        assert set(ask_all(proxy)) <= {'A', 'B'}
        assert set(ask_all(proxy)) <= {'A', 'B'}


def test_a_refusing_server_costs_nothing() -> None:
    with stubs(echo, echo) as (a, b):
        a.stop()
        with ProxyProcess('-s', a.service, '-s', b.service) as proxy:
            assert set(ask_all(proxy)) == {'B'}
            proxy.logged('[A]')
            proxy.logged('is down: refused')


def test_i2_a_late_answer_reaches_nobody() -> None:
    late = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        if not late.is_set():
            late.set()
            time.sleep(0.8)
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::0.4') as proxy, proxy.client() as client:
        assert client.ask_own() == 'default'
        for _ in range(20):
            assert client.ask_own() == 'A'
            time.sleep(0.05)


def test_each_query_has_the_whole_timeout() -> None:
    # a timer that goes on with what the last query left of it would end the third of these
    with stubs(slow(0.4)) as (a,), ProxyProcess('-s', a.service + ':::1') as proxy, proxy.client() as client:
        assert [client.ask_own() for _ in range(6)] == ['A'] * 6


def test_a_flapping_server_loses_nothing() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        stop = threading.Event()

        def flap() -> None:
            while not stop.is_set():
                a.stop()
                time.sleep(0.1)
                a.start()
                time.sleep(0.3)

        thread = threading.Thread(target=flap)
        thread.start()
        try:
            answered = ask_all(proxy, 8, 300)
        finally:
            stop.set()
            thread.join()
        assert set(answered) <= {'A', 'B'}


def test_the_bytes_of_a_request_reach_the_server_as_they_came() -> None:
    odd = (
        b'protocol_state=RCPT\nno equals sign here\nrequest=smtpd_access_policy\nsender=\x1b\x01\xff=a=b\n'
        b'sender=second\nunknown_attribute=x\ninstance=i1\n' + b'long=' + b'y' * 60000 + b'\n\n'
    )
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask(odd) == 'DUNNO i1 A'
        assert a.requests == [odd]


def test_pipelined_requests_are_answered_in_order() -> None:
    with stubs(slow(0.02), slow(0)) as (a, b):
        with ProxyProcess('-s', a.service, '-s', b.service) as proxy, proxy.client() as client:
            instances = [new_instance() for _ in range(200)]
            client.send(b''.join(request(instance=instance) for instance in instances))
            for instance in instances:
                assert client.read_answer().split()[1].decode() == instance


def test_a_half_closed_client_gets_its_answers() -> None:
    with stubs(slow(0.2)) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.send(request(instance='one') + request(instance='two'))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read_answer() == b'action=DUNNO one A\n\n'
        assert client.read_answer() == b'action=DUNNO two A\n\n'
        assert client.at_end()


@pytest.mark.parametrize('leave', [PostfixClient.close, lambda client: reset(client.sock)])
def test_a_client_that_vanishes_leaves_no_connection_behind_that_is_used_again(leave: object) -> None:
    with stubs(slow(0.3)) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask_own()
        time.sleep(0.2)
        assert a.open == 1
        gone = proxy.client()
        gone.send(request(instance=new_instance()))
        wait_until(lambda: len(a.requests) == 2)
        leave(gone)  # type: ignore[operator]
        wait_until(lambda: a.open == 0)
        with proxy.client() as client:
            assert client.ask_own() == 'A'


def test_unix_sockets_on_both_sides(tmp_path: object) -> None:
    with PolicyServerStub(path=f'{tmp_path}/a%server') as a:
        with ProxyProcess('-s', a.service, f'--listen=unix:{tmp_path}/proxy', '--socket-mode=600') as proxy:
            with PostfixClient(f'{tmp_path}/proxy') as client:
                assert client.ask_own() == 'A'
            with proxy.client() as client:
                assert client.ask_own() == 'A'

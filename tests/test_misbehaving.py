"""Servers that misbehave beside a good one: I1, one answer for each request, and I2, its own."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time

import pytest

from tests.servers import checked, twice
from tests.support import (
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

CLIENTS, REQUESTS = 16, 25


def every_third(fault: Behaviour) -> Behaviour:
    """Misbehave in one of three requests."""
    count = itertools.count(1)

    def behave(peer: Peer, message: bytes) -> None:
        (fault if next(count) % 3 == 0 else echo)(peer, message)

    return behave


def twice_at_once(peer: Peer, message: bytes) -> None:
    one = b'action=DUNNO %s A\n\n' % attributes(message)['instance'].encode()
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


def without_empty_line(peer: Peer, message: bytes) -> None:
    own(b'other=1\naction=DUNNO %s A\n')(peer, message)
    raise HangUp


def own(form: bytes) -> Behaviour:
    """Answer with the request's own instance in these bytes."""
    return lambda peer, message: peer.send(form % attributes(message)['instance'].encode())


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
FINE: dict[str, Behaviour] = {
    'slow': slow(0.05),
    'closes after each answer': close_after_answer,
    'resets after each answer': reset_after_answer,
    'CRLF and blanks': own(b'action= DUNNO %s A \r\n\r\n'),
    'an empty line too many': own(b'action=DUNNO %s A\n\n\n'),
    'a NUL behind the word': own(b'action=DUNNO\0%s A\n\n'),
    'controls around the action': own(b'action=\0\x1bDUNNO %s A\0\n\n'),
    'answers twice at once': twice_at_once,
    'closes instead of an empty line': without_empty_line,
    'other lines first': own(b'foo=bar\nhello\naction=DUNNO %s A\naction=REJECT\n\n'),
}


def ask_all(proxy: ProxyProcess, clients: int = CLIENTS, requests: int = REQUESTS) -> list[str]:
    """Ask from many clients at once, each answer checked to be one, and its own; return who answered."""

    def work(_: int) -> list[str]:
        with proxy.client() as client:
            return [client.ask_own() for _ in range(requests)]

    return [server for each in in_threads(clients, work) for server in each]


@pytest.mark.parametrize('fault', FAULTS)
def test_a_server_that_fails_its_check_is_down_and_gets_no_mail(fault: str) -> None:
    with stubs(FAULTS[fault], echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy)) == {'B'}
        proxy.logged(f'[A] (127.0.0.1:{a.port}) is down: its check: ')
        assert a.requests == [] and a.checks >= 1
        assert proxy.terminate() == 0


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_always_fails_at_mail(fault: str) -> None:
    behaviour = checked(FAULTS[fault])
    with stubs(behaviour, echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        assert set(ask_all(proxy)) == {'B'}
        assert 2 <= len(a.requests) < 100
        proxy.logged('is down: mail failed ')
        assert proxy.terminate() == 0


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_and_i2_hold_beside_a_server_that_fails_now_and_then(fault: str) -> None:
    behaviour = every_third(FAULTS[fault])
    with stubs(behaviour, echo) as (a, b), ProxyProcess('-s', a.service + ':::0.5', '-s', b.service) as proxy:
        got = set(ask_all(proxy, 8, 15))
        while 'A' not in got:  # two failures in a row, and it is down for a second
            got |= set(ask_all(proxy, 8, 5))
        assert got == {'A', 'B'}


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_holds_with_the_failing_server_alone(fault: str) -> None:
    with stubs(FAULTS[fault]) as (a,), ProxyProcess('-s', a.service + ':::0.3', '-d', 'dunno') as proxy:
        assert set(ask_all(proxy, 8, 3)) == {'default'}


@pytest.mark.parametrize('fault', FAULTS)
def test_i1_holds_with_a_server_alone_that_fails_at_mail(fault: str) -> None:
    with stubs(checked(FAULTS[fault])) as (a,), ProxyProcess('-s', a.service + ':::0.3', '-d', 'dunno') as proxy:
        assert set(ask_all(proxy, 8, 3)) == {'default'}
        assert a.requests


@pytest.mark.parametrize(
    ('sent', 'action'),
    [
        (b'action=REJECT caf\xe9\n\n', 'REJECT caf?'),
        (b'action=REJECT for\0you\x1b[31m\n\n', 'REJECT for?you?[31m'),
        (b'action=REJECT\0\n\n', 'REJECT'),
        (b'action=REJECT\n\n\n', 'REJECT'),
        (b'action=REJECT\n\naction=DUNNO\n\n', 'REJECT'),
        (b'action=REJECT\n\nrubbish', 'REJECT'),
    ],
)
def test_i10_a_refusal_with_something_odd_in_it_refuses(sent: bytes, action: str) -> None:
    with stubs(answer(sent)) as (a,), ProxyProcess('-s', a.service) as proxy:

        def work(_: int) -> set[str]:
            with proxy.client() as client:
                return {client.ask(request(instance=new_instance())) for _ in range(10)}

        assert in_threads(8, work) == [{action}] * 8
        assert len(a.requests) == 80 and 'failed: ' not in proxy.log.replace('failed: 0', '')


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
            proxy.logged(f'[A] (127.0.0.1:{a.port}) is down: its check: refused, connection refused')
            assert ') failed: ' not in proxy.log


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
    asked: list[Peer] = []

    def behave(peer: Peer, message: bytes) -> None:
        asked.append(peer)
        slow(0.3)(peer, message)

    with stubs(checked(behave)) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask_own()
        time.sleep(0.2)
        gone = proxy.client()
        gone.send(request(instance=new_instance()))
        wait_until(lambda: len(asked) == 2)
        assert asked[1] is asked[0]
        leave(gone)  # type: ignore[operator]
        wait_until(asked[1].closed.is_set)
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        assert asked[2] is not asked[1]


def test_unix_sockets_on_both_sides(tmp_path: object) -> None:
    with PolicyServerStub(path=f'{tmp_path}/a%server') as a:
        with ProxyProcess('-s', a.service, f'--listen=unix:{tmp_path}/proxy', '--socket-mode=600') as proxy:
            with PostfixClient(f'{tmp_path}/proxy') as client:
                assert client.ask_own() == 'A'
            with proxy.client() as client:
                assert client.ask_own() == 'A'


def test_i6_a_server_that_sends_empty_lines_without_end_stalls_nobody() -> None:
    def flood(peer: Peer, message: bytes) -> None:
        echo(peer, message)
        with contextlib.suppress(OSError):
            while True:
                peer.sock.sendall(b'\n' * 65536)
        raise HangUp

    with stubs(echo, flood) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        began = time.monotonic()
        assert set(ask_all(proxy, 4, 10)) == {'A', 'B'}
        assert time.monotonic() - began < 5 * SCALE

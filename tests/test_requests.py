"""Requests: each is cut, passed on and answered once and in order (I1, I4), whatever a client does."""

from __future__ import annotations

import socket
import time

import pytest

from tests.servers import checked
from tests.support import (
    SCALE,
    Peer,
    PostfixClient,
    ProxyProcess,
    echo,
    new_instance,
    request,
    reset,
    slow,
    stubs,
    wait_until,
)


def test_the_bytes_of_a_request_reach_the_server_as_they_came() -> None:
    odd = (
        b'protocol_state=RCPT\nno equals sign here\nrequest=smtpd_access_policy\nsender=\x1b\x01\xff=a=b\n'
        b'sender=second\nunknown_attribute=x\ninstance=i1\n' + b'long=' + b'y' * 60000 + b'\n\n'
    )
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask(odd) == 'DUNNO i1 A'
        assert a.requests == [odd]


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_requests_that_came_before_a_clients_end_share_a_connection() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.send(b''.join(request(instance=f'i{i}', helo_name='x' * 3000) for i in range(40)))
        client.sock.shutdown(socket.SHUT_WR)
        for i in range(40):
            assert client.read_answer() == b'action=DUNNO i%d A\n\n' % i
        assert a.accepted < 5, 'a check for each'


@pytest.mark.slow
def test_a_request_of_another_type_gets_the_default_and_nothing_leaks_into_the_next() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '-d', '450 later') as proxy, proxy.client() as client:
        assert client.ask(b'request=junk\nsender=leak@example.org\n\n') == '450 later'
        assert client.ask(b'sender=leak@example.org\n\n') == '450 later'
        assert client.ask(b'request=smtpd_access_policy\ninstance=i\n\n') == 'DUNNO i A'
        assert a.requests == [b'request=smtpd_access_policy\ninstance=i\n\n']
        wait_until(lambda: "Default action '450 later' given 2 times: not a request" in proxy.log)


@pytest.mark.parametrize('where', ['before', 'apart', 'behind'])
@pytest.mark.parametrize('lines', [b'\n', b'\r\n', b'\n\r\n\n'])
def test_empty_lines_between_requests_are_skipped(lines: bytes, where: str) -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        for _ in range(3):
            if where == 'apart':
                client.send(lines)
                time.sleep(0.1)
            one = request(instance='one')
            assert client.ask({'before': lines + one, 'apart': one, 'behind': one + lines}[where]) == 'DUNNO one A'
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        assert len(a.requests) == 3 and not any(message.startswith((b'\n', b'\r')) for message in a.requests)
        assert 'not a request' not in proxy.log


def test_a_request_without_end_is_cut_off_and_memory_stays_bounded() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        before = proxy.memory
        for _ in range(100):
            with proxy.client() as client:
                client.sock.settimeout(10)
                try:
                    for _ in range(16):
                        client.send(b'x' * 65536)
                except OSError:
                    pass
        proxy.logged('request too long')
        assert proxy.memory - before < 30e6
        with proxy.client() as client:
            assert client.ask_own() == 'A'


@pytest.mark.slow
def test_a_slow_loris_is_cut_off_at_the_deadline_and_an_idle_client_is_not() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '--deadline=1') as proxy:
        with proxy.client() as idle, proxy.client() as loris:
            started = time.monotonic()
            try:
                for byte in request():
                    loris.send(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass
            assert time.monotonic() - started < 10 * SCALE
            proxy.logged('request too slow, no end within ')
            time.sleep(1)
            assert idle.ask_own() == 'A'


def test_a_request_as_long_as_may_be_is_passed_on() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        message = request(policy_context='x' * (65536 - len(request(policy_context=''))))
        assert client.ask(message).endswith(' A')
        assert a.requests == [message]


@pytest.mark.slow
def test_nothing_is_written_to_a_client_that_has_not_asked() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, '--deadline=1') as proxy, proxy.client() as client:
        client.sock.settimeout(2)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        assert client.ask_own() == 'A'
        client.sock.settimeout(1)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)

"""Mutated bytes: no exception but the documented one, and the process serves the next client."""

from __future__ import annotations

import contextlib
import random
import socket
import time

from hapolicy_gevent import ClientFault, InvalidAnswer, attribute, first_request, parse_answer, printable
from tests.servers import checked
from tests.support import HangUp, Peer, ProxyProcess, in_threads, request, stubs, wait_until

ROUNDS = 100_000
CUTS = [b'\n', b'\n\n', b'\r\n', b'\0', b'=', b'action=', b'\naction=', b'request=', b'550', b'\xff\xfe', b' ', b'']


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with a few places replaced, inserted or cut out."""
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(len(data) + 1)
        data = data[:at] + chance.choice(CUTS) + data[at + chance.randint(0, 3) :]
    return data


def test_the_protocol_code_under_mutated_bytes() -> None:
    chance = random.Random(7)
    whole = request(instance='i1', sender='a=b')
    rest = b''
    for _ in range(ROUNDS):
        with contextlib.suppress(InvalidAnswer):
            parse_answer(mutated(b'foo=bar\naction=DUNNO i1\n\n', chance), chance.random() < 0.5)
        rest += mutated(whole, chance)
        try:
            one, rest = first_request(rest)
            while one:
                assert one.endswith(b'\n')
                printable(attribute(one, b'sender') + attribute(one, b'request'))
                one, rest = first_request(rest)
        except ClientFault:
            rest = b''


def test_a_live_process_under_mutated_requests_and_answers() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        reply = mutated(b'action=DUNNO fuzz\n\n', random.Random(message))
        if not reply.endswith(b'\n\n'):
            if len(reply) % 4 == 0:
                peer.send(reply)
                raise HangUp
            reply += b'\n\n'  # it is the bytes that count, not the waiting
        peer.send(reply)

    with stubs(checked(behave), checked(behave)) as (a, b):
        services = [a.service + ':::0.3', b.service + ':::0.3']
        with ProxyProcess('-s', services[0], '-s', services[1], '--fall=1000') as proxy:

            def work(i: int) -> None:
                chance = random.Random(i)
                while time.monotonic() < end:
                    with contextlib.suppress(OSError), proxy.client() as client:
                        client.sock.settimeout(5)
                        each = [mutated(request(instance=str(chance.random())), chance) for _ in range(25)]
                        client.send(b''.join(each))
                        client.sock.shutdown(socket.SHUT_WR)
                        while client.sock.recv(65536) and time.monotonic() < end:
                            pass

            end = time.monotonic() + 8
            in_threads(64, work)
            assert min(len(a.requests), len(b.requests)) > 10, 'some were asked'
            a.behaviour = b.behaviour = lambda peer, message: peer.send(b'action=DUNNO well\n\n')
            with proxy.client() as client:
                wait_until(lambda: client.ask(request()) == 'DUNNO well', 40)

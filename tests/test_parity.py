"""The same requests through the ancestor, hapolicy 1.00 in Perl, and ours: equal answers, but for its faults.

Both run as the ancestor does, with one client on stdin and stdout. The first half is what a user
may rely on after the change; the second has a test for each fault that was left behind, and shows it in the ancestor.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.support import (
    MODULE,
    SCALE,
    Behaviour,
    Peer,
    PolicyServerStub,
    answer,
    attributes,
    echo,
    free_port,
    hang,
    hang_up,
    new_instance,
    request,
    stubs,
)

ANCESTOR = '/usr/sbin/hapolicy'
PROGRAMS = {'ancestor': [ANCESTOR], 'ours': [sys.executable, str(MODULE)]}

pytestmark = pytest.mark.skipif(
    not os.access(ANCESTOR, os.X_OK), reason=f'{ANCESTOR}, the Perl original, is not installed: Debian package hapolicy'
)


@dataclass
class Run:
    """What became of a program that was given all its requests at once."""

    stdout: bytes
    stderr: bytes
    status: int

    @property
    def actions(self) -> list[str]:
        """The actions of its answers, which must be all that it wrote."""
        assert re.fullmatch(rb'(action=[^\n]+\n\n)*', self.stdout), self.stdout
        return [line[7:].decode(errors='surrogateescape') for line in self.stdout.split(b'\n\n')[:-1]]


def run(program: str, *options: str, requests: bytes) -> Run:
    """Run the ancestor or ours with these options and this on its stdin, to the end of its stdout."""
    done = subprocess.run([*PROGRAMS[program], *options], input=requests, capture_output=True, timeout=60 * SCALE)
    if program == 'ours':
        assert done.stderr == b''
    return Run(done.stdout, done.stderr, done.returncode)


def run_both(*options: str, requests: bytes) -> tuple[Run, Run]:
    """Run the ancestor, then ours."""
    return run('ancestor', *options, requests=requests), run('ours', *options, requests=requests)


def distinct(number: int) -> bytes:
    """Return requests of so many messages."""
    return b''.join(request(instance=new_instance()) for _ in range(number))


# ---------------------------------------------------------------------------
# What is equal
# ---------------------------------------------------------------------------

ONE = request(instance='1')
THREE = request(instance='1') + request(instance='2') + request(instance='3')


@dataclass
class Case:
    """Options, in which {A} is server A's address and port, requests, and the answers that both are to give.

    Servers are named A, B, C by their place in `servers`; None is one that refuses connections.
    """

    options: list[str]
    actions: list[str]
    requests: bytes = ONE
    servers: list[Behaviour | None] = field(default_factory=lambda: [echo])

    def run(self, program: str) -> Run:
        """Run a program, with servers that are as new."""
        with contextlib.ExitStack() as stack:
            places: dict[str, str] = {}
            for letter, behaviour in zip('ABC', self.servers, strict=False):
                port = free_port()
                if behaviour is not None:
                    port = stack.enter_context(PolicyServerStub(behaviour, letter)).port
                places |= {letter: f'127.0.0.1:{port}', f'{letter}_port': str(port)}
            return run(program, *(option.format(**places) for option in self.options), requests=self.requests)


def says(action: str) -> Behaviour:
    """Answer with this action."""
    return answer(b'action=%b\n\n' % action.encode())


def half(data: bytes) -> Behaviour:
    """Send these bytes and hang up."""

    def behave(peer: Peer, message: bytes) -> None:
        peer.send(data)
        hang_up(peer, message)

    return behave


CASES = {
    # answers
    'an answer of one word': Case(['-s', 'A={A}:'], ['DUNNO'], servers=[says('DUNNO')]),
    'a code and text': Case(['-s', 'A={A}:'], ['550 5.7.1 no'], servers=[says('550 5.7.1 no')]),
    'a header to prepend': Case(['-s', 'A={A}:'], ['PREPEND X-A: b=c: d'], servers=[says('PREPEND X-A: b=c: d')]),
    'text in UTF-8': Case(['-s', 'A={A}:'], ['REJECT für dich'], servers=[says('REJECT für dich')]),
    'percent signs': Case(['-s', 'A={A}:'], ['REJECT 100%n %s'], servers=[says('REJECT 100%n %s')]),
    'an answer without its empty line': Case(['-s', 'A={A}:'], ['REJECT'], servers=[half(b'action=REJECT\n')]),
    'bytes behind the answer': Case(['-s', 'A={A}:'], ['DUNNO'], servers=[answer(b'action=DUNNO\n\nmore')]),
    # requests
    'several requests on one stdin': Case(['-s', 'A={A}:'], [f'DUNNO {i} A' for i in (1, 2, 3)], THREE),
    'no request': Case(['-s', 'A={A}:'], [], b''),
    'half a request': Case(['-s', 'A={A}:'], [], ONE[:-1]),
    'a value with an equals sign': Case(['-s', 'A={A}:'], ['DUNNO a=b=c A'], request(instance='a=b=c')),
    'a line that is no attribute': Case(['-s', 'A={A}:'], ['DUNNO 1 A'], b'garbage\n' + ONE),
    'the fewest attributes': Case(['-s', 'A={A}:'], ['OK'], b'request=smtpd_access_policy\n\n', [says('OK')]),
    # the default action
    'the default without -d': Case(['-s', 'A={A}:'], ['dunno'] * 3, THREE, [None]),
    '-d': Case(['-d', 'defer_if_permit down', '-s', 'A={A}:'], ['defer_if_permit down'], servers=[None]),
    '-d and its value in one word': Case(['-dREJECT', '-s', 'A={A}:'], ['REJECT'], servers=[None]),
    '--default=': Case(['--default=451 4.7.1 a', '-s', 'A={A}:'], ['451 4.7.1 a'], servers=[None]),
    '--default and a word': Case(['--default', '451 4.7.1 a', '-s', 'A={A}:'], ['451 4.7.1 a'], servers=[None]),
    'all of three refuse': Case(['-s', 'A={A}:', '-s', 'B={B}:20', '-s', 'C={C}:20:5'], ['dunno'], servers=[None] * 3),
    'the default is not used': Case(['-d', 'REJECT', '-s', 'A={A}:'], ['DUNNO 1 A']),
    # ways to write a service
    'empty fields': Case(['-s', 'A={A}:'], ['DUNNO 1 A']),
    'a prio': Case(['-s', 'A={A}:10'], ['DUNNO 1 A']),
    'a prio and an empty weight': Case(['-s', 'A={A}:10:'], ['DUNNO 1 A']),
    'prio and weight': Case(['-s', 'A={A}:10:2'], ['DUNNO 1 A']),
    'prio, weight and timeout': Case(['-s', 'A={A}:10:2:5'], ['DUNNO 1 A']),
    'weight alone': Case(['-s', 'A={A}::2'], ['DUNNO 1 A']),
    'timeout alone': Case(['-s', 'A={A}:::5'], ['DUNNO 1 A']),
    'a host name': Case(['-s', 'A=localhost:{A_port}:'], ['DUNNO 1 A']),
    'a name with blanks and dots': Case(['-s', 'policy one.a={A}:'], ['DUNNO 1 A']),
    'the default prio is 10, before': Case(['-s', 'B={B}:11', '-s', 'A={A}:'], ['DUNNO 1 A'], servers=[echo, echo]),
    'the default prio is 10, after': Case(['-s', 'A={A}:', '-s', 'B={B}:1'], ['DUNNO 1 B'], servers=[echo, echo]),
    # ways to write options
    '-sVALUE': Case(['-sA={A}:'], ['DUNNO 1 A']),
    '--service=': Case(['--service=A={A}:'], ['DUNNO 1 A']),
    '--service and a word': Case(['--service', 'A={A}:'], ['DUNNO 1 A']),
    'short options bundled': Case(['-lv', '-s', 'A={A}:'], ['DUNNO 1 A']),
    'bundled with a value': Case(['-lvdREJECT', '-s', 'A={A}:'], ['REJECT'], servers=[None]),
    'long options': Case(['--logging', '--verbose', '--service=A={A}:'], ['DUNNO 1 A']),
    'long options cut short': Case(['--log', '--verb', '--def=REJECT', '--serv=A={A}:'], ['DUNNO 1 A']),
    'flags given twice': Case(['-v', '-v', '-l', '-l', '-s', 'A={A}:'], ['DUNNO 1 A']),
    'flags given twice in one word': Case(['-vv', '-llv', '-s', 'A={A}:'], ['DUNNO 1 A']),
    'the last -d counts': Case(['-d', 'OK', '-s', 'A={A}:', '--default=x', '-dREJECT'], ['REJECT'], servers=[None]),
    'an end of options': Case(['-s', 'A={A}:', '-d', 'REJECT', '--'], ['REJECT'], servers=[None]),
    'a value that looks like an option': Case(['-s', 'A={A}:', '-d', '--'], ['--'], servers=[None]),
    'options in any order': Case(['-s', 'A={A}:', '-l', '-s', 'B={B}:20', '-d', 'x'], ['DUNNO 1 B'],
                                 servers=[None, echo]),
    # order and failover
    'lower prio first': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 A', 'DUNNO 2 A', 'DUNNO 3 A'], THREE,
                             [echo, echo]),
    'lower prio first, named last': Case(['-s', 'A={A}:20', '-s', 'B={B}:10'],
                                         ['DUNNO 1 B', 'DUNNO 2 B', 'DUNNO 3 B'], THREE, [echo, echo]),
    'weights do not matter between prios': Case(['-s', 'A={A}:10:1', '-s', 'B={B}:20:9'], ['DUNNO 1 A'],
                                                servers=[echo, echo]),
    'the next when the first refuses': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'],
                                            ['DUNNO 1 B', 'DUNNO 2 B', 'DUNNO 3 B'], THREE, [None, echo]),
    'the next of the same prio': Case(['-s', 'A={A}:10', '-s', 'B={B}:10'],
                                      ['DUNNO 1 B', 'DUNNO 2 B', 'DUNNO 3 B'], THREE, [None, echo]),
    'the last of three': Case(['-s', 'A={A}:10', '-s', 'B={B}:20', '-s', 'C={C}:30'], ['DUNNO 1 C'],
                              servers=[None, None, echo]),
    'the next when the first hangs up': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                             servers=[hang_up, echo]),
    'the next when the first hangs': Case(['-s', 'A={A}:10:1:1', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                          servers=[hang, echo]),
    'the next after an empty action': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                           servers=[answer(b'action=\n\n'), echo]),
    'the next after no action': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                     servers=[answer(b'verdict=no\n\n'), echo]),
    'the next after blanks around the equals sign': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                                         servers=[answer(b'action = DUNNO\n\n'), echo]),
    'the next after a capital': Case(['-s', 'A={A}:10', '-s', 'B={B}:20'], ['DUNNO 1 B'],
                                     servers=[answer(b'Action=DUNNO\n\n'), echo]),
    'the default when the only one hangs': Case(['-d', 'REJECT', '-s', 'A={A}:10:1:1'], ['REJECT'], servers=[hang]),
}  # fmt: skip


@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize('name', CASES)
def test_both_give_the_same_answers(name: str, program: str) -> None:
    ran = CASES[name].run(program)
    assert (ran.actions, ran.status) == (CASES[name].actions, 0)


@pytest.mark.parametrize(
    ('weights', 'shares'),
    [((1, 1), (12, 12)), ((2, 1), (16, 8)), ((1, 2), (8, 16)), ((1, 1, 1), (8, 8, 8)), ((4, 1, 1), (16, 4, 4))],
)
def test_both_share_by_weight(weights: tuple[int, ...], shares: tuple[int, ...]) -> None:
    """Of 24 messages each service of a prio gets exactly what its weight says."""
    for program in PROGRAMS:
        with stubs(*[echo] * len(weights)) as servers:
            options = [f'-s{s.service}:10:{weight}' for s, weight in zip(servers, weights, strict=True)]
            ran = run(program, *options, requests=distinct(24))
            assert len(ran.actions) == 24
            assert (program, tuple(len(s.requests) for s in servers)) == (program, shares)


class StubOfAnyLineEnds(PolicyServerStub):
    """A policy server that takes a request's lines with CRLF, too."""

    def _serve(self, peer: Peer) -> None:
        data = b''
        while not data.endswith((b'\n\n', b'\n\r\n')):
            data += peer.sock.recv(65536)
        self.requests.append(data)
        peer.send(b'action=DUNNO\n\n')
        peer.sock.close()


def test_both_take_requests_whose_lines_end_in_crlf() -> None:
    """Postfix sends none, other clients may; the ancestor made them LF, ours passes them on as they are."""
    sent = ONE.replace(b'\n', b'\r\n')
    with StubOfAnyLineEnds() as server:
        for ran in run_both('-s', f'{server.service}:', requests=sent):
            assert (ran.actions, ran.status) == (['DUNNO'], 0)
    assert server.requests[0].count(b'\r') == 0
    assert server.requests[1] == sent


def test_both_log_a_request_in_the_same_fields() -> None:
    """With -l and -L: what reads the ancestor's log lines can read ours, which go on behind them."""
    port = free_port()
    lines = []
    for ran in run_both('-lL', '-s', f'A=127.0.0.1:{port}:7:2', requests=ONE):
        [line] = re.findall(r'^\[LOG info\]: (\[A\].*)$', ran.stdout.decode(), re.MULTILINE)
        # the counts are as equal as all before; the ancestor's delay is in whole seconds
        head, action = re.sub(r'delay: [0-9.]+s', 'delay: s', line).split(', action: ')
        lines.append(head)
        assert action.startswith("'")
        assert ran.status == 0
    assert lines[0] == lines[1]
    assert lines[0] == (f'[A] (127.0.0.1:{port}), prio: 7, weight: 2, queries: 1, answers: 0, failed: 1, delay: s, '
                        'client: mail.example.net[192.0.2.7], helo: <mail.example.net>, from: <alice@example.net>, '
                        'to: <bob@example.org>')  # fmt: skip


# ---------------------------------------------------------------------------
# The ancestor's faults, each in a test of its own
# ---------------------------------------------------------------------------


TWO = ['-s', 'A={A}:10', '-s', 'B={B}:20']

#: What the ancestor answered, and how ours does.
FAULTS = {
    'prios were compared as text': (
        ['DUNNO 1 B'], Case(['-s', 'A={A}:9', '-s', 'B={B}:10'], ['DUNNO 1 A'], servers=[echo, echo])),
    'a service without a trailing colon was ignored': (['dunno'], Case(['-s', 'A={A}'], ['DUNNO 1 A'])),
    'an unknown request had no answer': (
        ['DUNNO 1 A'], Case(['-s', 'A={A}:'], ['dunno', 'DUNNO 1 A'], b'request=junk\nleak=1\n\n' + ONE)),
    'the first line alone was read': (
        ['dunno'], Case(['-s', 'A={A}:'], ['REJECT a'], servers=[answer(b'x=1\naction=REJECT a\n\n')])),
    'a bare number, which permits, was passed on': (['550'], Case(TWO, ['DUNNO 1 B'], servers=[says('550'), echo])),
    'a blank, which permits, was passed on': ([' '], Case(TWO, ['DUNNO 1 B'], servers=[says(' '), echo])),
    'half an answer was passed on': (
        ['REJECT, un'], Case(TWO, ['DUNNO 1 B'], servers=[half(b'action=REJECT, un'), echo])),
    'what is no UTF-8, which Postfix does not take, was passed on': (
        ['REJECT \udcff'], Case(['-s', 'A={A}:'], ['REJECT ?'], servers=[answer(b'action=REJECT \xff\n\n')])),
    'a NUL, where Postfix stops to read, was passed on': (
        ['REJECT a\0b'], Case(['-s', 'A={A}:'], ['REJECT a?b'], servers=[says('REJECT a\0b')])),
    'a NUL behind the word was passed on': (
        ['REJECT\0a'], Case(['-s', 'A={A}:'], ['REJECT a'], servers=[says('REJECT\0a')])),
    'a CR was kept': (['REJECT\r'], Case(['-s', 'A={A}:'], ['REJECT'], servers=[answer(b'action=REJECT\r\n\r\n')])),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_of_the_ancestor_is_left_behind(fault: str) -> None:
    actions, case = FAULTS[fault]
    assert case.run('ancestor').actions == actions
    assert case.run('ours').actions == case.actions


@pytest.mark.parametrize('service', ['A', 'A=127.0.0.1', 'A=127.0.0.1:', '=127.0.0.1:10031:', 'A:127.0.0.1:10031:10'])
def test_an_invalid_service_ends_the_start_where_the_ancestor_went_on_without(service: str) -> None:
    """A typo must not silently turn filtering off: one line on stderr names it."""
    assert run('ancestor', '-s', service, requests=ONE).actions == ['dunno']
    done = subprocess.run([*PROGRAMS['ours'], '-s', service], input=ONE, capture_output=True, timeout=60 * SCALE)
    assert (done.returncode, done.stdout) == (2, b'')
    assert f"'{service}'" in done.stderr.decode() and done.stderr.count(b'\n') == 1


def test_a_request_arrives_verbatim_where_the_ancestor_reordered_it_and_merged_duplicates() -> None:
    """The server gets the bytes that Postfix sent; the ancestor cut values at 512 of them, too."""
    sent = request(instance='1', sender='a' * 600)[:-1] + b'ccert=first\nccert=second\nspace = around \n\n'
    with stubs(echo, echo) as [a, b]:
        run('ancestor', '-s', f'{a.service}:', requests=sent)
        run('ours', '-s', f'{b.service}:', requests=sent)
    lines = a.requests[0].split(b'\n')
    assert b'ccert=second' in lines and b'ccert=first' not in lines
    assert lines != sent.replace(b'ccert=first\n', b'').split(b'\n')
    assert attributes(a.requests[0])['sender'] == 512 * 'a'
    assert b.requests == [sent]


@pytest.fixture
def ipv6() -> Iterator[PolicyServerStub]:
    """Run a stub on ::1, if the machine has that."""
    if not os.path.exists('/proc/net/if_inet6'):
        pytest.skip('this machine has no ::1')
    with PolicyServerStub(host='::1') as server:
        yield server


def test_a_service_may_have_an_ipv6_address_where_the_ancestors_could_not(ipv6: PolicyServerStub) -> None:
    """In brackets, with and without further fields."""
    for fields in ('', ':', ':10:1:5'):
        ancestor, ours = run_both('-s', f'A=[::1]:{ipv6.port}{fields}', requests=ONE)
        assert ancestor.actions == ['dunno']
        assert ours.actions == ['DUNNO 1 A']


def test_a_hung_server_is_left_alone_where_the_ancestor_waited_its_timeout_each_time() -> None:
    """Two requests wait for it and it is down; the ancestor had each of four wait."""
    for program, waits in (('ancestor', 4), ('ours', 2)):
        with stubs(hang, echo) as [a, b]:
            options = ['-s', f'{a.service}:10:1:1', '-s', f'{b.service}:20']
            ran = run(program, *options, requests=distinct(4))
            assert [action.split()[-1] for action in ran.actions] == ['B'] * 4
            assert (program, len(a.requests)) == (program, waits)


def test_connections_are_used_again_where_the_ancestor_opened_one_for_each_request() -> None:
    """Five messages of a client that waits for each answer, as Postfix does, take one connection."""
    for program, connections in (('ancestor', 5), ('ours', 1)):
        with stubs(echo) as [a]:
            process = subprocess.Popen(
                [*PROGRAMS[program], '-s', f'{a.service}:'],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            with process:
                assert process.stdin is not None and process.stdout is not None
                for number in range(5):
                    process.stdin.write(request(instance=number))
                    process.stdin.flush()
                    assert process.stdout.readline() == b'action=DUNNO %d A\n' % number
                    assert process.stdout.readline() == b'\n'
            assert (program, a.accepted, process.returncode) == (program, connections, 0)


@pytest.mark.parametrize(('sender', 'action'), [('a@example.net', 'DUNNO 1 A'), ('100%n@example.net', 'DUNNO 1 A')])
def test_logging_to_stdout_does_no_harm_where_the_ancestor_died(sender: str, action: str) -> None:
    """-L with -l: Perl's taint mode ended the ancestor at the first answer it logged, without giving it."""
    with stubs(echo) as [a]:
        requests = request(sender=sender, instance='1')
        ancestor, ours = run_both('-lL', '-s', f'{a.service}:', requests=requests)
    assert ancestor.status != 0 and b'action=' not in ancestor.stdout
    assert b'Insecure dependency in printf' in ancestor.stderr
    assert ours.status == 0 and ours.stdout.endswith(b'\n') and f'<{sender}>' in ours.stdout.decode()
    assert f'\naction={action}\n\n' in '\n' + ours.stdout.decode()


def test_a_percent_sign_of_a_client_is_logged_where_the_ancestor_took_it_as_a_format() -> None:
    """-L with -v: %n in a sender's address ended the ancestor."""
    with stubs(echo) as [a]:
        requests = request(sender='100%n@example.net', instance='1')
        ancestor, ours = run_both('-vL', '-s', f'{a.service}:', requests=requests)
    assert ancestor.status != 0 and b'Missing argument for %n in printf' in ancestor.stderr
    assert ours.status == 0 and b'action=DUNNO 1 A\n\n' in ours.stdout


def test_nothing_is_said_on_stderr_where_the_ancestor_missed_its_log() -> None:
    """Under spawn(8) stderr is the connection to Postfix: without a log daemon the ancestor wrote into its answers."""
    ancestor, ours = run_both('-l', '-s', f'A=127.0.0.1:{free_port()}:', requests=ONE)
    if not os.path.exists('/dev/log'):
        assert b'setlogsock()' in ancestor.stderr
    assert ours.stderr == b''

"""--check-services: what one runs before a line goes into main.cf; and the summary in the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from hapolicy_gevent import verdict
from tests.support import (
    MODULE,
    SCALE,
    HangUp,
    Peer,
    answer,
    echo,
    free_port,
    hang,
    hang_up,
    reset,
    run,
    stubs,
    wait_until,
)


def check(*services: str) -> tuple[int, list[str]]:
    done = run('--check-services', *(f'--service={service}' for service in services), input='', text=True)
    assert done.stderr == ''
    assert done.stdout.count('\n') == len(services), done.stdout
    lines = {line.partition(' ')[0]: line for line in done.stdout.splitlines()}  # they come as they are answered
    return done.returncode, [lines[service.partition('=')[0]] for service in services]


def test_services_that_answer_are_told_with_their_times_and_verdicts() -> None:
    with stubs(answer(b'action=DUNNO\n\n'), answer(b'action=550 5.7.1 no\n\n')) as (a, b):
        status, lines = check(a.service, b.service)
        assert (a.checks, a.requests) == (1, []), 'the check of a proxy, and no mail'
    assert status == 0
    times = r'connect +\d+\.\d ms, answer +\d+\.\d ms'
    assert re.fullmatch(rf"A +127\.0\.0\.1:\d+ +answered +{times} +ok: 'DUNNO'", lines[0]), lines
    assert re.fullmatch(rf"B +127\.0\.0\.1:\d+ +answered +{times} +reject: '550 5\.7\.1 no'", lines[1]), lines
    assert len(lines) == 2 and lines[0].index('answered') == lines[1].index('answered'), lines


def test_every_service_that_does_not_answer_is_told_with_the_reason() -> None:
    twice = answer(b'action=DUNNO\n\naction=REJECT\n\n')
    with stubs(hang, hang_up, answer(b'action=550\n\n'), answer(b'rubbish\n\n'), twice) as services:
        began = time.monotonic()
        status, lines = check(f'R=127.0.0.1:{free_port()}', 'N=no-such-host.invalid:1', 'U=unix:/no/such/socket',
                              services[0].service + ':::1', *[service.service for service in services[1:]])  # fmt: skip
    assert status == 1
    assert time.monotonic() - began < 20 * SCALE, 'all are asked at the same time'
    said = [line.split('FAILED')[1].strip() for line in lines]
    expected = ['refused: connection refused', 'unreachable: ', 'refused: no such file',
                'timeout: no answer within 1s', 'dropped: ', 'invalid: the bare number 550',
                'invalid: an answer without', 'invalid: bytes after']  # fmt: skip
    assert len(said) == len(expected)
    for text, start in zip(said, expected, strict=True):
        assert text.startswith(start), lines


def test_where_descriptors_are_few_each_service_has_its_line() -> None:
    with stubs(echo) as (a,):
        services = [f'-sS{number}={a.service[2:]}' for number in range(60)]
        done = run('--check-services', *services, program=('prlimit', '--nofile=40', sys.executable, MODULE))
    said = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr, len(said)) == (1, b'', 60)
    assert any('answered' in line for line in said)
    assert any('FAILED    descriptors: Too many open files' in line for line in said)


def test_a_line_is_there_before_the_slowest_has_answered() -> None:
    with stubs(echo, hang) as (a, b):
        command = [sys.executable, str(MODULE), '--check-services', '-s', b.service, '-s', a.service]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith('A ')
            assert process.poll() is None, 'it waits for B'
            process.terminate()


@pytest.mark.parametrize('target', ['/dev/full', 'closed pipe'])
def test_an_output_that_takes_nothing_is_one_line_on_stderr(target: str) -> None:
    with stubs(echo) as (a,):
        reads, writes = os.pipe()
        os.close(reads)
        full = os.open('/dev/full', os.O_WRONLY)
        done = run('--check-services', '-s', a.service, input='', text=True, capture_output=False,
                   stdout=full if target == '/dev/full' else writes, stderr=subprocess.PIPE)  # fmt: skip
        os.close(writes)
        os.close(full)
    assert done.returncode == 1
    assert re.fullmatch('hapolicy: stdout: .+\n', done.stderr), done.stderr


def test_a_server_that_hangs_up_by_a_reset_has_answered() -> None:
    def answer_and_reset(peer: Peer, message: bytes) -> None:
        peer.send(b'action=DUNNO\n\n')
        time.sleep(0.01)
        reset(peer.sock)
        raise HangUp

    with stubs(answer_and_reset, echo) as (a, b):
        status, lines = check(a.service, b.service)
        assert status == 0 and 'answered' in lines[0] and 'answered' in lines[1], lines
        assert lines[0].endswith("ok: 'DUNNO', then it hangs up") and lines[1].endswith("ok: 'DUNNO  B'"), lines
        wait_until(lambda: not b.open, what='its connection is closed')


def test_a_second_answer_that_comes_a_moment_later_is_told() -> None:
    def lie(peer: Peer, message: bytes) -> None:
        peer.send(b'action=DUNNO\n\n')
        time.sleep(0.01)
        peer.send(b'action=REJECT\n\n')

    with stubs(lie) as (a,):
        status, lines = check(a.service)
    assert status == 1 and 'answered' not in lines[0], lines
    assert 'FAILED    invalid: bytes after the answer' in lines[0], lines


@pytest.mark.parametrize(
    ('action', 'kind'),
    [(b'DUNNO', 'ok'), (b'ok  text', 'ok'), (b'permit', 'ok'), (b'Reject', 'reject'), (b'550 5.7.1 x', 'reject'),
     (b'521', 'reject'), (b'451 4.3.5 x', 'defer'), (b'DEFER_IF_PERMIT x', 'defer'), (b'defer', 'defer'),
     (b'PREPEND X-A: b', 'prepend'), (b'HOLD', 'other'), (b'4511 x', 'other'), (b'350 x', 'other'), (b'4x', 'other')],
)  # fmt: skip
def test_an_action_counts_as_what_it_does_to_the_mail(action: bytes, kind: str) -> None:
    assert verdict(action) == kind

"""Health: what mail may say of a service, and what a check says; the rest of it is in test_model.py."""

from __future__ import annotations

import errno
import socket
import time

import gevent
import pytest

from hapolicy_gevent import (
    DEADLINE,
    DESCRIPTORS,
    DOWN,
    DROPPED,
    INVALID,
    LATE,
    REFUSED,
    TRIAL,
    UNREACHABLE,
    UP,
    Address,
    Connection,
    Log,
    Queue,
    Service,
    ServiceFailure,
    connect_failure,
    parse_service,
)
from tests.support import wait_in_line


def service() -> Service:
    return Service('a', Address(0, 'h', 1))


def fail(one: Service, reason: str, at: float = 1, alone: bool = False) -> str:
    failure = ServiceFailure(reason, '')
    failure.at = at
    one.blame(failure, alone, at + 1)
    return one.state


@pytest.mark.parametrize('reason', [LATE, INVALID, DROPPED])
def test_other_failures_take_it_down_after_fall_in_a_row_beside_another(reason: str) -> None:
    one = service()
    assert fail(one, reason) is UP
    one.answered(b'DUNNO', 1 - 1, True, 1)
    assert fail(one, reason, 2) is UP
    assert fail(one, reason, 2) is DOWN
    one.check_passed(4)
    assert one.state is TRIAL, 'the check does not see what mail sees'
    assert fail(one, reason, 5) is DOWN
    one.check_passed(6)
    one.answered(b'DUNNO', 7 - 1, True, 7)
    assert one.state is UP
    one.turn(DOWN, 'its check', 8)
    one.check_passed(9)
    assert one.state is UP


@pytest.mark.parametrize('reason', [INVALID, DROPPED])
def test_i9_the_last_service_is_never_taken_down_by_mail_that_makes_it_fail(reason: str) -> None:
    one = service()
    for _ in range(2000):
        assert fail(one, reason, alone=True) is UP


def test_late_answers_in_a_row_put_the_last_service_on_trial_and_one_answer_ends_it() -> None:
    one = service()
    assert fail(one, LATE, alone=True) is UP
    assert fail(one, DROPPED, alone=True) is UP
    assert fail(one, LATE, alone=True) is TRIAL
    assert fail(one, LATE, alone=True) is TRIAL
    one.answered(b'DUNNO', 5 - 1, True, 5)
    assert one.state is UP and not one.blamed


def test_i9_late_answers_say_nothing_while_others_are_answered() -> None:
    one = service()
    one.answered(b'DUNNO', 1.5 - 1, True, 1.5)
    for _ in range(5):
        assert fail(one, LATE, 1) is UP
        assert fail(one, LATE, 1, alone=True) is UP
    assert fail(one, LATE, 2) is UP
    assert fail(one, LATE, 2) is DOWN, 'nobody was answered since these were sent'


def test_a_failure_counts_once_though_another_service_answers_after_it_was_late() -> None:
    one, failure = service(), ServiceFailure(LATE, '')
    failure.at = 1
    for alone in (True, False, False):
        one.blame(failure, alone, 2)
    assert one.state is UP and one.in_a_row == 1


@pytest.mark.parametrize(
    ('waiting', 'answered', 'state'), [(False, 0, TRIAL), (True, 0, TRIAL), (True, 9, UP), (False, 9, TRIAL)]
)
def test_late_answers_of_the_last_service_count_where_others_wait_if_nothing_is_answered_for_long(
    waiting: bool, answered: float, state: str,
) -> None:  # fmt: skip
    queue, began = Queue([parse_service('A=127.0.0.1:1:::5')], Log()), time.monotonic()
    (pool,) = queue.pools.values()
    pool.checker.spawn = lambda check: gevent.Greenlet(lambda: None)  # type: ignore[method-assign]
    pool.service.since, pool.service.answered_at = began, began + answered
    if waiting:
        wait_in_line(pool)
        pool.places = 0
    for _ in range(2):
        connection = Connection(pool, began + 9.5)
        pool.busy[connection] = None
        pool.failed(connection, ServiceFailure(LATE, 'no answer within 5s'), began + 14.5)
    assert pool.service.state == state, 'strangers may send slow messages, but not keep all others from an answer'


@pytest.mark.parametrize('reason', [REFUSED, DEADLINE, DESCRIPTORS])
def test_what_is_judged_otherwise_or_not_its_fault_is_no_failure_that_another_outdoes(reason: str) -> None:
    one = service()
    for _ in range(10):
        fail(one, reason, 1)
    assert one.state is UP


@pytest.mark.parametrize('at', [-1, 3, 5])
def test_a_hang_up_before_an_answer_or_before_the_service_went_down_is_no_failure_in_a_row(at: float) -> None:
    one = service()
    one.answered(b'DUNNO', 4, True, 4)
    one.since = 4
    for _ in range(3):
        fail(one, DROPPED, at)
    assert one.state is (DOWN if at > 4 else UP), 'the sender of slow mail chooses when another service answers it'


def test_where_our_own_ports_are_used_up_it_is_no_failure_of_the_service() -> None:
    error = OSError(errno.EADDRNOTAVAIL, 'Cannot assign requested address')
    assert connect_failure(error, socket.AF_INET).reason == DESCRIPTORS
    assert connect_failure(error, socket.AF_INET6).reason == UNREACHABLE, 'there is no IPv6 here'
    assert connect_failure(error, socket.AF_UNSPEC).reason == UNREACHABLE
    assert connect_failure(ConnectionResetError(), socket.AF_INET).reason == DROPPED

"""Health: what takes a service down, how it comes back; and a model of all of it under an artificial clock."""

from __future__ import annotations

import errno
import socket
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hapolicy_gevent import (
    DEADLINE,
    DESCRIPTORS,
    DOWN,
    DROPPED,
    INVALID,
    LATE,
    PROBE_LAST,
    REFUSED,
    RELEARN_FIRST,
    STARVED,
    TRIAL,
    UNREACHABLE,
    UP,
    Address,
    Balancer,
    Service,
    Slot,
    connect_failure,
)


def service(name: str = 'a', maximum: int = 100, weight: int = 1) -> Service:
    return Service(name, Address(0, 'h', 1), weight=weight, maximum=maximum)


def fail(one: Service, reason: str, now: float = 0, instance: bytes = b'') -> str:
    return one.fail(reason, instance, one.begin(now), now)


@pytest.mark.parametrize('reason', [REFUSED, UNREACHABLE])
def test_a_service_that_cannot_be_connected_to_is_down_at_once(reason: str) -> None:
    one = service()
    assert reason in fail(one, reason)
    assert one.state is DOWN


@pytest.mark.parametrize('reason', [LATE, INVALID, DROPPED])
def test_other_failures_take_it_down_after_fall_in_a_row(reason: str) -> None:
    one = service()
    assert fail(one, reason) == ''
    one.answered(one.begin(1), b'dunno', 1)
    assert fail(one, reason) == ''
    assert 'is down' in fail(one, reason)


@pytest.mark.parametrize('reason', [STARVED, DEADLINE, DESCRIPTORS])
def test_what_is_not_its_fault_is_counted_and_no_more(reason: str) -> None:
    one = service()
    for _ in range(10):
        assert fail(one, reason) == ''
    assert one.state is UP and one.failures[reason] == 10


def test_one_poisonous_message_never_takes_a_service_down() -> None:
    one = service()
    for _ in range(10):
        assert fail(one, DROPPED, instance=b'poison') == ''
    assert one.state is UP
    assert 'is down' in fail(one, DROPPED, instance=b'another')


def test_one_message_that_is_always_late_takes_no_service_down_but_ends_a_trial() -> None:
    one = service()
    for _ in range(10):
        assert fail(one, LATE, instance=b'poison') == ''
    assert 'is down' in fail(one, LATE, instance=b'another')
    one.turn(TRIAL, 'a probe connected', 1)
    assert 'is down' in fail(one, LATE, 1, instance=b'another'), 'to wait once more would be too dear'


def test_slow_requests_are_no_failure_of_a_service_that_answers_others_meanwhile() -> None:
    one = service()
    slots = [one.begin(0) for _ in range(5)]
    one.answered(one.begin(1), b'dunno', 1.5)
    for number, slot in enumerate(slots):
        assert one.fail(LATE, b'%d' % number, slot, 2) == ''
    assert (one.state, one.in_flight, one.failures[LATE]) == (UP, 0, 5)
    assert fail(one, LATE, 3) == ''
    assert 'is down' in fail(one, LATE, 3), 'nobody was answered since these began'


def test_what_a_trial_brings_is_no_answer_to_those_from_before_it() -> None:
    one = service()
    old = one.begin(0)
    fail(one, REFUSED, 1)
    one.turn(TRIAL, 'a probe connected', 2)
    one.begin(3)
    assert not one.answered_since(old)


def test_probes_come_at_growing_distances_and_forever() -> None:
    one = service()
    now = 0.0
    fail(one, REFUSED, now)
    distances = []
    for _ in range(12):
        distances.append(one.probe_at - now)
        now = one.probe_at
        one.probe_failed(now)
    for wanted, distance in zip([1, 2, 4, 8, 16, *[PROBE_LAST] * 7], distances, strict=True):
        assert 0.799 * wanted <= distance <= 1.201 * wanted
    assert len(set(distances)) > 6, 'jitter'


def test_on_trial_it_gets_one_request_at_a_time_until_one_is_answered() -> None:
    one = service()
    balancer = Balancer([one])
    fail(one, REFUSED)
    assert balancer.choose(b'', (), 0) is None
    assert 'trial' in one.turn(TRIAL, 'a probe connected', 1)
    assert balancer.choose(b'', (), 1) is one
    slot = one.begin(1)
    assert balancer.choose(b'', (), 1) is None
    assert not balancer.others(())
    assert 'is up' in one.answered(slot, b'dunno', 2) and one.state is UP
    assert balancer.choose(b'', (), 2) is one


def test_a_failed_trial_waits_twice_as_long_for_the_next_probe() -> None:
    one = service()
    fail(one, REFUSED, 0)
    for wanted in (2, 4, 8):
        one.turn(TRIAL, 'a probe connected', 10)
        assert 'is down' in fail(one, LATE, 10)
        assert 0.799 * wanted <= one.probe_at - 10 <= 1.201 * wanted


def test_what_was_in_flight_when_it_went_down_no_longer_counts() -> None:
    one = service()
    old = [one.begin(0) for _ in range(5)]
    fail(one, REFUSED, 1)
    one.turn(TRIAL, 'a probe connected', 2)
    for slot in old[:3]:
        assert one.fail(LATE, b'', slot, 3) == ''
    assert one.answered(old[3], b'dunno', 3) == ''
    one.leave(old[4])
    assert (one.state, one.in_flight) == (TRIAL, 0)


def test_a_service_without_a_worker_for_one_more_is_asked_less_and_told_once() -> None:
    one = service()
    one.proven = 5
    assert one.starve(5, b'', 30) == '', 'it may have been one slow request'
    assert one.learned == 100
    advice = one.starve(5, b'', 30)
    assert 'no more than 5' in advice and "set its max" in advice and ':5' in advice
    assert (one.cap, one.limit) == (100, 5)
    assert one.starve(5, b'', 30) == '', 'of the same burst'
    one.relearn(30 + RELEARN_FIRST - 1)
    assert one.limit == 5
    one.relearn(30 + RELEARN_FIRST)
    assert one.limit == 6
    assert 'no more than 5' in one.starve(5, b'', 100), 'the raise was wrong'
    one.relearn(100 + 2 * RELEARN_FIRST - 1)
    assert one.limit == 5, 'the next raise comes after twice the time'
    one.relearn(100 + 2 * RELEARN_FIRST)
    assert one.limit == 6


def test_one_message_or_a_service_that_keeps_no_connection_teaches_nothing_of_its_workers() -> None:
    one = service()
    for _ in range(3):
        assert one.starve(5, b'poison', 30) == ''
    for instance in (b'a', b'b', b'c'):
        assert one.starve(0, instance, 31) == ''
    assert one.learned == 100
    assert one.starve(5, b'd', 32)


@pytest.mark.parametrize(('reason', 'learned'), [(REFUSED, 100), (UNREACHABLE, 100), (DROPPED, 5)])
def test_what_was_learned_of_a_service_is_forgotten_with_its_process(reason: str, learned: int) -> None:
    one = service()
    one.starve(5, b'', 30)
    one.starve(5, b'', 30)
    while one.state is UP:
        fail(one, reason, 40)
    assert one.learned == learned


def test_it_grows_to_twice_what_is_proven() -> None:
    one = service()
    one.resize()
    assert one.limit == 1
    limits = []
    for _ in range(4):
        slots = [one.begin(0) for _ in range(one.limit)]
        for served, slot in enumerate(slots, 1):
            one.answered(slot, b'dunno', 0)
            one.prove(slot, served)
        limits.append(one.limit)
    assert limits == [2, 4, 8, 16]


class Steady(Service):
    """A service without jitter: the model has to behave the same when it is run again."""

    @staticmethod
    def jitter() -> float:
        return 1.0


class Model(RuleBasedStateMachine):
    """Three services under random faults; each request is driven as Proxy.decide() drives it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        sizes = [('a', 3, 3), ('b', 5, 2), ('c', 100, 1)]
        self.services = [Steady(name, Address(0, 'h', 1), weight=weight, maximum=most) for name, most, weight in sizes]
        self.balancer = Balancer(self.services)
        self.flying: list[Slot] = []
        self.went_down: dict[Service, float] = {}
        self.count = 0

    def note(self, one: Service, text: str) -> None:
        if text:
            self.balancer.lay_out(one)
            if one.state is DOWN:
                self.went_down[one] = self.now

    @rule(same=st.booleans())
    def ask(self, same: bool) -> None:
        self.count += not same
        chosen = self.balancer.choose(b'%d' % self.count, (), self.now)
        if chosen is None:
            lively = self.balancer.lively((), self.now)
            assert all(one.in_flight >= one.cap or (lively and one.stalled(self.now)) for one in self.services), (
                'a request found no room although there was'
            )
        elif chosen.in_flight < chosen.limit:
            assert chosen.state is not DOWN
            self.flying.append(chosen.begin(self.now))

    @precondition(lambda self: self.flying)
    @rule(pick=st.randoms(use_true_random=False))
    def be_answered(self, pick: object) -> None:
        slot = self.flying.pop(pick.randrange(len(self.flying)))  # type: ignore[attr-defined]
        self.note(slot[0], slot[0].answered(slot, b'dunno', self.now))
        slot[0].prove(slot, 0)

    @precondition(lambda self: self.flying)
    @rule(
        pick=st.randoms(use_true_random=False),
        reason=st.sampled_from([REFUSED, LATE, INVALID, DROPPED, STARVED, DEADLINE]),
        instance=st.sampled_from([b'', b'x', b'y']),
    )
    def fail(self, pick: object, reason: str, instance: bytes) -> None:
        slot = self.flying.pop(pick.randrange(len(self.flying)))  # type: ignore[attr-defined]
        one = slot[0]
        before = one.state
        self.note(one, one.fail(reason, instance, slot, self.now))
        assert before is one.state or one.state is DOWN

    @precondition(lambda self: self.flying)
    @rule(pick=st.randoms(use_true_random=False))
    def be_abandoned(self, pick: object) -> None:
        slot = self.flying.pop(pick.randrange(len(self.flying)))  # type: ignore[attr-defined]
        slot[0].leave(slot)

    @rule(seconds=st.floats(0, 40), connects=st.booleans())
    def pass_time(self, seconds: float, connects: bool) -> None:
        self.now += seconds
        for one in self.services:
            if one.state is DOWN and one.probe_at <= self.now:
                if connects:
                    self.note(one, one.turn(TRIAL, 'a probe connected', self.now))
                else:
                    one.probe_failed(self.now)
            one.relearn(self.now)

    @rule()
    def share_exactly(self) -> None:
        """Among the services that are up and free, the next cycles are shared by weight."""
        free = [one for one in self.services if one.in_flight < one.cap and not one.stalled(self.now)]
        up = [one for one in free if one.state is UP]
        if len(up) < 2 or up != free:
            return
        self.balancer.lay_out(up[0])
        cycle = sum(one.weight for one in up)
        counted = Counter(chosen.name for _ in range(2 * cycle) if (chosen := self.balancer.choose(b'', (), self.now)))
        assert counted == {one.name: 2 * one.weight for one in up}

    @invariant()
    def slots_are_counted(self) -> None:
        for one in self.services:
            mine = sum(1 for other, generation, _ in self.flying if other is one and generation == one.generation)
            assert one.in_flight == mine <= one.max

    @invariant()
    def one_trial_at_a_time(self) -> None:
        for one in self.services:
            if one.state is TRIAL:
                assert one.in_flight <= 1 and one.limit == 1
            if one.state is DOWN:
                assert one.in_flight == 0 and one.limit == 0

    @invariant()
    def every_down_service_is_tried_again(self) -> None:
        for one in self.services:
            if one.state is DOWN:
                assert one.probe_at <= self.now + 1.201 * PROBE_LAST


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_where_our_own_ports_are_used_up_it_is_no_failure_of_the_service() -> None:
    error = OSError(errno.EADDRNOTAVAIL, 'Cannot assign requested address')
    assert connect_failure(error, socket.AF_INET).reason == DESCRIPTORS
    assert connect_failure(error, socket.AF_INET6).reason == UNREACHABLE, 'there is no IPv6 here'
    assert connect_failure(error, socket.AF_UNSPEC).reason == UNREACHABLE

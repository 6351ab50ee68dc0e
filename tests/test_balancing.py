"""Balancing: exact shares over each cycle, prios as numbers, affinity by instance."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from hapolicy_gevent import DOWN, MAX_INSTANCES, REFUSED, TRIAL, UP, Address, Balancer, Service

ADDRESS = Address(0, 'h', 1)


def service(name: str, prio: int = 10, weight: int = 1, maximum: int = 1000) -> Service:
    return Service(name, ADDRESS, prio, weight, 30, maximum)


def turn(balancer: Balancer, instance: bytes = b'', now: float = 0) -> str:
    """Let a request be chosen for, asked and answered."""
    chosen = balancer.choose(instance, (), now)
    assert chosen is not None
    chosen.answered(chosen.begin(now), b'dunno', now)
    return chosen.name


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5])
def test_every_weight_set_is_shared_exactly_over_each_cycle(size: int) -> None:
    for weights in itertools.combinations_with_replacement(range(1, 6 if size < 5 else 4), size):
        services = [service(str(i), weight=weight) for i, weight in enumerate(weights)]
        balancer = Balancer(services)
        for _ in range(2):
            counted = Counter(turn(balancer) for _ in range(sum(weights)))
            assert [counted[str(i)] for i in range(size)] == list(weights)


def test_turns_are_interleaved() -> None:
    balancer = Balancer([service('a', weight=5), service('b'), service('c')])
    assert ''.join(turn(balancer) for _ in range(7)) == 'aabacaa'


def test_prios_are_numbers_and_the_lowest_wins() -> None:
    balancer = Balancer([service('ten', 10), service('hundred', 100), service('nine', 9)])
    tried: list[Service] = []
    order = []
    while (chosen := balancer.choose(b'', tried, 0)) is not None:
        order.append(chosen.name)
        tried.append(chosen)
    assert order == ['nine', 'ten', 'hundred']


def test_the_requests_of_a_message_go_to_the_service_of_its_first() -> None:
    balancer = Balancer([service('a'), service('b')])
    for i in range(50):
        instance = b'%d' % i
        assert len({turn(balancer, instance) for _ in range(7)}) == 1
    assert Counter(turn(balancer, b'm%d' % i) for i in range(100)) == {'a': 50, 'b': 50}


def test_requests_without_an_instance_are_balanced_alone() -> None:
    balancer = Balancer([service('a'), service('b')])
    assert Counter(turn(balancer) for _ in range(10)) == {'a': 5, 'b': 5}


def test_a_message_leaves_a_service_that_goes_down_or_was_tried() -> None:
    a, b = service('a'), service('b')
    balancer = Balancer([a, b])
    assert turn(balancer, b'm') == 'a'
    assert balancer.choose(b'm', [a], 0) is b
    a.fail(REFUSED, b'', a.begin(0), 0)
    assert a.state is DOWN
    assert turn(balancer, b'm') == 'b'
    assert turn(balancer, b'm') == 'b'


def test_the_table_of_messages_is_bounded_and_forgets_the_oldest() -> None:
    balancer = Balancer([service('a'), service('b')])
    for i in range(5 * MAX_INSTANCES):
        turn(balancer, b'%d' % i)
    assert len(balancer._bound) <= 2 * MAX_INSTANCES
    assert b'0' not in balancer._bound and b'%d' % i in balancer._bound


def test_a_full_service_is_passed_over_and_waited_for_when_all_are_full() -> None:
    a, b = service('a', maximum=2), service('b', maximum=1)
    balancer = Balancer([a, b])
    for _ in range(3):
        chosen = balancer.choose(b'', (), 0)
        assert chosen is not None
        chosen.begin(0)
    assert (a.in_flight, b.in_flight) == (2, 1)
    assert balancer.choose(b'', (), 0) is None
    assert balancer.others(())
    assert balancer.others([a]) and not balancer.others([a, b])


def test_a_stalled_service_gets_requests_only_when_no_other_can_take_them() -> None:
    a, b = service('a'), service('b', prio=20)
    balancer = Balancer([a, b])
    slot = a.begin(0)
    assert balancer.choose(b'', (), 4.9) is a
    assert balancer.choose(b'', (), 5.1) is b
    assert balancer.choose(b'', [b], 5.1) is a
    assert a.state is UP
    a.answered(slot, b'dunno', 6)
    assert balancer.choose(b'', (), 7) is a


def test_a_service_that_returns_gets_no_burst() -> None:
    a, b = service('a'), service('b')
    balancer = Balancer([a, b])
    a.fail(REFUSED, b'', a.begin(0), 0)
    balancer.lay_out(a)
    assert [turn(balancer) for _ in range(100)] == ['b'] * 100
    a.turn(TRIAL, 'a probe connected', 1)
    balancer.lay_out(a)
    assert Counter(turn(balancer) for _ in range(10)) == {'a': 5, 'b': 5}

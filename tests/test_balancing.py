"""Balancing: exact shares over each cycle, prios as numbers, affinity by instance."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest

from hapolicy_gevent import (
    DOWN,
    MAX_INSTANCES,
    TRIAL,
    UP,
    Address,
    Balancer,
    Connection,
    Log,
    Pool,
    Queue,
    Service,
)
from tests.support import (
    Peer,
    ProxyProcess,
    attributes,
    echo,
    in_threads,
    is_check,
    new_instance,
    request,
    stubs,
)


def balancing(*services: Service) -> tuple[Balancer, list[Pool]]:
    """Return the balancer of services, each with idle connections enough, and their pools."""
    queue = Queue(services, Log())
    pools = list(queue.pools.values())
    for pool in pools:
        pool.checker.spawn = lambda check: None  # type: ignore[method-assign]
        pool.idle = [Connection(pool, 0) for _ in range(3)]
    return queue.balancer, pools


def service(name: str, prio: int = 10, weight: int = 1, maximum: int = 1000) -> Service:
    return Service(name, Address(0, 'h', 1), prio, weight, 30, maximum)


def choose(balancer: Balancer, instance: bytes = b'', now: float = 0) -> str:
    chosen = balancer.choose(instance, (), now)
    assert chosen is not None
    if instance:
        balancer.bound[instance] = chosen
    return chosen.service.name


@pytest.mark.parametrize('key', [b'', b'a key'])
def test_each_service_is_looked_at_once_where_none_is_ready(key: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer, pools = balancing(service('A', weight=256), service('B', weight=255), service('C', weight=1))
    looked: list[Pool] = []
    monkeypatch.setattr(Pool, 'ready', lambda pool, *_: looked.append(pool))
    for pool in pools:
        pool.idle = []
    for _ in range(2):
        chosen = balancer.choose(b'', (), 0, key)
        assert (chosen in pools) if key else (chosen is None)
    assert Counter(looked) == dict.fromkeys(pools, 2), 'other requests wait meanwhile'


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5])
def test_every_weight_set_is_shared_exactly_over_each_cycle(size: int) -> None:
    for weights in itertools.combinations_with_replacement(range(1, 6 if size < 5 else 4), size):
        balancer, _ = balancing(*[service(str(i), weight=weight) for i, weight in enumerate(weights)])
        for _ in range(2):
            counted = Counter(choose(balancer) for _ in range(sum(weights)))
            assert [counted[str(i)] for i in range(size)] == list(weights)


def test_turns_are_interleaved() -> None:
    balancer, _ = balancing(service('a', weight=5), service('b'), service('c'))
    assert ''.join(choose(balancer) for _ in range(7)) == 'aabacaa'


def test_prios_are_numbers_and_the_lowest_wins() -> None:
    balancer, _ = balancing(service('ten', 10), service('hundred', 100), service('nine', 9))
    tried: list[Pool] = []
    while (chosen := balancer.choose(b'', tried, 0)) is not None:
        tried.append(chosen)
    assert [pool.service.name for pool in tried] == ['nine', 'ten', 'hundred']


def test_the_requests_of_a_message_go_to_the_service_of_its_first() -> None:
    balancer, _ = balancing(service('a'), service('b'))
    for i in range(50):
        assert len({choose(balancer, b'%d' % i) for _ in range(7)}) == 1
    assert Counter(choose(balancer, b'm%d' % i) for i in range(100)) == {'a': 50, 'b': 50}


def test_requests_without_an_instance_are_balanced_alone() -> None:
    balancer, _ = balancing(service('a'), service('b'))
    assert Counter(choose(balancer) for _ in range(10)) == {'a': 5, 'b': 5}


def test_a_message_leaves_a_service_that_goes_down_or_was_tried() -> None:
    balancer, (a, b) = balancing(service('a'), service('b'))
    assert choose(balancer, b'm') == 'a'
    assert balancer.choose(b'm', [a], 0) is b
    a.service.turn(DOWN, 'refused', 0)
    assert [choose(balancer, b'm') for _ in range(2)] == ['b', 'b']


def test_the_table_of_messages_is_bounded_and_forgets_the_oldest() -> None:
    balancer, _ = balancing(service('a'), service('b'))
    for i in range(3 * MAX_INSTANCES):
        choose(balancer, b'%d' % i)
        if i % 10000 == 0:
            balancer.forget()
    assert len(balancer.bound) <= MAX_INSTANCES + 10000
    assert b'0' not in balancer.bound and b'%d' % i in balancer.bound


def test_a_service_without_room_is_passed_over_and_all_are_waited_for_when_none_has_room() -> None:
    balancer, (a, b, c) = balancing(service('a', maximum=3), service('b', maximum=3), service('c', prio=20))
    a.busy, a.idle = dict.fromkeys(a.idle), []
    assert [choose(balancer) for _ in range(3)] == ['b'] * 3
    b.busy, b.idle = dict.fromkeys(b.idle), []
    assert balancer.choose(b'', (), 0) is None, 'the next prio is for requests that have waited'
    assert balancer.candidates(None, (), 0, 0) == [a, b]
    assert balancer.candidates(None, (), 0.1, 0) == [a, b, c]
    assert balancer.candidates(None, [a, b], 0, 0) == [c]


def test_a_stalled_service_gets_mail_only_when_no_other_can_take_it() -> None:
    balancer, (a, b) = balancing(service('a'), service('b', prio=20))
    a.busy[a.idle.pop()] = None
    assert choose(balancer, now=4.9) == 'a'
    assert choose(balancer, now=5.1) == 'b'
    assert balancer.candidates(None, (), 0.2, 5.1) == [b]
    assert balancer.candidates(None, [b], 0, 5.1) == [a]
    assert balancer.candidates(None, (), 1, 5.1) == [a, b], 'the last hope: one slow message may be all that it has'
    a.service.answered(b'DUNNO', 0, True, 6)
    assert choose(balancer, now=7) == 'a'


def test_a_service_that_returns_gets_no_burst() -> None:
    balancer, (a, _) = balancing(service('a'), service('b'))
    a.service.turn(DOWN, 'refused', 0)
    assert [choose(balancer) for _ in range(100)] == ['b'] * 100
    a.service.check_passed(1)
    a.idle = [Connection(a, 0)]
    assert Counter(choose(balancer) for _ in range(10)) == {'a': 5, 'b': 5}


def test_a_message_goes_to_the_same_service_after_its_smtpd_has_connected_anew() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        for instance in map(str, range(6)):
            servers = set()
            for _ in range(3):
                with proxy.client() as client:
                    servers.add(client.ask(request(instance=instance)).split()[-1])
            assert len(servers) == 1


def test_a_mail_that_failed_elsewhere_is_no_trial_while_another_service_is_up() -> None:
    balancer, (a, b, c) = balancing(service('a'), service('b'), service('c', prio=20))
    b.service.turn(TRIAL, 'its check passed', 0)
    assert balancer.choose(b'', [a], 0) is c, 'a second one that fails would take the rest of its time'
    assert balancer.candidates(None, [a], 0, 0) == [c], 'nor does it wait for one'
    assert balancer.candidates(None, [a, c], 0, 0) == [b]
    c.service.turn(DOWN, 'refused', 0)
    a.service.turn(DOWN, 'refused', 0)
    assert balancer.choose(b'', [a], 0) is b


def test_on_trial_a_service_has_one_mail_at_a_time_and_some_where_no_other_is_up() -> None:
    _, (a, b) = balancing(service('a'), service('b'))
    a.service.turn(TRIAL, 'its check passed', 0)
    assert (a.places, b.places) == (1, 1000)
    b.service.turn(DOWN, 'refused', 0)
    assert (a.places, b.places) == (5, 0)
    a.service.answered(b'DUNNO', 0, True, 1)
    assert (a.service.state, a.places) == (UP, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sessions', 'messages', 'pause', 'start'), [(9, 30, 0.1, 0), (40, 10, 0.4, 0), (20, 8, 0.1, 0.3)]
)
def test_the_recipients_of_a_message_meet_the_connection_that_knows_it(
    sessions: int, messages: int, pause: float, start: float,
) -> None:  # fmt: skip
    seen: dict[str, set[int]] = {}

    def behave(peer: Peer, message: bytes) -> None:
        if is_check(message):
            time.sleep(start)  # of a process for each connection
        else:
            seen.setdefault(attributes(message)['instance'], set()).add(id(peer))
        echo(peer, message)

    with stubs(behave) as (a,), ProxyProcess('-s', a.service) as proxy:

        def session(_: int) -> None:
            with proxy.client() as client:
                for _ in range(messages):
                    instance = new_instance()
                    for state in ('RCPT', 'RCPT', 'RCPT', 'DATA'):
                        client.ask(request(instance=instance, protocol_state=state))
                        time.sleep(random.random() * pause)

        session(0)
        assert [len(peers) for peers in seen.values()] == [1] * messages
        in_threads(sessions, session)
    split = sum(len(peers) > 1 for peers in seen.values())
    assert len(seen) == (sessions + 1) * messages
    assert split < 0.05 * len(seen), f'{split} of {len(seen)} messages met several connections'


def test_a_message_spread_over_client_connections_goes_to_one_service() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        with proxy.client() as one, proxy.client() as two:
            for _ in range(20):
                message = request(instance=new_instance())
                assert one.ask(message) == two.ask(message)

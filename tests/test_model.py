"""A model of the core: the real Proxy, Queue, Pools and Balancer under an artificial clock and artificial servers.

Requests are greenlets that stop where they would wait; the model decides what each server does with a check or a
mail, and when time passes. HAPOLICY_TEST_MODEL gives the number of examples.
"""

from __future__ import annotations

import itertools
import math
import os
import time as real_time
from collections.abc import Collection
from typing import Any

import gevent
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hapolicy_gevent
from hapolicy_gevent import (
    BACKOFF_MAX,
    CHECK,
    DOWN,
    DROPPED,
    ENDED,
    INVALID,
    LATE,
    REFUSED,
    RESET,
    TICK,
    UP,
    Balancer,
    Client,
    ClientFault,
    Connection,
    Ended,
    Log,
    Pool,
    Proxy,
    Queue,
    ServiceFailure,
    Sticky,
    parse_service,
    parse_sticky,
)

EXAMPLES = int(os.environ.get('HAPOLICY_TEST_MODEL', '60'))
DEADLINE = 20.0
#: Kinds of servers: what each does is in Model.serve().
WELL, DEAD, STOPPED = 'well', 'dead', 'stopped'
KINDS = (WELL, WELL, DEAD, STOPPED, 'hangs with mail', 'hangs up on mail', 'cannot be checked', 'serves two',
         'once each')  # fmt: skip


class Clock:
    """Stands for the module `time` in the program."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(real_time, name)


class ModelConnection(Connection):
    """A connection without a socket: `dead` says that the server has ended it."""

    __slots__ = ('dead',)

    def begin(self, now: float) -> None:
        super().begin(now)
        self.dead = False
        self.poll = lambda timeout: [(0, 0x2001)] if self.dead else []  # POLLIN | POLLRDHUP

    def look(self, flags: int = 0) -> str:
        return ENDED if self.dead else ''

    def ask(self, request: bytes, left: float = math.inf) -> bytes:
        """Stop the request until the model's server does something with it."""
        assert isinstance(self.pool.queue, ModelQueue)
        model = self.pool.queue.model
        try:
            return model.ask(self, min(left, self.pool.service.timeout), request is CHECK)
        except AssertionError as fault:  # the program would take it for a fault of its own
            model.faults.append(fault)
            raise

    def listen(self, seconds: float) -> str:
        return self.look()

    def close(self) -> None:
        self.dead = True


class ModelClient(Client):
    """A client without a socket."""

    __slots__ = ('answers', 'event')

    def __init__(self) -> None:
        self.instance, self.key, self.connection = b'', b'', None
        self.asked, self.ended = 0.0, False
        self.answers: list[bytes] = []
        self.user = getcurrent()
        self.waits_for, self.given = (), None

    @property  # type: ignore[override]
    def woken(self) -> ModelEvent:
        return self.event

    @woken.setter
    def woken(self, _: object) -> None:
        self.event = ModelEvent()

    def answer(self, action: bytes) -> None:
        self.answers.append(action)


class ModelEvent:
    """Stops a request where it would sleep."""

    model: Model

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def clear(self) -> None:
        self.is_set = False

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.model.stop(lambda: self.is_set, self.model.clock.now + seconds)


class ModelQueue(Queue):
    """Sees that the first come is the first served."""

    model: Model

    def hand_over(self, pool: Pool, now: float) -> None:
        before = [*pool.waiting]
        super().hand_over(pool, now)
        served = [client.given is not None for client in before]
        assert served == sorted(served, reverse=True), 'one that came later was served first'


class Request:
    """A request under way: a greenlet, when it may go on, and whom it asked."""

    def __init__(self, model: Model, client: ModelClient) -> None:
        self.model, self.client = model, client
        self.began = client.asked = model.clock.now
        self.asked: list[Pool] = []
        self.retried = False
        self.asking: tuple[Connection, float] | None = None  # by which connection, and until when
        self.checks = False  # whether it asks the check, before it is sent again to a full server
        self.outcome: bytes | ServiceFailure | None = None
        self.ready: Any = lambda: True
        self.until = 0.0
        self.greenlet = greenlet(self._run)

    def _run(self) -> None:
        client = self.client
        request = b'request=smtpd_access_policy\ninstance=%s\n\n' % next(self.model.instances)
        if client.instance and self.model.again:
            request = b'request=smtpd_access_policy\ninstance=%s\n\n' % client.instance
        try:
            self.model.proxy.decide(request, client, self.model.clock.now)
        except ClientFault:
            client.ended = True


class Model(RuleBasedStateMachine):
    """Clients, servers, and the proxy between."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.saved = hapolicy_gevent.time, hapolicy_gevent.Connection  # type: ignore[attr-defined]
        hapolicy_gevent.time = self.clock  # type: ignore[assignment, attr-defined]
        hapolicy_gevent.Connection = ModelConnection  # type: ignore[misc]
        ModelEvent.model = self
        self.instances = (b'm%d' % i for i in itertools.count())
        self.requests: list[Request] = []
        self.again = False
        self.kinds: dict[Pool, str] = {}
        self.answered = 0
        self.faults: list[AssertionError] = []
        self.past_its_own = False  # a mail went past the service that is its own by Sticky

    @initialize(
        sizes=st.lists(
            st.tuples(st.sampled_from([10, 20]), st.integers(1, 3), st.sampled_from([1, 2, 6, 100])),
            min_size=1, max_size=3),
        kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
        sticky=st.booleans(),
    )  # fmt: skip
    def start(self, sizes: list[tuple[int, int, int]], kinds: list[str], sticky: bool) -> None:
        services = [parse_service(f'{name}=unix:/{name}:{prio}:{weight}:5:{maximum}')
                    for name, (prio, weight, maximum) in zip('ABC', sizes, strict=False)]  # fmt: skip
        hapolicy_gevent.Queue, queue = ModelQueue, Queue  # type: ignore[misc]
        try:
            self.proxy = Proxy(services, b'default', b'failed', DEADLINE, Log())
        finally:
            hapolicy_gevent.Queue = queue  # type: ignore[misc]
        self.queue = self.proxy.queue
        if sticky:
            self.queue.balancer.sticky = parse_sticky('instance', '--sticky')
        self.queue.balancer.choose = self.choose  # type: ignore[method-assign]
        assert isinstance(self.queue, ModelQueue)
        self.queue.model = self
        self.pools = list(self.proxy.pools.values())
        for pool, kind in zip(self.pools, kinds, strict=False):
            pool.checker.spawn = lambda check: self  # type: ignore[method-assign]
            self.kinds[pool] = kind
        self.clients = [ModelClient() for _ in range(8)]
        self.idle = list(self.clients)
        self.tick()

    def tick(self) -> None:
        for pool in self.pools:
            pool.checker.watch(self.clock.now)

    def kill(self, block: bool) -> None:
        """Stands for the kill() of a check's greenlet."""

    # -- greenlets

    def stop(self, ready: Any, until: float) -> None:
        """Stop the request that runs until something holds, or so late."""
        request = next(each for each in self.requests if each.greenlet is getcurrent())
        request.ready, request.until = ready, until
        self.main.switch()

    def ask(self, connection: Connection, seconds: float, checks: bool) -> bytes:
        """Stop the request that runs until its server did something, or it is late."""
        request = next(each for each in self.requests if each.greenlet is getcurrent())
        pool = connection.pool
        assert not connection.dead, 'mail rides on a connection that has ended'  # type: ignore[attr-defined]
        assert connection in pool.busy
        request.checks = checks
        if checks:
            assert pool.checker.full and pool is request.asked[-1]
        elif pool in request.asked:
            assert request.asked[-1] is pool and not request.retried, 'asked twice'
            request.retried = True
        else:
            request.asked.append(pool)
            request.retried = False
        until = self.clock.now + seconds
        request.asking, request.outcome = (connection, until), None
        try:
            self.stop(lambda: request.outcome is not None, until)
        finally:
            request.asking = None
        outcome = request.outcome
        if outcome is None:
            raise ServiceFailure(LATE, 'no answer')
        if isinstance(outcome, ServiceFailure):
            raise outcome
        return outcome

    def choose(self, instance: bytes, tried: Collection[Pool], now: float, key: bytes = b'') -> Pool | None:
        """Have the balancer choose; note if it passed over a service that could have the mail by Sticky's order."""
        balancer = self.queue.balancer
        chosen = Balancer.choose(balancer, instance, tried, now, key)
        if key and chosen is not None:
            there = [pool for pool in balancer.pools if pool.service.prio == chosen.service.prio and pool.places]
            order = Sticky.order(key, there)
            self.past_its_own |= any(pool.idle and len(pool.busy) < pool.places and pool not in tried
                                     and not pool.stalled(now) for pool in order[: order.index(chosen)])  # fmt: skip
        return chosen

    def run(self) -> None:
        """Let all go on that may."""
        again = True
        while again:
            again = False
            for request in list(self.requests):
                if request.ready() or self.clock.now >= request.until:
                    request.ready, again = (lambda: False), True
                    request.until = 1e12
                    self.main = getcurrent()
                    request.greenlet.switch()
                if request.greenlet.dead:
                    self.end(request)

    def end(self, request: Request) -> None:
        if request not in self.requests:
            return
        self.requests.remove(request)
        client = request.client
        if not client.ended:
            assert len(client.answers) == 1, 'one answer to a request'
            assert self.clock.now <= request.began + DEADLINE + TICK
            in_line = (1 - hapolicy_gevent.ANSWER_PART) * DEADLINE - 1  # seconds that it may wait for a connection
            early = self.clock.now < request.began + in_line
            if client.answers == [b'default'] and not request.asked and early:
                for pool in self.pools:
                    assert pool.service.state is not UP, 'a default while a service is up that was not asked'
                    assert len(pool.busy) >= pool.places or pool.checker.running or not pool.places
        self.answered += 1
        client.answers.clear()
        if client.ended and client.connection is not None:
            client.connection.pool.let_go(client.connection, client, self.clock.now)
            client.connection = None
        client.ended = False
        self.idle.append(client)

    # -- what happens

    @precondition(lambda self: self.idle)
    @rule(again=st.booleans(), count=st.integers(1, 4))
    def arrive(self, again: bool, count: int) -> None:
        for _ in range(min(count, len(self.idle))):
            self.again = again
            request = Request(self, self.idle.pop())
            self.requests.append(request)
            self.run()

    def served(self, pool: Pool) -> list[Any]:
        """What a server has that serves two connections: the eldest."""
        there = [*pool.held, *pool.idle, *pool.busy, *pool.checker.running]
        return sorted(there, key=lambda connection: connection.expires)[:2]

    @rule()
    def servers_serve(self) -> None:
        for pool in self.pools:
            kind = self.kinds[pool]
            if kind in (STOPPED,):
                continue
            for check in list(pool.checker.running):
                if check in pool.checker.running:
                    self.serve_check(pool, kind, check)
            for request in list(self.requests):
                if request.asking is not None and request.asking[0].pool is pool and request.outcome is None:
                    self.serve_mail(kind, request)
            self.run()

    def serve_check(self, pool: Pool, kind: str, check: Connection) -> None:
        now, checker = self.clock.now, pool.checker
        if kind is DEAD:
            checker.failed(check, ServiceFailure(REFUSED, 'refused'), now)
        elif kind == 'cannot be checked':
            checker.failed(check, ServiceFailure(DROPPED, 'hung up'), now)
        elif kind != 'serves two' or check in self.served(pool):
            check.used = True
            pool.service.check_answered(check.since, now)
            checker.passed(check, ENDED if kind == 'once each' else '', now)

    def serve_mail(self, kind: str, request: Request) -> None:
        assert request.asking is not None
        connection = request.asking[0]
        again = connection.used
        if request.checks and kind in ('cannot be checked', 'hangs up on mail', 'hangs with mail'):
            kind = DEAD if kind == 'cannot be checked' else WELL
        if kind is DEAD:
            request.outcome = (Ended if again else ServiceFailure)(DROPPED, 'ended')
        elif kind == 'hangs up on mail':
            request.outcome = (Ended if again else ServiceFailure)(DROPPED, 'hung up')
        elif kind == 'serves two' and connection not in self.served(connection.pool):
            return
        elif kind != 'hangs with mail':
            request.outcome = b'DUNNO'
            connection.used = True
            connection.spent = ENDED if kind == 'once each' else ''

    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def a_server_changes(self, data: Any, kind: str) -> None:
        pool = data.draw(st.sampled_from(self.pools))
        self.kinds[pool] = kind
        if kind is DEAD:
            for connection in [*pool.idle, *pool.held]:
                connection.dead = True

    @rule(data=st.data(), seen=st.booleans())
    def an_idle_connection_ends(self, data: Any, seen: bool) -> None:
        pool = data.draw(st.sampled_from(self.pools))
        if connections := [*pool.idle, *pool.held]:
            connection = data.draw(st.sampled_from(connections))
            connection.dead = True
            if seen:
                pool.drop(connection, ENDED)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def a_request_is_answered_wrongly(self, data: Any) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if request.asking is not None:
            request.outcome = ServiceFailure(INVALID, 'rubbish')
            self.run()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def a_client_leaves(self, data: Any) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.main = getcurrent()
        request.greenlet.throw(ClientFault(RESET))
        assert request.greenlet.dead
        self.end(request)
        self.run()

    @rule(seconds=st.sampled_from([0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += TICK
            self.run()
            for pool in self.pools:
                for check in list(pool.checker.running):
                    if self.clock.now - check.since >= pool.service.timeout:
                        pool.checker.failed(check, ServiceFailure(LATE, 'no answer'), self.clock.now)
            self.tick()
            if int(self.clock.now) != int(self.clock.now - TICK):
                self.proxy._each_second(self.clock.now)
            self.run()

    @rule()
    def all_comes_to_rest(self) -> None:
        for _ in range(60):
            if not self.requests:
                break
            self.servers_serve()
            self.time_passes(0.5)
        assert not self.requests, 'some request was never answered'
        for pool in self.pools:
            assert not pool.busy and not pool.waiting, 'a place is lost'

    @rule()
    def a_well_server_is_found_again(self) -> None:
        self.all_comes_to_rest()
        for pool in self.pools:
            self.kinds[pool] = WELL
        for _ in range(80):
            self.time_passes(0.5)
            self.servers_serve()
        for pool in self.pools:
            assert pool.service.state is not DOWN, 'a server that is well stays down'
        for _ in range(2 * len(self.pools)):
            self.arrive(False, 1)
            for _ in range(12):
                self.servers_serve()
                self.time_passes(0.2)
        assert any(pool.service.state is UP for pool in self.pools)

    # -- what must hold

    @invariant()
    def nothing_was_asked_that_may_not_be(self) -> None:
        if self.faults:
            raise self.faults[0]

    @invariant()
    def a_mail_meets_its_own_service(self) -> None:
        assert not self.past_its_own

    @invariant()
    def bounds(self) -> None:
        for pool in getattr(self, 'pools', ()):
            assert pool.open + len(pool.checker.running) <= pool.service.max
            connections = [*pool.held, *pool.idle, *pool.busy, *pool.checker.running]
            assert len(connections) == len(set(connections)), 'a connection is in two places'

    @invariant()
    def a_down_service_is_checked_again(self) -> None:
        for pool in getattr(self, 'pools', ()):
            if pool.service.state is DOWN:
                checker = pool.checker
                assert checker.running or checker._failed_at + BACKOFF_MAX * 1.2 >= self.clock.now

    @invariant()
    def in_flight_is_what_is_asked(self) -> None:
        asked = [request.asking[0] for request in self.requests if request.asking is not None]
        for pool in getattr(self, 'pools', ()):
            assert set(pool.busy) <= set(asked), 'busy, and nobody asks by it'

    def teardown(self) -> None:
        for request in list(self.requests):
            self.main = getcurrent()
            request.greenlet.throw(ClientFault(RESET))
        hapolicy_gevent.time, hapolicy_gevent.Connection = self.saved  # type: ignore[attr-defined, misc]
        gevent.get_hub().loop.update_now()


Model.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None,
                                   suppress_health_check=list(HealthCheck),
                                   phases=[Phase.explicit, Phase.reuse, Phase.generate])  # fmt: skip
TestModel = Model.TestCase

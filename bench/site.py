"""How often is mail greylisted when a site has several MX hosts and several greylists, and those die and return?

Usage:
  site [options]
  site -h | --help

Simulates two days of mail, of which the first teaches the greylists and the second counts. It runs the program's own
Balancer, one for each MX host; servers, senders and time are made up:

- A greylist defers what it has not known for 300 s, as postgrey: by client network, sender and recipient. What it
  knows it keeps, also while it is down.
- A sender tries any MX host at each try, and again after a deferral as its kind does, or up to a fifth later: half of
  the clients after 5, 10, 20, 40 and then each 67 minutes (Postfix), three in ten each 15 minutes (Exim), the others
  each 30 minutes (sendmail -q30m).
- Each server is up for 12 hours on average and then down for 20 minutes (both exponential). An MX host finds out by a
  refused connection, and finds it up again within 30 s, by a check. A central database fails as often as a server.
- 80 % of the mail is from 200 senders, as bench/traffic.py has it. A mail is judged by the first server that is up;
  where none is, it passes without being judged.

Run from the project's folder: python -m bench.site

Options:
  --mx=N          MX hosts [default: 3]
  --servers=N     policy servers [default: 2]
  --mails=N       mails a day [default: 20000]
  --runs=N        runs of two days, each with mail and failures of its own [default: 5]
  --json=FILE     write the figures to a file, for bench.draw
  -h, --help      show this text
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docopt import docopt

from bench import traffic
from bench.traffic import Mail
from hapolicy_gevent import DOWN, Connection, Log, Pool, Queue, parse_service, parse_sticky

DAY = 86400.0
#: Seconds that a greylist defers what it does not know: postgrey's default.
GREYLISTED = 300.0
#: Seconds between failures of a server, and that it is down, both on average.
UP, OUTAGE = 12 * 3600.0, 20 * 60.0
#: Seconds within which a check finds a server up again; where none is up.
FOUND, FOUND_ALONE = 30.0, 1.0
#: Seconds from try to try of each kind of sender, the last again and again; and how many of ten clients are of that.
RETRIES = (((300.0, 600.0, 1200.0, 2400.0, 4000.0), 5), ((900.0,), 3), ((1800.0,), 2))
KINDS = [pauses for pauses, part in RETRIES for _ in range(part)]
ATTRIBUTES = 'client_address/24/64,sender,recipient'
#: Seconds of a step of the picture.
STEP = 1200.0


@dataclass
class Setup:
    """What a site may have: services of one prio or of one each, sticky or not, with a database each or one for all."""

    name: str
    servers: int
    prios: bool = False
    sticky: bool = False
    central: bool = False
    fails: bool = True


def setups(servers: int) -> list[Setup]:
    """Return what is compared."""
    return [
        Setup('one greylist that never fails', 1, fails=False),
        Setup('one server', 1),
        Setup('round robin', servers),
        Setup('prio', servers, prios=True),
        Setup('sticky', servers, sticky=True),
        Setup('central database', servers, central=True),
    ]


class Host:
    """A server or a database: when it is down."""

    def __init__(self, random_: random.Random, fails: bool) -> None:
        self.changes: list[float] = []  # down, up, down ...
        now = random_.expovariate(1 / UP)
        while fails and now < 2 * DAY:
            self.changes += [now, now + random_.expovariate(1 / OUTAGE)]
            now = self.changes[-1] + random_.expovariate(1 / UP)

    def up(self, now: float) -> bool:
        """Tell whether it serves."""
        return bisect.bisect(self.changes, now) % 2 == 0

    def up_at(self, now: float) -> float:
        """Return when it serves again."""
        return self.changes[bisect.bisect(self.changes, now)]


@dataclass
class Try:
    """A mail on its way."""

    mail: Mail
    began: float
    deferred: int = 0


@dataclass
class Figures:
    """What became of the mail of the second day."""

    mails: int = 0
    unjudged: int = 0
    deferrals: Counter[int] = field(default_factory=Counter)  # mails by how often they were deferred
    delays: list[float] = field(default_factory=list)  # seconds, of those that were deferred
    judged_by: Counter[str] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)  # deferrals by time


class Mx:
    """An MX host: the program's queue and balancer, and the servers behind it."""

    def __init__(self, setup: Setup, number: int) -> None:
        prios = [10 * (1 + i) if setup.prios else 10 for i in range(setup.servers)]
        services = [parse_service(f'GREY{i + 1}=10.0.0.{i + 1}:10023:{prio}') for i, prio in enumerate(prios)]
        self.queue = Queue(services, Log())
        self.balancer = self.queue.balancer
        self.pools = list(self.queue.pools.values())
        if setup.sticky:
            self.balancer.sticky = parse_sticky(ATTRIBUTES, '--sticky')
        for pool in self.pools:
            self.found(pool, 0.0)
        for _ in range(number):  # each MX host has a turn of its own
            self.balancer.choose(b'', (), 0.0)

    def found(self, pool: Pool, now: float) -> None:
        """Have the service used (again): a check passed."""
        pool.idle.append(Connection(pool, now))
        pool.service.check_passed(now)

    def lost(self, pool: Pool, now: float) -> None:
        """Have the service down: a connection was refused."""
        pool.service.turn(DOWN, 'refused', now)


class Simulation:
    """Two days of one site."""

    def __init__(self, setup: Setup, mx: int, mails: int, seed: int) -> None:
        self.random = random.Random(f'tries {seed}')
        failures = random.Random(f'failures {seed}')
        self.database = Host(failures, setup.fails)
        self.hosts = [Host(failures, setup.fails) for _ in range(setup.servers)]
        self.central = setup.central
        known: list[dict[Mail, float]] = [{} for _ in self.hosts]
        self.known = [known[0]] * setup.servers if setup.central else known
        self.mxs = [Mx(setup, number) for number in range(mx)]
        self.figures = Figures()
        arrivals = random.Random(f'mail {seed}')
        times = sorted(arrivals.uniform(0, 2 * DAY) for _ in range(2 * mails))
        self._numbers = itertools.count()
        self.events: list[tuple[float, int, Any]] = [
            (now, next(self._numbers), Try(mail, now))
            for now, mail in zip(times, traffic.few_senders(2 * mails, seed), strict=True)]  # fmt: skip

    def run(self) -> Figures:
        """Return what became of the mail."""
        while self.events:
            now, _, event = heapq.heappop(self.events)
            if isinstance(event, Try):
                self.tried(event, now)
            else:
                mx, pool = event
                mx.found(pool, now)
        return self.figures

    def at(self, when: float, event: Any) -> None:
        """Have something happen."""
        heapq.heappush(self.events, (when, next(self._numbers), event))

    def tried(self, mail: Try, now: float) -> None:
        """Have a mail tried at any MX."""
        deferred = self.ask(self.random.choice(self.mxs), mail, now)
        if deferred:
            if mail.began >= DAY:
                self.figures.steps[int((now - DAY) // STEP)] += 1
            pauses = KINDS[sum(mail.mail.client_address.encode()) % len(KINDS)]
            pause = pauses[min(mail.deferred, len(pauses) - 1)] * self.random.uniform(1.0, 1.2)
            mail.deferred += 1
            self.at(now + pause, mail)
        elif mail.began >= DAY:
            self.figures.mails += 1
            self.figures.deferrals[mail.deferred] += 1
            if mail.deferred:
                self.figures.delays.append(now - mail.began)

    def ask(self, mx: Mx, mail: Try, now: float) -> bool:
        """Ask the service that the balancer chooses, and the next one where that is down; tell whether it defers."""
        triplet = mail.mail
        key = mx.balancer.sticky.key(triplet.request) if mx.balancer.sticky is not None else b''
        counts = mail.began >= DAY
        while (pool := mx.balancer.choose(b'', (), now, key)) is not None:
            number = mx.pools.index(pool)
            if self.hosts[number].up(now):
                break
            mx.lost(pool, now)
            found = FOUND if mx.balancer.up else FOUND_ALONE
            self.at(self.hosts[number].up_at(now) + self.random.uniform(0, found), (mx, pool))
        if pool is None or (self.central and not self.database.up(now)):
            self.figures.unjudged += counts
            return False
        self.figures.judged_by[pool.service.name] += counts
        return now - self.known[number].setdefault(triplet, now) < GREYLISTED


def part(figures: Sequence[Figures], least: int) -> float:
    """Return which part of the mails was deferred so often at least."""
    mails = sum(one.mails for one in figures)
    return sum(number for one in figures for times, number in one.deferrals.items() if times >= least) / mails


def row(setup: Setup, figures: Sequence[Figures]) -> dict[str, Any]:
    """Return the figures of a set-up, of all runs."""
    mails = sum(one.mails for one in figures)
    delays = sorted(delay for one in figures for delay in one.delays)
    judged: Counter[str] = Counter()
    for one in figures:
        judged += one.judged_by
    return {
        'setup': setup.name, 'mails': mails, 'deferred': [part(figures, times) for times in (1, 2, 3)],
        'deferrals': sum(times * number for one in figures for times, number in one.deferrals.items()) / mails,
        'mean_delay': sum(delays) / len(delays), 'p95_delay': delays[int(0.95 * len(delays))],
        'unjudged': sum(one.unjudged for one in figures) / mails, 'busiest': max(judged.values()) / judged.total(),
        'steps': [figures[0].steps[step] for step in range(int(DAY / STEP))],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield ('| | deferred | twice or more | three times or more | delay of the deferred, mean | 95 % within |'
           ' passed without being judged | busiest server |')  # fmt: skip
    yield '|---' * 8 + '|'
    for each in rows:
        deferred = ' | '.join(f'{100 * of:.2f} %' for of in each['deferred'])
        delays = f'{each["mean_delay"] / 60:.1f} min | {each["p95_delay"] / 60:.0f} min'
        others = f'{100 * each["unjudged"]:.2f} % | {100 * each["busiest"]:.0f} %'
        yield f'| {each["setup"]} | {deferred} | {delays} | {others} |'


def outages(mx: int, servers: int, seed: int) -> list[list[tuple[float, float]]]:
    """Return when each server is down on the second day, in hours."""
    simulation = Simulation(Setup('', servers), mx, 1, seed)
    return [[((down - DAY) / 3600, (up - DAY) / 3600)
             for down, up in zip(host.changes[::2], host.changes[1::2], strict=True) if up > DAY]
            for host in simulation.hosts]  # fmt: skip


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    numbers = {name: given[name] for name in ('--mx', '--servers', '--mails', '--runs')}
    for name, text in numbers.items():
        if not text.isdigit() or not 0 < int(text) <= 10**6:
            print(f"site: {name} '{text}' is not a number from 1 to 1000000", file=sys.stderr)
            return 2
    mx, servers, mails, runs = map(int, numbers.values())
    rows = [row(setup, [Simulation(setup, mx, mails, seed).run() for seed in range(runs)]) for setup in setups(servers)]
    print('\n'.join(table(rows)))
    if given['--json']:
        figures = {'mx': mx, 'servers': servers, 'mails': mails, 'runs': runs, 'step': STEP, 'rows': rows,
                   'outages': outages(mx, servers, 0), **traffic.origin()}  # fmt: skip
        Path(given['--json']).write_text(json.dumps({'site': figures}, indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Postfix as a load: many clients ask policy requests, and check that each answer is their own.

Usage:
  load [options] [--attribute=NAME=VALUE]... WHERE
  load -h | --help

WHERE is host:port or unix:/path of a proxy or a policy server. Each client is a connection as
smtpd(8) holds it: one request in flight, two tries, 1 s between them, and a look before writing
whether the other side has closed. Run from the project's folder: python -m bench.load 127.0.0.1:10060

Options:
  --clients=N             connections in all [default: 32]
  --processes=P           processes that share them [default: 1]
  --requests=N            requests in all, 0: until --seconds are over [default: 0]
  --seconds=S             time in all; 10 without --requests, 600 with it
  --rate=R                requests/s in all, 0: as fast as answers come [default: 0]
  --think=SECONDS         pause of a client between two requests [default: 0]
  --patience=SECONDS      Postfix's smtpd_policy_service_timeout [default: 100]
  --default=ACTION        the action that counts as a default [default: dunno]
  --request-limit=N       requests on a connection, as Postfix's request_limit, 0: any number [default: 0]
  --attribute=NAME=VALUE  change an attribute of the requests, may be repeated
  --json                  print JSON: seconds, and latencies in ms
  -h, --help              show this text

Exit status: 0 if every request got its own answer (a default counts as one), else 1.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from docopt import docopt

from bench.processes import Process, Processes

#: Seconds until the load is under way after its processes are ready: they all start at the same instant.
HEAD_START = 0.05


@dataclass
class Plan:
    """What a load does: the options of the command line."""

    where: str
    clients: int = 32
    processes: int = 1
    requests: int = 0  # in all, 0: until `seconds` are over
    seconds: float = 10.0
    rate: float = 0.0  # requests/s in all, 0: as fast as answers come
    think: float = 0.0  # seconds
    patience: float = 100.0  # seconds
    default: str = 'dunno'
    attributes: dict[str, str] = field(default_factory=dict)
    request_limit: int = 0  # requests on a connection, 0: any number
    trace: bool = False  # keep every try

    def part(self, number: int) -> Plan:
        """Return the plan of one of the processes."""
        return Plan(**{
            **asdict(self),
            'clients': share(self.clients, self.processes, number),
            'requests': share(self.requests, self.processes, number),
            'rate': self.rate / self.processes,
        })  # fmt: skip


def share(whole: int, parts: int, number: int) -> int:
    """Return one of the `parts` that a number is cut into, as equal as can be."""
    return whole // parts + (number < whole % parts)


class Histogram:
    """Latencies in steps of 1 %, from 1 us to hours: its size does not grow with the load."""

    STEPS = 100  # to e times the latency
    SIZE = 24 * STEPS

    def __init__(self) -> None:
        self._counts = array('Q', bytes(8 * self.SIZE))
        self.max = 0.0  # seconds

    def add(self, seconds: float) -> None:
        """Count a latency."""
        step = int(math.log(seconds * 1e6) * self.STEPS) if seconds > 1e-6 else 0
        self._counts[min(step, self.SIZE - 1)] += 1
        if seconds > self.max:
            self.max = seconds

    def quantile(self, part: float) -> float:
        """Return the seconds that this part of the latencies stayed within, 0.0 if there are none."""
        wanted, seen = part * sum(self._counts), 0
        for step, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(self.max, math.exp((step + 1) / self.STEPS) / 1e6)
        return 0.0

    def over(self, seconds: float) -> int:
        """Return how many took longer, give or take 1 % of the seconds."""
        return sum(self._counts[int(math.log(seconds * 1e6) * self.STEPS) + 1 :])

    def merge(self, other: dict[str, Any]) -> None:
        """Add what the dump() of another holds."""
        for step, count in other['counts'].items():
            self._counts[int(step)] += count
        self.max = max(self.max, other['max'])

    def dump(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {'max': self.max, 'counts': {step: count for step, count in enumerate(self._counts) if count}}


class Result:
    """What became of the requests of a load."""

    def __init__(self) -> None:
        self.started = 0.0  #: monotonic seconds
        self.seconds = 0.0  #: from the start to the last answer
        self.requests = 0
        self.latency = Histogram()  #: from the first try to the answer: as long as smtpd was held
        self.errors: Counter[str] = Counter()  #: tries that failed, by kind: refused, ended, reset, late, ...
        self.reconnects = 0  #: connections found closed before a request was written
        self.defaults = 0
        self.swapped = 0  #: answers that belong to another request
        self.malformed = 0  #: answers that are not one action line and an empty line
        self.lost = 0  #: requests without an answer after two tries
        self.by_second: dict[int, Counter[str]] = {}  #: who answered, by whole seconds since the start
        #: of a plan with `trace`: seconds since the start, seconds of latency, and '' or the kind of error
        self.trace: list[tuple[float, float, str]] = []

    COUNTS = ('requests', 'reconnects', 'defaults', 'swapped', 'malformed', 'lost')

    @property
    def servers(self) -> Counter[str]:
        """How many answers each server gave; '?' are answers that do not name one."""
        return self.between(0, math.inf)

    @property
    def wrong(self) -> int:
        """Everything that should not be: failed tries, swapped, malformed and lost answers."""
        return sum(self.errors.values()) + self.swapped + self.malformed + self.lost

    def between(self, first: float, last: float) -> Counter[str]:
        """Return how many answers each server gave from one second of the load until before another."""
        total: Counter[str] = Counter()
        for second, servers in self.by_second.items():
            if first <= second < last:
                total.update(servers)
        return total

    def merge(self, part: dict[str, Any]) -> None:
        """Add what a process of the load dumped."""
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + part[name])
        self.seconds = max(self.seconds, part['seconds'])
        self.latency.merge(part['latency'])
        self.errors.update(part['errors'])
        for second, servers in part['by_second'].items():
            self.by_second.setdefault(int(second), Counter()).update(servers)
        self.trace += [(when, latency, kind) for when, latency, kind in part['trace']]

    def dump(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return {
            **{name: getattr(self, name) for name in self.COUNTS},
            'seconds': self.seconds,
            'latency': self.latency.dump(),
            'errors': self.errors,
            'by_second': self.by_second,
            'trace': self.trace,
        }


class Load:
    """A load under way."""

    def __init__(self, plan: Plan, processes: Processes) -> None:
        self._workers = [self._worker(plan.part(number), processes) for number in range(plan.processes)]
        for worker in self._workers:
            assert worker.popen.stdout is not None
            if not worker.popen.stdout.readline():
                raise RuntimeError(f'a process of the load ended: {worker.log}')
        self.started = time.monotonic() + HEAD_START
        for worker in self._workers:
            assert worker.popen.stdin is not None
            worker.popen.stdin.write(b'%r\n' % self.started)
            worker.popen.stdin.flush()

    @staticmethod
    def _worker(part: Plan, processes: Processes) -> Process:
        return processes.start([sys.executable, '-m', 'bench.load_worker', json.dumps(asdict(part))], pipes=True)

    def wait_until(self, seconds: float) -> None:
        """Sleep until so many seconds after the start."""
        time.sleep(max(0.0, self.started + seconds - time.monotonic()))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def result(self) -> Result:
        """Wait for the end and return what became of the requests."""
        result = Result()
        result.started = self.started
        for worker in self._workers:
            out, _ = worker.popen.communicate()
            if worker.popen.returncode:
                raise RuntimeError(f'a process of the load failed: {worker.log}')
            result.merge(json.loads(out))
        return result


def start_load(plan: Plan, processes: Processes) -> Load:
    """Start a load whose processes end with the block of `processes`."""
    plan.processes = max(1, min(plan.processes, plan.clients))
    return Load(plan, processes)


def run_load(plan: Plan) -> Result:
    """Run a load to its end."""
    with Processes() as processes:
        return start_load(plan, processes).result()


def shares(servers: Counter[str]) -> str:
    """Return who answered how much, as text."""
    total = sum(servers.values())
    return ', '.join(f'{name} {100 * count / total:.1f} % ({count})' for name, count in sorted(servers.items()))


def report(plan: Plan, result: Result) -> str:
    """Return a result as text to read."""
    points = [('p50', 0.5), ('p99', 0.99), ('p99.9', 0.999)]
    latency = result.latency
    texts = [f'{name} {latency.quantile(part) * 1000:.2f}' for name, part in points]
    errors = ', '.join(f'{kind} {count}' for kind, count in sorted(result.errors.items()))
    return '\n'.join([
        f'requests: {result.requests} in {result.seconds:.2f} s, {per_second(result):.0f}/s'
        f' ({plan.clients} clients, {plan.processes} processes)',
        f'latency:  {", ".join(texts)}, max {latency.max * 1000:.2f} ms',
        f'errors:   {errors or "none"}',
        f'answers:  defaults {result.defaults}, swapped {result.swapped}, malformed {result.malformed},'
        f' lost {result.lost}, reconnects {result.reconnects}',
        f'shares:   {shares(result.servers) or "none"}',
    ])  # fmt: skip


def per_second(result: Result) -> float:
    """Return the requests per second."""
    return result.requests / result.seconds if result.seconds else 0.0


def as_json(plan: Plan, result: Result) -> str:
    """Return a result as JSON; latencies in ms."""
    latency = result.latency
    return json.dumps({
        'plan': asdict(plan),
        'seconds': round(result.seconds, 3),
        'requests_per_second': round(per_second(result), 1),
        'p50_ms': round(latency.quantile(0.5) * 1000, 3),
        'p99_ms': round(latency.quantile(0.99) * 1000, 3),
        'p99.9_ms': round(latency.quantile(0.999) * 1000, 3),
        'max_ms': round(latency.max * 1000, 3),
        **{name: getattr(result, name) for name in result.COUNTS},
        'errors': result.errors,
        'servers': result.servers,
    })  # fmt: skip


def parse_plan(given: dict[str, Any]) -> Plan:
    """Return the plan of a command line. Raises ValueError."""
    attributes = dict(text.split('=', 1) for text in given['--attribute'] if '=' in text)
    if len(attributes) < len(given['--attribute']):
        raise ValueError('an --attribute is not NAME=VALUE, or is given twice')
    requests, where = int(given['--requests']), given['WHERE']
    if not (where.startswith('unix:/') or where.rpartition(':')[2].isdigit()):
        raise ValueError(f"'{where}' is not host:port or unix:/path")
    plan = Plan(where, int(given['--clients']), int(given['--processes']), requests,
                float(given['--seconds'] or (600 if requests else 10)), float(given['--rate']),
                float(given['--think']), float(given['--patience']), given['--default'], attributes,
                int(given['--request-limit']))  # fmt: skip
    if plan.clients < 1 or plan.processes < 1 or plan.seconds <= 0 or plan.patience <= 0:
        raise ValueError('--clients, --processes, --seconds and --patience are above 0')
    return plan


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    try:
        plan = parse_plan(given)
    except ValueError as error:
        print(f'load: {error}', file=sys.stderr)
        return 2
    try:
        result = run_load(plan)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(as_json(plan, result) if given['--json'] else report(plan, result))
    return 1 if result.wrong else 0


if __name__ == '__main__':
    sys.exit(main())

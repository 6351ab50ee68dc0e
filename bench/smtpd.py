"""smtpd as policy servers meet it: one connection, asked by hand, and a load of many in processes of their own."""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bench.processes import SCALE, Process, Processes
from bench.protocol import new_instance, request

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
    think: float = 0.0  # seconds, on average
    patience: float = 100.0  # seconds
    default: str = 'dunno'
    attributes: dict[str, str] = field(default_factory=dict)
    request_limit: int = 0  # requests on a connection, 0: any number
    trace: bool = False  # tell of every try: Load.tries

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

    def dump(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return {
            **{name: getattr(self, name) for name in self.COUNTS},
            'seconds': self.seconds,
            'latency': self.latency.dump(),
            'errors': self.errors,
            'by_second': self.by_second,
        }


class Try(NamedTuple):
    """A try of a request."""

    when: float  # it ended, monotonic seconds
    seconds: float  # since the first try of the request
    error: str  # its kind, '' of a try that was answered
    server: str  # who answered; 'default', '?' for an answer that names nobody


class Load:
    """A load under way."""

    def __init__(self, plan: Plan, processes: Processes) -> None:
        self._workers = [self._worker(plan.part(number), processes) for number in range(plan.processes)]
        for worker in self._workers:
            assert worker.process.stdout is not None
            if not worker.process.stdout.readline():
                raise RuntimeError(f'a process of the load ended: {worker.log}')
        self.started = time.monotonic() + HEAD_START
        for worker in self._workers:
            assert worker.process.stdin is not None
            worker.process.stdin.write(b'%r\n' % self.started)
            worker.process.stdin.flush()

    @staticmethod
    def _worker(part: Plan, processes: Processes) -> Process:
        return processes.start([sys.executable, '-m', 'bench.load_worker', json.dumps(asdict(part))], pipes=True)

    def wait_until(self, seconds: float) -> None:
        """Sleep until so many seconds after the start."""
        time.sleep(max(0.0, self.started + seconds - time.monotonic()))

    @property
    def tries(self) -> list[Try]:
        """The tries until now, of a plan with `trace`."""
        # the file may show a write in part, at the edge of a page: the last line counts when its end is there
        logs = [worker.log.rpartition('\n')[0] for worker in self._workers]
        lines = [line.split() for log in logs for line in log.splitlines()]
        return [Try(float(when), float(seconds), error.strip('-'), server) for when, seconds, error, server in lines]

    def stop(self) -> None:
        """Let no client send a further request."""
        for worker in self._workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()

    def result(self) -> Result:
        """Wait for the end and return what became of the requests."""
        result = Result()
        for worker in self._workers:
            assert worker.process.stdout is not None
            out = worker.process.stdout.read()
            if worker.process.wait():
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


def per_second(result: Result) -> float:
    """Return the requests per second."""
    return result.requests / result.seconds if result.seconds else 0.0


class PostfixClient:
    """A connection as smtpd holds it, at a port of 127.0.0.1 or a path: one request at a time, answered in order."""

    def __init__(self, where: int | str, seconds: float = 30) -> None:
        if isinstance(where, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(seconds * SCALE)
            self.sock.connect(where)
        else:
            self.sock = socket.create_connection(('127.0.0.1', where), timeout=seconds * SCALE)
        self.buffer = b''

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def read_answer(self) -> bytes:
        """Return one answer with its empty line; fewer bytes if the connection ends first."""
        while b'\n\n' not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                rest, self.buffer = self.buffer, b''
                return rest
            self.buffer += data
        end = self.buffer.index(b'\n\n') + 2
        message, self.buffer = self.buffer[:end], self.buffer[end:]
        return message

    def ask(self, message: bytes) -> str:
        """Send a request and return the action of its answer; it must be exactly one well-formed answer (I1)."""
        self.send(message)
        reply = self.read_answer()
        assert reply.startswith(b'action=') and reply.endswith(b'\n\n') and reply.count(b'\n') == 2, reply
        assert not self.buffer, self.buffer
        return reply[7:-2].decode()

    def ask_own(self) -> str:
        """Ask with an instance of its own; return who answered. Fails on another's answer (I2)."""
        instance = new_instance()
        action = self.ask(request(instance=instance))
        if action == 'dunno':
            return 'default'
        word, answered, server = action.split(' ')
        assert (word, answered) == ('DUNNO', instance), f'asked with {instance}, got {action!r}'
        return server

    def at_end(self) -> bool:
        """Tell whether the proxy has closed the connection; waits for it."""
        return self.sock.recv(1) == b''

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> PostfixClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

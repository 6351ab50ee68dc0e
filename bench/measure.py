"""What bench/compare.py measures of each peer: processor, latency, memory, starts, and what servers that fail cost."""

from __future__ import annotations

import contextlib
import functools
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import (
    BY_DEBIAN,
    COMPILED_PROGRAM,
    DEBIAN_PYTHON,
    HAPROXY,
    OURS,
    PEERS,
    PERL,
    PERL_NAME,
    RECIPE,
    Cpu,
    Peer,
    Running,
    Stage,
    haproxy,
    haproxy_recipe,
    ours,
    perl_command,
)
from bench.processes import MODULE, ROOT, Processes
from bench.protocol import around_instance
from bench.smtpd import Plan, Result, start_load

CLIENTS = 32
#: Requests that an smtpd sends over one connection: it ends after max_use (100) SMTP sessions, of about one each.
SMTPD_REQUESTS = 100
#: Seconds of a load that count, after those in which it gets warm.
WINDOW = 2
#: Requests/s of the loads whose cost is compared for few and many clients: the same for both, as cost falls with load.
STEADY_RATE = 3000
#: Seconds until all of many clients have connected at that rate.
CROWD_WARM = 2
#: Times that a program is started for the measure of its first answer.
STARTS = 15
#: When servers fail, in seconds since the start of the load.
KILLED, RESTARTED, HUNG, WOKEN, END = 3, 5, 8, 10, 12
#: Requests/s of the load that sees it, and Postfix's patience in seconds.
RATE, PATIENCE = 400, 10
#: Seconds that a service may take in it; HAProxy's checks wait as long.
TIMEOUT = 1
CLIENT_COUNTS = (1, 10, 100, 1000, 3000)
SERVICE_COUNTS = (1, 2, 5, 10, 20)
ANSWER_SIZES = (50, 200, 1000, 4000, 10000)  # bytes; one that says whose it is has 40


@dataclass
class Figures:
    """What was measured of a peer, one value for each round."""

    user: list[float] = field(default_factory=list)  # seconds of processor per request
    system: list[float] = field(default_factory=list)
    visits: list[float] = field(default_factory=list)  # the same of clients that leave after SMTPD_REQUESTS, in all
    throughput: list[float] = field(default_factory=list)  # requests/s
    p50: list[float] = field(default_factory=list)  # seconds
    p99: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)  # seconds, p50 at 1 client
    memory: list[float] = field(default_factory=list)  # bytes for each client beyond the first
    few: list[float] = field(default_factory=list)  # seconds of processor per request, 32 clients, steady rate
    many: list[float] = field(default_factory=list)  # the same, 3,000 clients

    @property
    def cpu(self) -> list[float]:
        """Seconds of processor per request, of each round."""
        return [user + system for user, system in zip(self.user, self.system, strict=True)]


class Broken(Exception):
    """A load got wrong answers: its figures say nothing."""


def check(peer: str, result: Result) -> Result:
    """Return a result. Raises Broken if not every request got its own answer."""
    if result.wrong or result.defaults or not result.requests:
        raise Broken(f'{peer}: {result.requests} requests, errors {dict(result.errors)}, swapped {result.swapped},'
                     f' malformed {result.malformed}, lost {result.lost}, defaults {result.defaults}')  # fmt: skip
    return result


@dataclass
class Window:
    """What was seen of a load while it was warm."""

    cpu: Cpu  # of one request
    throughput: float  # requests/s
    result: Result  # of the whole load, its start included


def watch(running: Running, plan: Plan, warm: int, name: str = '') -> Window:
    """Run a load and measure its last whole seconds, after `warm` of them. Raises Broken."""
    with Processes() as processes:
        load = start_load(plan, processes)
        load.wait_until(warm)
        before = running.cpu()
        load.wait_until(plan.seconds)
        after = running.cpu()
        result = check(name, load.result())
    requests = result.between(warm, plan.seconds).total()
    return Window(after.per(requests, before), requests / (plan.seconds - warm), result)


def busy(peer: Peer, running: Running, figures: Figures) -> None:
    """Measure 32 clients that ask as fast as they are answered."""
    plan = Plan(running.where, CLIENTS, seconds=peer.warm + WINDOW, request_limit=peer.request_limit)
    window = watch(running, plan, peer.warm, peer.name)
    figures.user.append(window.cpu.user)
    figures.system.append(window.cpu.system)
    figures.throughput.append(window.throughput)
    figures.p50.append(window.result.latency.quantile(0.5))
    figures.p99.append(window.result.latency.quantile(0.99))


def visits(peer: Peer, running: Running, figures: Figures) -> None:
    """Measure 32 clients as smtpd are: each leaves after some requests, and comes anew; so a spawn(8) starts anew."""
    if running.pid and not peer.request_limit:
        plan = Plan(running.where, CLIENTS, seconds=peer.warm + WINDOW, request_limit=SMTPD_REQUESTS)
        figures.visits.append(watch(running, plan, peer.warm, peer.name).cpu.sum)


def alone(peer: Peer, running: Running, figures: Figures) -> None:
    """Measure the latency of one client that asks as fast as it is answered."""
    plan = Plan(running.where, 1, seconds=1, request_limit=peer.request_limit)
    with Processes() as processes:
        result = check(peer.name, start_load(plan, processes).result())
    figures.alone.append(result.latency.quantile(0.5))


def crowd(peer: Peer, running: Running, figures: Figures) -> None:
    """Measure the memory of many clients, all connected and each asking in turn."""
    used = []
    for clients in (1, peer.crowd):
        plan = Plan(running.where, clients, seconds=3, rate=min(1000, clients * 50))
        with Processes() as processes:
            load = start_load(plan, processes)
            load.wait_until(2.5)
            used.append(running.memory())
            check(peer.name, load.result())
    figures.memory.append((used[1] - used[0]) / (peer.crowd - 1))


def cost(peer: Peer, running: Running, clients: int, rate: float = STEADY_RATE) -> Cpu:
    """Return what a request costs at a steady rate, asked by so many clients in turn."""
    plan = Plan(running.where, clients, seconds=CROWD_WARM + WINDOW, rate=rate)
    return watch(running, plan, CROWD_WARM, f'{peer.name}, {clients} clients').cpu


def few_and_many(peer: Peer, running: Running, figures: Figures) -> None:
    """Measure the cost at 32 clients and at many."""
    figures.few.append(cost(peer, running, CLIENTS).sum)
    figures.many.append(cost(peer, running, peer.many).sum)


def first_answer(command: Sequence[str]) -> float:
    """Return the seconds from the start of a program to its first answer, as spawn(8) starts it. Raises OSError."""
    head, tail = around_instance()
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(20)
        began = time.monotonic()
        with theirs:
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                                       stderr=subprocess.DEVNULL, cwd=ROOT)  # fmt: skip
        try:
            ours.sendall(head + b'1.2.3.4' + tail)
            answer = b''
            while not answer.endswith(b'\n\n'):
                chunk = ours.recv(65536)
                if not chunk:
                    raise ConnectionError(f'{" ".join(command)} ended after {answer!r}')
                answer += chunk
            took = time.monotonic() - began
        finally:
            ours.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if not answer.startswith(b'action=DUNNO 1.2.3.4'):
        raise ConnectionError(f'{" ".join(command)} answered {answer!r}')
    return took


def start_commands(stage: Stage) -> dict[str, list[str]]:
    """Return the programs that spawn(8) may start: ours as pip installs it and as a copied file, and the ancestor."""
    services = [f'-s{service.service}' for service in stage.services]
    program = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from hapolicy_gevent import main; sys.exit(main())'
    pythons = {'python': sys.executable}
    by_debian = next(peer for peer in PEERS if peer.name == BY_DEBIAN)
    if not by_debian.missing and Path(DEBIAN_PYTHON).resolve() != Path(sys.executable).resolve():
        pythons['Debian python3'] = DEBIAN_PYTHON
    commands = {}
    for name, python in pythons.items():
        # as pip does, also where PYTHONDONTWRITEBYTECODE is set; the next start would compile it, and not keep that
        subprocess.run([python, '-m', 'py_compile', str(MODULE)], check=True)
        commands[f'ours, {name}, installed'] = [python, '-c', program, *services]
        commands[f'ours, {name}, copied file'] = [python, str(MODULE), *services]
    if COMPILED_PROGRAM.exists():
        commands['ours, compiled'] = [str(COMPILED_PROGRAM), *services]
    if Path(PERL).exists():
        commands[PERL_NAME] = perl_command(stage.services)
    return commands


@contextlib.contextmanager
def stage_of(services: int = 2, *options: str) -> Iterator[Stage]:
    """Start policy servers, and give peers a place to be started at."""
    with Processes() as processes, tempfile.TemporaryDirectory(prefix='hapolicy-compare-') as directory:
        try:
            names = [f'S{number}' for number in range(services)]
            yield Stage(processes, processes.policy_services(names, *options), Path(directory))
        finally:
            processes.stop()  # before their directory goes


def say(text: str) -> None:
    """Tell how far it is, at once."""
    print(text, file=sys.stderr, flush=True)


def allow_many_files() -> None:
    """Raise the limit of descriptors as far as may be: 3,000 clients cost HAProxy 6,000."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


#: What the requests of a load met: seconds since its start, seconds of latency, '' or the kind of error.
Timeline = list[tuple[float, float, str]]


def timelines() -> dict[str, Timeline]:
    """Let servers fail behind ours and, if it is there, HAProxy."""
    lines: list[tuple[str, Callable[[Stage], Running], int]] = [
        (f'ours, services with a timeout of {TIMEOUT} s', functools.partial(ours, fields=f'::{TIMEOUT}'), 0),
        ('HAProxy mode tcp, connect checks each 1 s', haproxy, 0),
        ('HAProxy recipe: policy checks each 1 s, shutdown-sessions, leastconn, request_limit=1', haproxy_recipe, 1),
    ]
    absent = next(peer for peer in PEERS if peer.name == RECIPE).missing
    return {name: timeline(name, start, limit) for name, start, limit in lines[: 1 if absent else None]}


def timeline(name: str, start: Callable[[Stage], Running], request_limit: int) -> Timeline:
    """Kill one of two servers and start it again, then hang the other and wake it."""
    say(f'failures: {name}')
    with stage_of() as stage:
        where = f'127.0.0.1:{start(stage).port}'
        plan = Plan(where, CLIENTS, seconds=END, rate=RATE, patience=PATIENCE, request_limit=request_limit, trace=True)
        first, second = stage.services
        load = start_load(Plan(where, CLIENTS, seconds=1, rate=RATE), stage.processes)
        load.result()  # until it is warm
        load = start_load(plan, stage.processes)
        for when, act in ((KILLED, first.kill), (RESTARTED, first.start), (HUNG, second.hang), (WOKEN, second.wake)):
            load.wait_until(when)
            act()
        load.result()
        return [(each.when - load.started, each.seconds, each.error) for each in load.tries]


#: For more and more of something: how many, and us of processor per request of each peer.
Growth = tuple[Sequence[int], dict[str, list[float]]]


def growth() -> dict[str, Growth]:
    """Measure the cost for more clients, more services and longer answers."""
    peers = [peer for peer in PEERS if peer.name in (OURS, HAPROXY) and not peer.missing]
    clients, services, sizes = ({peer.name: list[float]() for peer in peers} for _ in range(3))
    with stage_of() as stage:
        running = {peer.name: peer.start(stage) for peer in peers}
        for count in CLIENT_COUNTS:
            say(f'growth: {count} clients')
            for peer in peers:
                clients[peer.name].append(cost(peer, running[peer.name], count).sum * 1e6)
    for costs, stages in (
        (services, [(count, f'--size={ANSWER_SIZES[0]}') for count in SERVICE_COUNTS]),
        (sizes, [(2, f'--size={size}') for size in ANSWER_SIZES]),
    ):
        for count, size in stages:
            say(f'growth: {count} services, {size[2:]}')
            with stage_of(count, size) as stage:
                for peer in peers:
                    costs[peer.name].append(cost(peer, peer.start(stage), CLIENTS).sum * 1e6)
    return {'clients': (CLIENT_COUNTS, clients), 'services': (SERVICE_COUNTS, services),
            'bytes of an answer': (ANSWER_SIZES, sizes)}  # fmt: skip


"""What does the proxy cost beside its rivals: HAProxy, nginx, and the Perl original?

Usage:
  compare [options]
  compare -h | --help

Runs the same load through each of them in turn, round after round, and compares within a round: other work on
the machine meets all of them alike. A rival that is not installed is left out. The Perl original wants root: it
runs under a private Postfix. Run from the project's folder: python -m bench.compare

Options:
  --rounds=N      rounds of the load [default: 5]
  --short         for CI: ours and HAProxy alone, 4 rounds, under 45 s, wide bounds
  --json=FILE     write all figures to a file
  --pictures=DIR  draw them, and what happens when servers fail; takes 4 minutes more, and matplotlib
  -h, --help      show this text

Exit status: with --short 1 if a wide bound is broken; else 0, whatever the figures.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import gevent
from docopt import docopt

from bench.load import Plan, Result, start_load
from bench.load_worker import request_around_instance
from bench.peers import (
    BY_DEBIAN,
    COMPILED,
    COMPILED_PROGRAM,
    DEBIAN_PYTHON,
    DIRECT,
    HAPROXY,
    LOGGING,
    OURS,
    PEERS,
    PERL,
    PERL_NAME,
    UNIX,
    Cpu,
    Peer,
    Running,
    Stage,
    perl_command,
)
from bench.processes import MODULE, ROOT, Processes

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
#: What --short lets pass: CPU and throughput as parts of HAProxy's, by the best round of each, as other work on
#: the machine only ever adds to them. Now 2.6 to 3.4 on a busy machine, and 0.5 to 0.7: twice as much is too much.
SHORT_ROUNDS = 4
WIDE_CPU, WIDE_THROUGHPUT = 6.0, 0.15


@dataclass
class Bar:
    """A ratio that is promised."""

    name: str
    must: float
    aim: float
    values: list[float]  # of each round
    most: bool = True  # the bounds are the most it may be, else the least

    @property
    def measured(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    def meets(self, bound: float) -> bool:
        """Tell whether it is within a bound."""
        return self.measured <= bound if self.most else self.measured >= bound


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
    head, tail = request_around_instance({})
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
    services = [service.service() for service in stage.services]
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


@dataclass
class Comparison:
    """Everything that was measured."""

    date: str
    python: str
    gevent: str
    commit: str
    figures: dict[str, Figures]
    left_out: dict[str, str]  # peers, and why
    starts: dict[str, list[float]] = field(default_factory=dict)  # seconds to the first answer

    def ratios(self, values: Callable[[Figures], Sequence[float]], other: str, one: str = OURS) -> list[float]:
        """Return ours as parts of another peer's, of each round; none if the other was left out."""
        if one not in self.figures or other not in self.figures:
            return []
        return [mine / its
                for mine, its in zip(values(self.figures[one]), values(self.figures[other]), strict=True)]  # fmt: skip

    def added(self, peer: str) -> list[float]:
        """Return the seconds of latency that a peer adds at 1 client, of each round."""
        return [its - bare
                for its, bare in zip(self.figures[peer].alone, self.figures[DIRECT].alone, strict=True)]  # fmt: skip

    def added_ratio(self, one: str) -> list[float]:
        """Return the ratio of the medians: HAProxy's single differences are small, and would blow up the noise."""
        if not {HAPROXY, DIRECT, one} <= self.figures.keys():
            return []
        added = [self.added(name) for name in (one, HAPROXY)]
        return [median(added[0]) / median(added[1])] if all(added) and median(added[1]) > 0 else []

    def bars(self) -> list[Bar]:
        """Return the ratios that are promised, as far as they were measured."""
        mine, starts = self.figures[OURS], self.starts
        bars = []
        for name in (OURS, BY_DEBIAN, COMPILED):
            added, throughput = self.added_ratio(name), self.ratios(lambda one: one.throughput, HAPROXY, name)
            bars += [
                Bar(f'CPU, {name}, to HAProxy tcp', 2.0, 1.5, self.ratios(lambda one: one.cpu, HAPROXY, name)),
                Bar(f'CPU, {name}, to Perl', 1 / 15, 1 / 25, self.ratios(lambda one: one.visits, PERL_NAME, name)),
                Bar('the same, without the start of its processes', 1 / 15, 1 / 25,
                    self.ratios(lambda one: one.cpu, PERL_NAME, name)),
                Bar(f'throughput, {name}, to HAProxy tcp', 0.5, 0.7, throughput, False),
                Bar(f'added latency, {name}, to HAProxy tcp', 1.5, 1.0, added),
            ]
        bars += [
            Bar('CPU, unix sockets on both sides, to TCP', 0.75, 0.7, self.ratios(lambda one: one.cpu, OURS, UNIX)),
            Bar('CPU, unix sockets on both sides, to HAProxy tcp', 1.5, 1.2,
                self.ratios(lambda one: one.cpu, HAPROXY, UNIX)),
            Bar('CPU, with -l to without', 1.5, 1.2, self.ratios(lambda one: one.cpu, OURS, LOGGING)),
            Bar('cost at 3,000 clients, to 32', 2.0, 1.3, [
                many / few for many, few in zip(mine.many, mine.few, strict=True)]),
            Bar('memory per client, kB', 12, 6, [one / 1000 for one in mine.memory]),
        ]  # fmt: skip
        for name in starts:
            if name != PERL_NAME and PERL_NAME in starts:
                pairs = zip(starts[name], starts[PERL_NAME], strict=True)
                bars.append(Bar(f'spawn start, to Perl ({name[6:]})', 1.3, 1.0, [its / perl for its, perl in pairs]))
        return [bar for bar in bars if bar.values]


@contextlib.contextmanager
def stage_of(services: int = 2, *options: str) -> Iterator[Stage]:
    """Start policy servers, and give peers a place to be started at."""
    with Processes() as processes, tempfile.TemporaryDirectory(prefix='hapolicy-compare-') as directory:
        try:
            yield Stage(processes, [processes.policy_service(f'S{number}', *options) for number in range(services)],
                        Path(directory))  # fmt: skip
        finally:
            processes.stop()  # before their directory goes


def say(text: str) -> None:
    """Tell how far it is, at once."""
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    """Return what is measured: the commit, and whether files differ from it; '' without git."""
    with contextlib.suppress(OSError):
        git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ''


def compare(peers: Sequence[Peer], rounds: int, short: bool) -> Comparison:
    """Measure the peers, round after round, each round in another order. Raises Broken, StartError."""
    there = [peer for peer in peers if not peer.missing]
    comparison = Comparison(
        datetime.date.today().isoformat(), platform.python_version(), gevent.__version__, commit(),
        {peer.name: Figures() for peer in there},
        {peer.name: peer.missing for peer in peers if peer.missing},
    )  # fmt: skip
    with stage_of() as stage:
        running = {peer.name: peer.start(stage) for peer in there}
        for number in range(rounds):
            order = there[number % len(there) :] + there[: number % len(there)]
            for measure in (busy,) if short else (busy, visits, alone, alone):
                say(f'round {number + 1} of {rounds}: {measure.__name__}')
                for peer in order:
                    measure(peer, running[peer.name], comparison.figures[peer.name])
        if not short:
            compare_crowds(there, running, comparison, rounds)
            compare_starts(stage, comparison)
    return comparison


def compare_crowds(peers: Sequence[Peer], running: dict[str, Running], comparison: Comparison, rounds: int) -> None:
    """Measure memory, once and with fresh proxies, and the cost of many clients."""
    say('memory')
    with stage_of() as stage:
        for peer in peers:
            if peer.crowd:
                crowd(peer, peer.start(stage), comparison.figures[peer.name])
    for number in range(min(3, rounds)):
        say(f'cost of many clients, round {number + 1}')
        for peer in peers:
            if peer.many:
                few_and_many(peer, running[peer.name], comparison.figures[peer.name])


def compare_starts(stage: Stage, comparison: Comparison) -> None:
    """Measure the start to the first answer, of each program in turn."""
    say('starts')
    commands = start_commands(stage)
    for command in commands.values():
        first_answer(command)  # from the disk, and compiled
    comparison.starts = {name: [] for name in commands}
    for _ in range(STARTS):
        for name, command in commands.items():
            comparison.starts[name].append(first_answer(command))


def spread(values: Sequence[float], unit: float, digits: int = 0) -> str:
    """Return a median and its spread as text, '-' if nothing was measured."""
    if not values:
        return '-'
    middle, least, most = (f'{one / unit:,.{digits}f}' for one in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f'{middle} ({least}-{most})'


def table(comparison: Comparison) -> str:
    """Return what was measured of each peer as text: us, requests/s, ms, kB."""
    rows = [['', 'CPU/request us', 'user', 'system', f'{SMTPD_REQUESTS} a connection', 'requests/s', 'p50 ms', 'p99 ms',
             'adds us, 1 client', 'kB/client', 'CPU us: 32 clients', '3,000']]  # fmt: skip
    for name, one in comparison.figures.items():
        proxied = name != DIRECT
        added = comparison.added(name) if proxied and one.alone and DIRECT in comparison.figures else []
        rows.append([
            name, *(spread(values if proxied else [], 1e-6) for values in (one.cpu, one.user, one.system)),
            spread(one.visits, 1e-6), spread(one.throughput, 1), spread(one.p50, 1e-3, 2), spread(one.p99, 1e-3, 1),
            spread(added, 1e-6), spread(one.memory, 1000, 1), spread(one.few, 1e-6), spread(one.many, 1e-6),
        ])  # fmt: skip
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a markdown table that is a table to the eye, too; columns without any value are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell != '-' for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |'
             for row in zip(*columns, strict=True)]  # fmt: skip
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """Return the promised ratios as text."""
    rows = [['', 'measured', 'must', 'aim', '']]
    for bar in bars:
        digits, sign = (3 if bar.must < 0.1 else 2), ('<=' if bar.most else '>=')
        verdict = 'aim met' if bar.meets(bar.aim) else 'met' if bar.meets(bar.must) else 'MISSED'
        rows.append([bar.name, spread(bar.values, 1, digits), f'{sign} {bar.must:.{digits}f}',
                     f'{bar.aim:.{digits}f}', verdict])  # fmt: skip
    return aligned(rows)


def report(comparison: Comparison) -> str:
    """Return everything as text: medians, and in brackets the least and the most of the rounds."""
    starts = [['start to first answer, ms', ''],
              *([name, spread(values, 1e-3)] for name, values in comparison.starts.items())]  # fmt: skip
    parts = [
        f'{comparison.date}, commit {comparison.commit}, Python {comparison.python}, gevent {comparison.gevent}',
        *(f'left out: {name}, {why}' for name, why in comparison.left_out.items()),
        table(comparison),
        *([aligned(starts)] if comparison.starts else []),
        *([bars_table(comparison.bars())] if comparison.bars() else []),
    ]
    return '\n\n'.join(parts)


def within_wide_bounds(comparison: Comparison) -> bool:
    """Say whether ours is not far slower than it should be; True without HAProxy."""
    if HAPROXY not in comparison.figures:
        print('without HAProxy there is nothing to compare with')
        return True
    mine, its = comparison.figures[OURS], comparison.figures[HAPROXY]
    cpu, throughput = min(mine.cpu) / min(its.cpu), max(mine.throughput) / max(its.throughput)
    fine = cpu <= WIDE_CPU and throughput >= WIDE_THROUGHPUT
    print(f'{"ok" if fine else "FAILED"}: CPU {cpu:.2f} times HAProxy\'s (at most {WIDE_CPU}),'
          f' throughput {throughput:.2f} (at least {WIDE_THROUGHPUT})')  # fmt: skip
    return fine


def allow_many_files() -> None:
    """Raise the limit of descriptors as far as may be: 3,000 clients cost HAProxy 6,000."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(rounds: int, short: bool, json_file: str | None, pictures: str | None) -> int:
    """Compare, report, draw; return the exit status."""
    peers = [peer for peer in PEERS if peer.name in (OURS, HAPROXY)] if short else PEERS
    comparison = compare(peers, SHORT_ROUNDS if short else rounds, short)
    print(report(comparison))
    if json_file:
        Path(json_file).write_text(json.dumps(asdict(comparison), indent=1))
    if pictures:
        from bench.pictures import draw

        draw(comparison, Path(pictures))
    return 0 if not short or within_wide_bounds(comparison) else 1


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    if not given['--rounds'].isdigit() or not int(given['--rounds']):
        print('compare: --rounds is a number above 0', file=sys.stderr)
        return 2
    if given['--pictures'] and not importlib.util.find_spec('matplotlib'):
        print('compare: --pictures wants matplotlib', file=sys.stderr)
        return 2
    allow_many_files()
    try:
        return run(int(given['--rounds']), given['--short'], given['--json'], given['--pictures'])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == '__main__':
    sys.exit(main())

"""The pictures of bench/compare.py: what each peer costs, what happens when servers fail, and how cost grows.

Wants matplotlib, and measures what the comparison has not: that takes 4 minutes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.compare import CLIENTS, Comparison, cost, say, stage_of
from bench.load import Plan, start_load
from bench.peers import DIRECT, HAPROXY, OURS, PEERS, RECIPE, Running, Stage, haproxy, haproxy_recipe, ours

#: When servers fail, in seconds since the start of the load.
KILLED, RESTARTED, HUNG, WOKEN, END = 3, 5, 8, 10, 12
#: Requests/s of the load that sees it, and Postfix's patience in seconds.
RATE, PATIENCE = 400, 10
#: Seconds that a service may take in it; HAProxy's checks wait as long.
TIMEOUT = 1
#: The least latency that is drawn, in ms: a refused try takes less.
FLOOR = 0.1
#: The greatest, in ms: beyond the time that a server hangs.
CEILING = 5000
CLIENT_COUNTS = (1, 10, 100, 1000, 3000)
SERVICE_COUNTS = (1, 2, 5, 10, 20)
ANSWER_SIZES = (50, 200, 1000, 4000, 10000)  # bytes; one that says whose it is has 40
#: The colours of a pair that the colour-blind can tell apart.
BLUE, ORANGE, RED, GREY = '#0072b2', '#e69f00', '#d62728', '#999999'


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files. Raises ImportError."""
    importlib.import_module('matplotlib').use('Agg')
    return importlib.import_module('matplotlib.pyplot')


def draw(comparison: Comparison, directory: Path) -> None:
    """Measure what is missing and draw all pictures into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    note = (f'{comparison.date}, commit {comparison.commit}, Python {comparison.python}, gevent {comparison.gevent};'
            ' a shared machine of two cores')  # fmt: skip
    save(draw_peers(comparison), note, directory / 'peers.png')
    save(draw_failures(timelines()), note, directory / 'failures.png')
    save(draw_growth(growth()), note, directory / 'growth.png')


def save(figure: Any, note: str, path: Path) -> None:
    """Write a picture with a line that says what was measured."""
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    figure.text(0.99, 0.005, note, ha='right', va='bottom', fontsize=7, color=GREY)
    figure.savefig(path, dpi=90)
    say(f'drawn: {path}')


def draw_peers(comparison: Comparison) -> Any:
    """Draw CPU per request and the latencies of each peer, under 32 clients."""
    names = list(comparison.figures)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    draw_cpu(left, comparison, [name for name in names if name != DIRECT])
    draw_latency(right, comparison, names)
    return figure


def draw_cpu(axes: Any, comparison: Comparison, names: Sequence[str]) -> None:
    """Draw stacked bars of user and system time, and mark their sum's least and most."""
    start = [0.0] * len(names)
    for kind, colour in (('user', BLUE), ('system', ORANGE)):
        values = [median(getattr(comparison.figures[name], kind)) * 1e6 for name in names]
        axes.barh(names, values, left=start, color=colour, label=kind)
        start = [one + more for one, more in zip(start, values, strict=True)]
    for row, (name, end) in enumerate(zip(names, start, strict=True)):
        cpu = [one * 1e6 for one in comparison.figures[name].cpu]
        axes.text(end, row, f' {median(cpu):.0f} ({min(cpu):.0f}-{max(cpu):.0f})', va='center', fontsize=8)
    axes.set_xlim(0, max(start) * 1.25)
    axes.set_title(f'Processor per request, {CLIENTS} clients', loc='left', fontsize=10)
    axes.set_xlabel('us: median (least-most)')
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def draw_latency(axes: Any, comparison: Comparison, names: Sequence[str]) -> None:
    """Draw the median and the 99th percentile of each peer."""
    for kind, colour, marker in (('p50', BLUE, 'o'), ('p99', ORANGE, 's')):
        rounds = [getattr(comparison.figures[name], kind) for name in names]
        middle = [median(values) * 1e3 for values in rounds]
        reach = [[one - min(values) * 1e3 for one, values in zip(middle, rounds, strict=True)],
                 [max(values) * 1e3 - one for one, values in zip(middle, rounds, strict=True)]]  # fmt: skip
        axes.errorbar(middle, names, xerr=reach, fmt=marker, color=colour, label=kind, capsize=2)
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(axis='x', which='both', alpha=0.3)
    axes.set_title(f'Latency, {CLIENTS} clients as fast as they are answered', loc='left', fontsize=10)
    axes.set_xlabel('ms: median, least and most of the rounds')
    axes.invert_yaxis()
    axes.legend(fontsize=8)


@dataclass
class Timeline:
    """What the requests of a load met while servers failed."""

    name: str
    trace: list[tuple[float, float, str]]  # seconds since the start, seconds of latency, '' or the kind of error


def timelines() -> list[Timeline]:
    """Let servers fail behind ours and, if it is there, HAProxy."""
    lines: list[tuple[str, Callable[[Stage], Running], int]] = [
        (f'ours, services with a timeout of {TIMEOUT} s', functools.partial(ours, fields=f'::{TIMEOUT}'), 0),
        ('HAProxy mode tcp, connect checks each 1 s', haproxy, 0),
        ('HAProxy recipe: policy checks each 1 s, shutdown-sessions, leastconn, request_limit=1', haproxy_recipe, 1),
    ]
    absent = next(peer for peer in PEERS if peer.name == RECIPE).missing
    return [timeline(name, start, limit) for name, start, limit in lines[: 1 if absent else None]]


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
        return Timeline(name, load.result().trace)


def draw_failures(lines: Sequence[Timeline]) -> Any:
    """Draw the latency of each request over time, a panel for each timeline."""
    figure, panels = pyplot().subplots(len(lines), 1, figsize=(11, 2.5 * len(lines) + 0.8), sharex=True, sharey=True,
                                       squeeze=False, layout='constrained')  # fmt: skip
    for axes, line in zip(panels[:, 0], lines, strict=True):
        draw_timeline(axes, line)
    panels[-1, 0].set_xlabel(
        f's; two servers, {CLIENTS} clients, {RATE} requests/s; a point is an answer, when it came'
    )
    panels[0, 0].set_xlim(0, END + 0.2)
    return figure


def draw_timeline(axes: Any, line: Timeline) -> None:
    """Draw one panel, its errors marked."""
    good = [(when, latency * 1e3) for when, latency, kind in line.trace if not kind]
    bad = [(when, max(FLOOR, latency * 1e3)) for when, latency, kind in line.trace if kind]
    axes.axvspan(KILLED, RESTARTED, color=RED, alpha=0.1)
    axes.axvspan(HUNG, WOKEN, color=ORANGE, alpha=0.15)
    axes.scatter(*zip(*good, strict=True), s=3, color=BLUE, linewidths=0, rasterized=True)
    if bad:
        axes.scatter(*zip(*bad, strict=True), s=30, color=RED, marker='x', label='failed try')
    axes.set_yscale('log')
    axes.set_ylim(FLOOR * 0.8, CEILING)
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_ylabel('latency, ms')
    slow = sum(latency > 500 for _, latency in good)
    axes.set_title(f'{line.name}: {len(bad)} failed tries, {slow} answers over 0.5 s,'
                   f' worst {max(latency for _, latency in good):.0f} ms', loc='left', fontsize=10)  # fmt: skip
    for when, text in ((KILLED, 'one killed'), (HUNG, 'the other hangs')):
        axes.text(when + 0.05, 0.95, text, transform=axes.get_xaxis_transform(), va='top', fontsize=8)


#: us of processor per request of each peer, in the order of the points.
Costs = dict[str, list[float]]


def growth() -> dict[str, tuple[Sequence[int], Costs]]:
    """Measure the cost for more clients, more services and longer answers."""
    peers = [peer for peer in PEERS if peer.name in (OURS, HAPROXY) and not peer.missing]
    clients: Costs = {peer.name: [] for peer in peers}
    services: Costs = {peer.name: [] for peer in peers}
    sizes: Costs = {peer.name: [] for peer in peers}
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


def draw_growth(grown: dict[str, tuple[Sequence[int], Costs]]) -> Any:
    """Draw how the cost of a request grows."""
    figure, panels = pyplot().subplots(1, len(grown), figsize=(11, 3.8), sharey=True, layout='constrained')
    for axes, (label, (points, costs)) in zip(panels, grown.items(), strict=True):
        for (name, values), colour, marker in zip(costs.items(), (BLUE, ORANGE), 'os', strict=False):
            axes.plot(points, values, marker=marker, color=colour, label=name)
        axes.set_xscale('log')
        axes.set_xticks(points, [f'{point:,}' for point in points], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel(label)
    panels[0].set_ylim(0)
    panels[0].set_ylabel('us of processor per request')
    panels[0].set_title('3,000 requests/s', loc='left', fontsize=10)
    panels[1].set_title(f'{CLIENTS} clients', loc='left', fontsize=10)
    panels[2].set_title(f'{CLIENTS} clients, 2 services', loc='left', fontsize=10)
    panels[0].legend(fontsize=8)
    return figure

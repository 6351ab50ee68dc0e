"""Draw what bench.compare, bench.choose and bench.site have measured, from the files that they wrote with --json.

Usage:
  draw [--directory=DIR] FILE...
  draw -h | --help

Options:
  --directory=DIR  where the pictures go [default: bench/pictures]
  -h, --help       show this text

Wants matplotlib.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from docopt import docopt

from bench.measure import CLIENTS, END, HUNG, KILLED, RATE, RESTARTED, WOKEN
from bench.peers import DIRECT

#: The colours of a pair that the colour-blind can tell apart.
BLUE, ORANGE, RED, GREY = '#0072b2', '#e69f00', '#d62728', '#999999'
#: The least latency that is drawn, in ms: a refused try takes less. The greatest: beyond the time that a server hangs.
FLOOR, CEILING = 0.1, 5000

#: The colours of deferred once, twice, and more often; and of the set-ups whose day is drawn.
OFTEN = (BLUE, ORANGE, RED)
DAYS = {'round robin': RED, 'prio': ORANGE, 'sticky': BLUE, 'central database': GREY}


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files. Raises ImportError."""
    importlib.import_module('matplotlib').use('Agg')
    return importlib.import_module('matplotlib.pyplot')


def save(figure: Any, note: str, path: Path) -> None:
    """Write a picture with a line that says what was measured."""
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    figure.text(0.99, 0.005, note, ha='right', va='bottom', fontsize=7, color=GREY)
    figure.savefig(path, dpi=90)
    print(f'drawn: {path}')


def draw_peers(figures: dict[str, Any]) -> Any:
    """Draw CPU per request and the latencies of each peer, under 32 clients."""
    peers = figures['figures']
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    draw_cpu(left, {name: peer for name, peer in peers.items() if name != DIRECT})
    draw_latency(right, peers)
    return figure


def draw_cpu(axes: Any, peers: dict[str, Any]) -> None:
    """Draw stacked bars of user and system time, and mark their sum's least and most."""
    names, start = list(peers), [0.0] * len(peers)
    for kind, colour in (('user', BLUE), ('system', ORANGE)):
        values = [median(peer[kind]) * 1e6 for peer in peers.values()]
        axes.barh(names, values, left=start, color=colour, label=kind)
        start = [one + more for one, more in zip(start, values, strict=True)]
    for row, (peer, end) in enumerate(zip(peers.values(), start, strict=True)):
        cpu = [1e6 * (user + system) for user, system in zip(peer['user'], peer['system'], strict=True)]
        axes.text(end, row, f' {median(cpu):.0f} ({min(cpu):.0f}-{max(cpu):.0f})', va='center', fontsize=8)
    axes.set_xlim(0, max(start) * 1.25)
    axes.set_title(f'Processor per request, {CLIENTS} clients', loc='left', fontsize=10)
    axes.set_xlabel('us: median (least-most)')
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def draw_latency(axes: Any, peers: dict[str, Any]) -> None:
    """Draw the median and the 99th percentile of each peer."""
    for kind, colour, marker in (('p50', BLUE, 'o'), ('p99', ORANGE, 's')):
        rounds = [peer[kind] for peer in peers.values()]
        middle = [median(values) * 1e3 for values in rounds]
        reach = [[one - min(values) * 1e3 for one, values in zip(middle, rounds, strict=True)],
                 [max(values) * 1e3 - one for one, values in zip(middle, rounds, strict=True)]]  # fmt: skip
        axes.errorbar(middle, list(peers), xerr=reach, fmt=marker, color=colour, label=kind, capsize=2)
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(axis='x', which='both', alpha=0.3)
    axes.set_title(f'Latency, {CLIENTS} clients as fast as they are answered', loc='left', fontsize=10)
    axes.set_xlabel('ms: median, least and most of the rounds')
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def draw_failures(figures: dict[str, Any]) -> Any:
    """Draw the latency of each request over time, a panel for each timeline."""
    lines = figures['timelines']
    figure, panels = pyplot().subplots(len(lines), 1, figsize=(11, 2.5 * len(lines) + 0.8), sharex=True, sharey=True,
                                       squeeze=False, layout='constrained')  # fmt: skip
    for axes, (name, trace) in zip(panels[:, 0], lines.items(), strict=True):
        draw_timeline(axes, name, trace)
    panels[-1, 0].set_xlabel(
        f's; two servers, {CLIENTS} clients, {RATE} requests/s; a point is an answer, when it came'
    )
    panels[0, 0].set_xlim(0, END + 0.2)
    return figure


def draw_timeline(axes: Any, name: str, trace: Sequence[tuple[float, float, str]]) -> None:
    """Draw one panel, its errors marked."""
    good = [(when, latency * 1e3) for when, latency, kind in trace if not kind]
    bad = [(when, max(FLOOR, latency * 1e3)) for when, latency, kind in trace if kind]
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
    axes.set_title(f'{name}: {len(bad)} failed tries, {slow} answers over 0.5 s,'
                   f' worst {max(latency for _, latency in good):.0f} ms', loc='left', fontsize=10)  # fmt: skip
    for when, text in ((KILLED, 'one killed'), (HUNG, 'the other hangs')):
        axes.text(when + 0.05, 0.95, text, transform=axes.get_xaxis_transform(), va='top', fontsize=8)


def draw_growth(figures: dict[str, Any]) -> Any:
    """Draw how the cost of a request grows."""
    grown = figures['growth']
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


def draw_choose(figures: dict[str, Any]) -> Any:
    """Draw what a choice costs, and the shares of services."""
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(11, 3.8), layout='constrained')
    for (name, values), colour, marker in zip(figures['cost'].items(), (ORANGE, BLUE), 'so', strict=True):
        left.plot(figures['services'], values, marker=marker, color=colour, label=name)
    left.set_title('Processor per choice', loc='left', fontsize=10)
    left.set_xlabel('services of a prio')
    left.set_ylabel('us')
    left.set_ylim(0)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    titles = (f'{figures["mails"]:,} different mails', '200 senders with 80 % of the mail')
    for axes, title, off, sets in zip((middle, right), titles, (2, 10), figures['shares'].values(), strict=True):
        names = [':'.join(map(str, weights)) for weights in figures['weights']]
        for row, parts in enumerate(sets):
            axes.scatter([100 * (part - 1) for part in parts], [row] * len(parts), color=BLUE, s=24)
        axes.axvspan(-off, off, color=GREY, alpha=0.15)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-1.3 * off, 1.3 * off)
        axes.invert_yaxis()
        axes.set_title(title, loc='left', fontsize=10)
        axes.set_xlabel('% that a share is off; grey: the bound')
    middle.set_ylabel('weights')
    return figure


def draw_site(figures: dict[str, Any]) -> Any:
    """Draw how often mail is deferred in each set-up, and the deferrals of a day."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4), layout='constrained', width_ratios=(2, 3))
    names = [row['setup'] for row in figures['rows']]
    start = [0.0] * len(names)
    for number, (label, colour) in enumerate(zip(('once', 'twice', 'three times or more'), OFTEN, strict=True)):
        values = [100 * (at_least - more) for at_least, more in
                  [[*row['deferred'], 0.0][number : number + 2] for row in figures['rows']]]  # fmt: skip
        left.barh(names, values, left=start, color=colour, label=label)
        start = [one + more for one, more in zip(start, values, strict=True)]
    left.invert_yaxis()
    left.set_title('Mail that is deferred', loc='left', fontsize=10)
    left.set_xlabel('% of the mail')
    left.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.4, -0.14), ncol=3)
    hours = [(0.5 + step) * figures['step'] / 3600 for step in range(len(figures['rows'][0]['steps']))]
    for row in figures['rows']:
        if row['setup'] in DAYS:
            right.plot(hours, row['steps'], color=DAYS[row['setup']], label=row['setup'], linewidth=1.2)
    for number, outages in enumerate(figures['outages']):
        for begin, end in outages:
            right.axvspan(begin, end, color=(RED, ORANGE)[number % 2], alpha=0.2)
            right.text(begin, 0.99, f'GREY{number + 1} down', transform=right.get_xaxis_transform(), fontsize=6,
                       va='top', ha='right', rotation=90)  # fmt: skip
    right.set_xlim(0, 24)
    right.set_ylim(0)
    right.set_title(f'Deferrals in each {figures["step"] / 60:.0f} min of the first run: {figures["mx"]} MX hosts,'
                    f' {figures["servers"]} servers', loc='left', fontsize=10)  # fmt: skip
    right.set_xlabel('h')
    right.legend(fontsize=8, loc='lower left')
    return figure


#: What a file holds, and its pictures; those of which it holds no figures are left out.
DRAWN: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    'compare': {'peers': draw_peers, 'failures': draw_failures, 'growth': draw_growth},
    'choose': {'choose': draw_choose},
    'site': {'site': draw_site},
}
#: What a picture wants, where that may be missing.
WANTED = {'failures': 'timelines', 'growth': 'growth'}


def note(figures: dict[str, Any]) -> str:
    """Return a line that says what was measured."""
    names = {'commit': 'commit ', 'version': 'version ', 'python': 'Python ', 'gevent': 'gevent '}
    return ', '.join([figures['date'], *(word + figures[name] for name, word in names.items() if name in figures)])


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    directory = Path(given['--directory'])
    directory.mkdir(parents=True, exist_ok=True)
    for file in given['FILE']:
        for what, figures in json.loads(Path(file).read_text()).items():
            for name, draw in DRAWN[what].items():
                if figures.get(WANTED.get(name, 'date')):
                    save(draw(figures), note(figures), directory / f'{name}.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Draw what bench.choose and bench.site have measured, from the files that they wrote with --json.

Usage:
  draw [--directory=DIR] FILE...
  draw -h | --help

Options:
  --directory=DIR  where the pictures go [default: bench/pictures]
  -h, --help       show this text

Wants matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from docopt import docopt

from bench.pictures import BLUE, GREY, ORANGE, RED, pyplot, save

#: The colours of deferred once, twice, and more often; and of the set-ups whose day is drawn.
OFTEN = (BLUE, ORANGE, RED)
DAYS = {'round robin': RED, 'prio': ORANGE, 'sticky': BLUE, 'central database': GREY}


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


DRAWN = {'choose': draw_choose, 'site': draw_site}


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    for name in given['FILE']:
        for what, figures in json.loads(Path(name).read_text()).items():
            note = f'{figures["date"]}, version {figures["version"]}, Python {figures["python"]}'
            save(DRAWN[what](figures), note, Path(given['--directory']) / f'{what}.png')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""What does it cost to choose a service, in turn or sticky, and is each service chosen as its weight says?

Usage:
  choose [options]
  choose -h | --help

Times the program's own Balancer without any I/O: idle connections enough, a client's network, a sender and a recipient,
each request a message of its own. Both ways are timed in turn, round after round, in processor time; the least counts,
as other work only adds.
Then shares: of mails that are all different, and of mails that few senders send (bench/traffic.py).
Run from the project's folder: python -m bench.choose

Options:
  --rounds=N   rounds of 200 choices [default: 1000]
  --mails=N    mails that are shared [default: 100000]
  --json=FILE  write the figures to a file, for bench.draw
  -h, --help   show this text

Exit status: 1 if a sticky choice of 2 services costs over 3 us more, if its cost is not linear in the services, or if a
share is off by over 2 % of itself (few senders: 10 %); else 0.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from docopt import docopt

from bench import traffic
from bench.protocol import around_instance
from bench.traffic import Mail
from hapolicy_gevent import Balancer, Connection, Log, Queue, parse_service, parse_sticky

SERVICES = (1, 2, 5, 10, 20, 50)
CHOICES = 200
#: us that a sticky choice of two services may cost more; and parts by which a share may be off.
DEARER, OFF, OFF_OF_FEW = 3.0, 0.02, 0.1
#: How many times what two points have one cost for each service more may be.
LINEAR = 1.5
#: Makes a copy of a request, which is in the processor's cache as one that was just received.
AS_RECEIVED = b'\n'
ATTRIBUTES = 'client_address/24/64,sender,recipient'
WEIGHTS = ((1, 1), (2, 1), (3, 2, 1), (5, 3, 1, 1))


def balancer_of(weights: Sequence[int], sticky: bool) -> Balancer:
    """Return the balancer of services of these weights, each with an idle connection."""
    services = [parse_service(f'GREY{i + 1}=10.0.0.1:10023::{weight}') for i, weight in enumerate(weights)]
    queue = Queue(services, Log())
    for pool in queue.pools.values():
        pool.idle.append(Connection(pool, 0.0))
    if sticky:
        queue.balancer.sticky = parse_sticky(ATTRIBUTES, '--sticky')
    return queue.balancer


def chooser(balancer: Balancer | None, requests: Iterable[bytes]) -> Callable[[], None]:
    """Return what chooses for the next of many requests, as Proxy.decide() does; without a balancer none."""
    following, numbers = itertools.cycle(requests).__next__, itertools.count()

    def choose() -> None:
        request, instance = following() + AS_RECEIVED, b'%x' % next(numbers)
        if balancer is not None:
            key = balancer.sticky.key(request) if balancer.sticky is not None else b''
            pool = balancer.choose(instance, (), 0.0, key)
            assert pool is not None
            if not key:
                balancer.bound[instance] = pool

    return choose


def requests_of(mails: Iterable[Mail]) -> list[bytes]:
    """Return the requests of mails as Postfix has them."""
    return [b'1a2b.5f3c.9d.0'.join(around_instance(**mail._asdict())) for mail in mails]


def costs(rounds: int) -> dict[str, list[float]]:
    """Return the us of a choice for each number of services, in turn and sticky; what is no choice is taken off."""
    requests = requests_of(traffic.few_senders(5000))
    ways = {(name, count): chooser(balancer_of([1] * count, name == 'sticky'), requests)
            for count in SERVICES for name in ('in turn', 'sticky')}  # fmt: skip
    ways['nothing', 0] = chooser(None, requests)
    timed: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, choose in ways.items():
            timed[way].append(timeit.timeit(choose, timer=time.process_time, number=CHOICES) / CHOICES * 1e6)
    least = {way: min(times) for way, times in timed.items()}
    return {name: [least[name, count] - least['nothing', 0] for count in SERVICES] for name in ('in turn', 'sticky')}


def shares(mails: Iterable[Mail], weights: Sequence[int]) -> list[float]:
    """Return the share that each service has, as a part of what its weight says."""
    balancer, sticky = balancer_of(weights, sticky=True), parse_sticky(ATTRIBUTES, '--sticky')
    counted: Counter[str] = Counter()
    for mail in mails:
        pool = balancer.choose(b'', (), 0.0, sticky.key(mail.request))
        assert pool is not None
        counted[pool.service.name] += 1
    return [counted[f'GREY{i + 1}'] / counted.total() * sum(weights) / weight for i, weight in enumerate(weights)]


def tell(cost: dict[str, list[float]], shared: dict[str, list[list[float]]]) -> bool:
    """Print all; return whether all is within the bounds."""
    print('us of a choice   services: ' + ''.join(f'{count:>8}' for count in SERVICES))
    for name, values in cost.items():
        print(f'{name:<27}' + ''.join(f'{value:8.2f}' for value in values))
    dearer = cost['sticky'][1] - cost['in turn'][1]
    points = list(zip(SERVICES, cost['sticky'], strict=True))[1:]
    steps = [(dear - cheap) / (more - few) for (few, cheap), (more, dear) in itertools.pairwise(points)]
    fine = [dearer <= DEARER, max(steps) <= LINEAR * median(steps)]
    print(f'sticky costs {dearer:.2f} us more with 2 services, {median(steps):.2f} us for each further one')
    for (name, sets), most in zip(shared.items(), (OFF, OFF_OF_FEW), strict=True):
        for weights, parts in zip(WEIGHTS, sets, strict=True):
            off = max(abs(value - 1) for value in parts)
            fine.append(off <= most)
            print(f'{name:<12} {":".join(map(str, weights)):<8} share by weight: '
                  + ' '.join(f'{value:.4f}' for value in parts))  # fmt: skip
    return all(fine)


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    rounds, number = int(given['--rounds']), int(given['--mails'])
    cost = costs(rounds)
    shared = {name: [shares(mails(number), weights) for weights in WEIGHTS]
              for name, mails in (('different', traffic.different), ('few senders', traffic.few_senders))}  # fmt: skip
    fine = tell(cost, shared)
    if given['--json']:
        figures = {'services': SERVICES, 'cost': cost, 'weights': WEIGHTS, 'shares': shared, 'mails': number,
                   **traffic.origin()}  # fmt: skip
        Path(given['--json']).write_text(json.dumps({'choose': figures}, indent=1))
    print('all within the bounds' if fine else 'FAILED: a bound is broken')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())

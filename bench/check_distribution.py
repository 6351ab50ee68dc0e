"""Does each service get exactly its share of the requests, whatever connections they come over?

Usage:
  check_distribution [--weights=W]... [--requests=N] [--wrong]
  check_distribution -h | --help

Runs the proxy in front of policy servers of various weights, and asks over 1, 7 and 32 connections,
always full cycles of the round robin (weights 3:2:1 have a cycle of 6 requests). Each service must have
its share to the request; one more or less is let pass. Over one connection that holds after every
cycle, over more of them at the end: there the order of the answers is not the order of the decisions.
Run from the project's folder: python -m bench.check_distribution

Options:
  --weights=W   check these weights, as 3:2:1, may be repeated; else 3:2:1, 1:1, 5:1, 7:3:2:1 and 1:1:1:1:1
  --requests=N  requests of each load, about [default: 2000]
  --wrong       give the proxy one service's weight wrong: the check must fail
  -h, --help    show this text

Exit status: 0 if all shares are right, else 1.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Sequence

from docopt import docopt

from bench.processes import PolicyService, Processes, free_port
from bench.smtpd import Plan, PostfixClient, start_load

WEIGHTS = ('3:2:1', '1:1', '5:1', '7:3:2:1', '1:1:1:1:1')
CONNECTIONS = (1, 7, 32)
#: Requests that a share may be off.
TOLERANCE = 1
#: Seconds to wait for an answer.
PATIENCE = 60.0


def off(counted: Counter[str], expected: Counter[str]) -> int:
    """Return by how many requests the counts are off, at the service where it is worst."""
    return max(abs(counted[name] - expected[name]) for name in counted | expected)


class Share:
    """The services of one weight set, and what is right for them."""

    def __init__(self, text: str, services: Sequence[PolicyService]) -> None:
        self.text = text
        self.weights = [int(weight) for weight in text.split(':')]
        self.services = services[: len(self.weights)]
        self.cycle = sum(self.weights)

    def expected(self, cycles: int) -> Counter[str]:
        """Return what each service gets in so many cycles."""
        return Counter(
            {service.name: weight * cycles for service, weight in zip(self.services, self.weights, strict=True)}
        )

    def options(self, wrong: bool) -> list[str]:
        """Return the proxy's options; with a wrong weight, if asked for."""
        weights = [self.weights[0] + wrong, *self.weights[1:]]
        return [f'-s{service.service}:10:{weight}' for service, weight in zip(self.services, weights, strict=True)]

    def check_one(self, port: int, cycles: int) -> bool:
        """Check every cycle over one connection; return whether all are right."""
        with PostfixClient(port, PATIENCE) as client:
            servers = [client.ask_own() for _ in range(cycles * self.cycle)]
        counted: Counter[str] = Counter()
        worst = 0
        for number in range(cycles):
            counted.update(servers[number * self.cycle : (number + 1) * self.cycle])
            worst = max(worst, off(counted, self.expected(number + 1)))
        return self._tell(1, counted, worst, f'{"".join(servers[: 2 * self.cycle])[:16]}...')

    def check_many(self, port: int, cycles: int, connections: int) -> bool:
        """Check the sum over many connections; return whether it is right and each answer its own."""
        plan = Plan(f'127.0.0.1:{port}', connections, 2, cycles * self.cycle, PATIENCE, patience=PATIENCE)
        with Processes() as processes:
            result = start_load(plan, processes).result()
        fine = self._tell(connections, result.servers, off(result.servers, self.expected(cycles)), '')
        if result.wrong or result.defaults:
            print(f'  FAILED: errors {dict(result.errors)}, swapped {result.swapped}, malformed {result.malformed},'
                  f' lost {result.lost}, defaults {result.defaults}')  # fmt: skip
        return fine and not result.wrong and not result.defaults

    def _tell(self, connections: int, counted: Counter[str], worst: int, order: str) -> bool:
        counts = ':'.join(str(counted[service.name]) for service in self.services)
        verdict = 'ok' if worst <= TOLERANCE else 'FAILED'
        print(f'{self.text:<10} {connections:>11} {counted.total():>9}  {counts:<22} {worst:>4}  {verdict:<7} {order}',
              flush=True)  # fmt: skip
        return worst <= TOLERANCE


def check(weights: Sequence[str], requests: int, wrong: bool) -> bool:
    """Check all weights; return whether all shares are right."""
    print(f'{"weights":<10} {"connections":>11} {"requests":>9}  {"answered":<22} {"off":>4}  {"":<7} order')
    fine = True
    with Processes() as processes:
        longest = max(text.count(':') + 1 for text in weights)
        services = processes.policy_services('ABCDEFGH'[:longest])
        for text in weights:
            share, port = Share(text, services), free_port()
            cycles = max(1, requests // share.cycle)
            with Processes() as own:
                own.proxy(port, '--stall=60', *share.options(wrong))  # a share that waits is right all the same
                fine &= share.check_one(port, cycles)
                for connections in CONNECTIONS[1:]:
                    fine &= share.check_many(port, cycles, connections)
    return fine


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    weights = given['--weights'] or WEIGHTS
    for text in weights:
        if not 2 <= len(text.split(':')) <= 8 or not all(
            weight.isdigit() and int(weight) for weight in text.split(':')
        ):
            print(f"check_distribution: --weights '{text}' are not 2 to 8 numbers above 0, as 3:2:1", file=sys.stderr)
            return 2
    try:
        fine = check(weights, int(given['--requests']), given['--wrong'])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print('every service got its share' if fine else 'FAILED: a share is wrong')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())

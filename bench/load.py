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
  --think=SECONDS         pause of a client between two requests, on average [default: 0]
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
import signal
import sys
from dataclasses import asdict
from typing import Any

from docopt import docopt

from bench.smtpd import Plan, Result, per_second, run_load, shares


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

"""How many instructions does a request cost the proxy itself?

Usage:
  instructions [options]
  instructions -h | --help

Counts what valgrind's callgrind sees of a load of 32 clients: the same to 1 % each time, whatever else the machine
does, so it tells what a change gave where times are too noisy. The kernel's part is not in it. Wants valgrind.
Run from the project's folder: python -m bench.instructions

Options:
  --module=FILE    another hapolicy_gevent.py, to compare with
  --python=PYTHON  the python that runs it
  --requests=N     requests that are counted [default: 4000]
  -h, --help       show this text
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile

from docopt import docopt

from bench.processes import MODULE, PolicyService, Processes, free_port
from bench.smtpd import Plan, start_load

#: Requests of the load that is taken off: it has the start in it, and all that is looked up once.
FIRST = 2000


def counted(python: str, module: str, services: list[PolicyService], requests: int) -> int:
    """Return the instructions of a process that answers so many requests, its start included. Raises StartError."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory, Processes() as processes:
        process = processes.start([
            'valgrind', '--tool=callgrind', f'--callgrind-out-file={directory}/out', '--max-stackframe=100000000',
            python, module, f'--listen=127.0.0.1:{port}', *(f'-s{service.service}' for service in services),
        ])  # fmt: skip
        process.wait_ready(port)
        with Processes() as loads:
            result = start_load(Plan(f'127.0.0.1:{port}', 32, requests=requests, seconds=120), loads).result()
        if result.wrong or result.defaults:
            raise SystemExit(f'instructions: not every request got its own answer: {result.wrong}')
        process.process.terminate()
        process.process.wait(60)
        found = re.search(r'Collected : (\d+)', process.log)
        if not found:
            raise SystemExit(f'instructions: valgrind has counted nothing: {process.log[-1000:]}')
        return int(found[1])


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    if not shutil.which('valgrind'):
        print('instructions: valgrind is not installed', file=sys.stderr)
        return 2
    if not given['--requests'].isdigit() or not int(given['--requests']):
        print('instructions: --requests is a number above 0', file=sys.stderr)
        return 2
    python, module = given['--python'] or sys.executable, given['--module'] or str(MODULE)
    requests = int(given['--requests'])
    with Processes() as processes:
        services = processes.policy_services('AB')
        first, both = (counted(python, module, services, number) for number in (FIRST, FIRST + requests))
    print(f'{(both - first) / requests:,.0f} instructions per request')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""What `sh bench/demo` shows: two policy servers behind the proxy, one of them killed under load.

Usage:
  demo [PORT]
  demo -h | --help

Listens at 127.0.0.1:PORT, else 127.0.0.1:10060, and runs until Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
import time

from docopt import docopt

from bench.processes import PolicyService, Process, Processes, StartError, is_free
from bench.smtpd import Plan, PostfixClient, Result, start_load

#: Where the README has Postfix ask.
DEFAULT_PORT = '10060'
#: The load: clients, requests/s, and seconds.
CLIENTS, RATE, SECONDS = 20, 500, 8
#: Seconds from the load's start until a server is killed, and until it is started again.
KILLED_AT, STARTED_AT = 2, 4
#: Seconds between two looks whether all processes still run.
LOOK = 0.5


def say(text: str = '') -> None:
    """Print at once, whatever stdout is."""
    print(text, flush=True)


def show_turns(port: int) -> None:
    """Send some requests over one connection."""
    with PostfixClient(port) as client:
        say('Nine requests over one connection were answered by: ' + ' '.join(client.ask_own() for _ in range(9)))
    say('A has weight 2, B has weight 1.')
    say()


def show_loss(port: int, victim: PolicyService, processes: Processes) -> Result:
    """Kill a server under load and start it again; return what became of the requests."""
    say(f'Now {SECONDS} s of load, {CLIENTS} clients send {RATE} requests/s. After {KILLED_AT} s A is killed'
        f' (kill -9),\nafter {STARTED_AT} s it is started again ...')  # fmt: skip
    say()
    load = start_load(Plan(f'127.0.0.1:{port}', CLIENTS, requests=RATE * SECONDS, rate=RATE, seconds=60), processes)
    load.wait_until(KILLED_AT)
    victim.kill()
    load.wait_until(STARTED_AT)
    victim.start()
    result = load.result()
    tell_seconds(result)
    tell_sum(result)
    return result


def tell_seconds(result: Result) -> None:
    """Print who answered in each second."""
    say('  second  ' + ''.join(f'{second + 1:>6}' for second in range(SECONDS)))
    for name in 'AB':
        counts = [result.between(second, second + 1)[name] for second in range(SECONDS)]
        say(f'  {name}       ' + ''.join(f'{count:>6}' for count in counts))
    say()


def tell_sum(result: Result) -> None:
    """Print what became of the requests."""
    answered = result.servers.total()
    say(f'  {result.requests} requests, {answered} answered by A or B,'
        f' {result.defaults} by default, {result.lost} lost,')  # fmt: skip
    say(f'  {result.errors.total()} errors, {result.swapped} answers to another request; the slowest took'
        f' {result.latency.max * 1000:.0f} ms.')  # fmt: skip
    say()


def tell_use(port: int) -> None:
    """Print how to go on."""
    say('Proxy and servers run on, until Ctrl-C. In another terminal, ask by hand (A or B answers DUNNO):')
    say()
    say(f"  bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; printf \"request=smtpd_access_policy\\ninstance=1\\n\\n\" >&3;"
        " head -n 1 <&3'")  # fmt: skip
    say()
    say("Or let Postfix ask: in main.cf's smtpd_recipient_restrictions, after reject_unauth_destination:")
    say()
    say(f'  check_policy_service inet:127.0.0.1:{port}')
    say()


def watch(running: list[Process]) -> None:
    """Wait until one of the processes ends by itself."""
    while all(process.running for process in running):
        time.sleep(LOOK)
    say('demo: the proxy or a policy server has ended')


def demo(port: int) -> int:
    """Show all of it and run until Ctrl-C; return the exit status."""
    with Processes() as processes:
        a, b = processes.policy_services('AB')
        proxy = processes.proxy(port, f'-s{a.service}:10:2:5', f'-s{b.service}:10:1:5')
        say(f'Two policy servers, A and B, and in front of them hapolicy, at 127.0.0.1:{port}.')
        say()
        show_turns(port)
        result = show_loss(port, a, processes)
        if result.wrong or result.defaults:
            say('demo: this should not be')
            return 1
        tell_use(port)
        watch([proxy, a.process, b.process])
    return 1


def main() -> int:
    """Run the command; return its exit status."""
    text = docopt(__doc__)['PORT'] or DEFAULT_PORT
    if not (text.isdigit() and 0 < int(text) < 65536):
        print(f"demo: '{text}' is not a port", file=sys.stderr)
        return 2
    port = int(text)
    if not is_free(port):
        print(f'demo: port {port} is in use, or not ours to use; give another: sh bench/demo 10070', file=sys.stderr)
        return 1
    try:
        return demo(port)
    except StartError as error:
        print(f'demo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say('stopped')
        return 128 + signal.SIGINT


if __name__ == '__main__':
    sys.exit(main())

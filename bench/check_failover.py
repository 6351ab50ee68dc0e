"""How long is Postfix held up when a policy server dies, hangs or returns, and is anything lost?

Usage:
  check_failover [options] [SCENARIO]...
  check_failover -h | --help

SCENARIO is refused, killed or hung; all of them if none is given. Three policy servers of equal weight
stand behind the proxy, under load from three processes:

  refused  one was never started
  killed   one is killed with -9 in mid-load, and started again later
  hung     one is stopped with SIGSTOP in mid-load, and goes on later

No request may be lost, answered by default, or get another's answer. None may be held longer than
the bound: a service's timeout and the margin where one hangs, the margin alone where it is dead. One
that returns must take its share again, give or take 5 %.
Run from the project's folder: python -m bench.check_failover

Options:
  --clients=N        connections in all [default: 30]
  --rate=R           requests/s in all [default: 600]
  --timeout=SECONDS  the timeout of each service [default: 2]
  --margin=SECONDS   what is allowed beyond it; 0: the check must fail [default: 1]
  -h, --help         show this text

Exit status: 0 if all bounds were kept, else 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from docopt import docopt

from bench.processes import PolicyService, Process, Processes, free_port
from bench.smtpd import Load, Plan, Result, start_load

#: How far the share of a service that returned may be from its due.
SHARE_TOLERANCE = 0.05
#: Seconds after its first answer, from which on a service that returned must have its share.
SETTLING = 1


@dataclass
class Scene:
    """What a scenario has before it: three services, the proxy, and a load under way."""

    victim: PolicyService
    load: Load


@dataclass
class Scenario:
    """What happens to the victim during a load of so many seconds, and how long a request may be held."""

    seconds: float
    act: Callable[[Scene], None]
    held: float  # seconds beyond the margin
    returns_at: float = 0.0  # seconds; 0: the victim does not return


def do_nothing(_scene: Scene) -> None:
    """The victim was never started."""


def kill_and_start(scene: Scene) -> None:
    """Kill the victim after 1.5 s, start it again at 3 s."""
    scene.load.wait_until(1.5)
    scene.victim.kill()
    scene.load.wait_until(3)
    scene.victim.start()


def hang_and_wake(scene: Scene) -> None:
    """Hang the victim after 1.5 s, wake it at 5 s."""
    scene.load.wait_until(1.5)
    scene.victim.hang()
    scene.load.wait_until(5)
    scene.victim.wake()


def scenarios(timeout: float) -> dict[str, Scenario]:
    """Return all scenarios by name."""
    return {
        'refused': Scenario(3, do_nothing, 0),
        'killed': Scenario(13, kill_and_start, 0, returns_at=3),
        'hung': Scenario(12, hang_and_wake, timeout, returns_at=5),
    }


def back_at(result: Result, name: str, since: float) -> int | None:
    """Return the first whole second after `since` in which a server answered, None if it never did."""
    seconds = [second for second, servers in result.by_second.items() if second >= since and servers[name]]
    return min(seconds, default=None)


def faults(scenario: Scenario, result: Result, victim: str, margin: float) -> list[str]:
    """Return what is wrong with a result, as text."""
    found = []
    bound = scenario.held + margin
    if result.latency.max > bound:
        found.append(f'a request was held for {result.latency.max:.2f} s, allowed are {bound:g} s')
    for name in ('swapped', 'malformed', 'lost', 'defaults', 'reconnects'):
        if count := getattr(result, name):
            found.append(f'{count} {name}')
    found += [f'{count} tries failed: {kind}' for kind, count in result.errors.items()]
    if not scenario.returns_at:
        return found
    back = back_at(result, victim, scenario.returns_at)
    if back is None:
        return [*found, f'{victim} never answered again']
    share = share_after(result, victim, back)
    if abs(share - 1 / 3) > SHARE_TOLERANCE:
        found.append(f'the share of {victim} after its return is {100 * share:.1f} %')
    return found


def share_after(result: Result, name: str, back: int) -> float:
    """Return the share of a server since it settled; the last second is not a whole one."""
    servers = result.between(back + SETTLING, int(result.seconds))
    return servers[name] / servers.total() if servers else 0.0


def report(name: str, scenario: Scenario, result: Result, victim: str, margin: float) -> None:
    """Print the figures of a scenario."""
    latency = result.latency
    print(f'{name}: {result.requests} requests in {result.seconds:.1f} s, {latency.over(0.5)} held for over 0.5 s')
    print(f'  held:    p50 {latency.quantile(0.5) * 1000:.1f}, p99 {latency.quantile(0.99) * 1000:.1f},'
          f' max {latency.max * 1000:.1f} ms (allowed {(scenario.held + margin) * 1000:.0f})')  # fmt: skip
    print(f'  errors {result.errors.total()}, defaults {result.defaults}, swapped {result.swapped},'
          f' malformed {result.malformed}, lost {result.lost}, reconnects {result.reconnects}')  # fmt: skip
    print(f'  by second, {victim}: {by_second(result, victim)}')
    print(f'  by second, all: {by_second(result)}')
    back = back_at(result, victim, scenario.returns_at) if scenario.returns_at else None
    if back is not None:
        print(f'  returned at {scenario.returns_at:g} s, asked again in second {back},'
              f' then {100 * share_after(result, victim, back):.1f} % of the requests (due 33.3)')  # fmt: skip


def by_second(result: Result, name: str = '') -> str:
    """Return how many answers a server, or all, gave in each second of the load."""
    seconds = range(max(result.by_second, default=0) + 1)
    found = [result.between(second, second + 1) for second in seconds]
    return ' '.join(str(servers[name] if name else servers.total()) for servers in found)


def run(name: str, scenario: Scenario, plan: Plan, timeout: float, processes: Processes) -> tuple[Result, Process]:
    """Run a scenario; its victim is A."""
    port = free_port()
    victim = PolicyService(processes, 'A')
    if scenario.act is not do_nothing:
        victim.start()
    services = [victim, *processes.policy_services('BC')]
    proxy = processes.proxy(port, *(f'-s{service.service}:10:1:{timeout:g}' for service in services))
    plan.where, plan.seconds = f'127.0.0.1:{port}', scenario.seconds
    load = start_load(plan, processes)
    scenario.act(Scene(victim, load))
    return load.result(), proxy


def check(name: str, scenario: Scenario, plan: Plan, timeout: float, margin: float) -> bool:
    """Run a scenario, print its figures, and return whether its bounds were kept."""
    with Processes() as processes:
        result, proxy = run(name, scenario, plan, timeout, processes)
        log = proxy.log
    report(name, scenario, result, 'A', margin)
    found = faults(scenario, result, 'A', margin)
    for fault in found:
        print(f'  FAILED: {fault}')
    if found:
        print('  the end of its log:\n' + '\n'.join(log.splitlines()[-15:]))
    print(flush=True)
    return not found


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    timeout, margin = float(given['--timeout']), float(given['--margin'])
    known = scenarios(timeout)
    names = given['SCENARIO'] or list(known)
    for name in names:
        if name not in known:
            print(f"check_failover: '{name}' is not one of {', '.join(known)}", file=sys.stderr)
            return 2
    plan = Plan('', int(given['--clients']), 3, rate=float(given['--rate']), patience=60)
    try:
        fine = [check(name, known[name], plan, timeout, margin) for name in names]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print('nothing was lost, and nobody waited too long' if all(fine) else 'FAILED')
    return 0 if all(fine) else 1


if __name__ == '__main__':
    sys.exit(main())

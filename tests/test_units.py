"""The units under a real systemd: they recover, hold the socket, and stop without losing an answer."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import machine
from tests.machine import Machine
from tests.support import ROOT, PolicyServerStub, PostfixClient, SmtpdLoad, echo, request, slow, wait_until

pytestmark = [
    pytest.mark.skipif(bool(machine.missing()), reason=machine.missing()),
    pytest.mark.xdist_group('machine'),
]


@pytest.fixture(scope='module')
def booted(package: Path) -> Iterator[Machine]:
    """A Debian with the package, which has the units of contrib/."""
    with Machine() as running:
        running.offer(package)
        running.install('hapolicy-gevent')
        yield running


class Host:
    """A machine whose hapolicy asks a server that the test runs; both meet at sockets in the machine's directories."""

    def __init__(self, booted: Machine) -> None:
        self.machine = booted
        self.path = str(booted.root / 'var/spool/postfix/hapolicy/socket')
        self.server = PolicyServerStub(echo, path=str(booted.root / 'srv/server'))
        Path(self.server.path).chmod(0o777)
        self.configure()

    def configure(self, *options: str, name: str = 'hapolicy') -> None:
        """Write the options of a unit."""
        text = ' \\\n  '.join(('-l -s A=unix:/srv/server', *options))
        self.machine.write(f'/etc/default/{name}', f'OPTIONS="{text}"\n')

    def show(self, name: str, unit: str = 'hapolicy.service') -> str:
        """Return a property of a unit."""
        return self.machine.run(f'systemctl show --property={name} --value {unit}').strip()

    @property
    def pid(self) -> int:
        """The process that serves; 0 if none does."""
        return int(self.show('MainPID')) if self.show('ActiveState') == 'active' else 0

    def client(self) -> PostfixClient:
        """Connect as Postfix does."""
        return PostfixClient(self.path, 60)

    def close(self) -> None:
        """Stop and forget everything."""
        self.machine.run("systemctl stop 'hapolicy*.socket' 'hapolicy*.service'; systemctl reset-failed", check=False)
        self.server.stop()


@pytest.fixture
def host(booted: Machine) -> Iterator[Host]:
    """A machine with a server, and nothing of hapolicy's that runs."""
    running = Host(booted)
    try:
        yield running
    finally:
        running.close()


def test_the_first_client_starts_the_service_and_the_socket_is_postfixs_alone(host: Host) -> None:
    host.machine.run('systemctl start hapolicy.socket')
    assert host.pid == 0
    assert host.machine.run('stat -c "%U %G %a" /var/spool/postfix/hapolicy/socket') == 'root postfix 660\n'
    with host.client() as client:
        assert client.ask_own() == 'A'
    assert host.pid
    users = re.search(r'^Uid:(.*)$', host.machine.run(f'cat /proc/{host.pid}/status'), re.MULTILINE)
    assert users and all(int(user) >= 61184 for user in users[1].split()), 'a user of its own, not root'
    host.machine.run('systemctl stop hapolicy.socket')
    assert not Path(host.path).exists() and host.show('ActiveState') == 'inactive'


@pytest.mark.parametrize('name', ['hapolicy', 'hapolicy@spf'])
def test_it_starts_before_postfix_when_the_machine_boots(host: Host, name: str) -> None:
    host.configure(name=name.replace('@', '-'))
    host.machine.run(f'systemctl enable {name}')
    try:
        host.machine.reboot()
        units = (f'{name}.socket', f'{name}.service', 'postfix@-.service')
        active = [int(host.show('ActiveEnterTimestampMonotonic', unit)) for unit in units]
        begun = int(host.show('InactiveExitTimestampMonotonic', units[-1]))
        assert 0 < active[0] < active[1] < begun < active[2], (active, begun)
    finally:
        host.machine.run(f'systemctl disable --now {name}')


@pytest.mark.parametrize('name', ['hapolicy', 'hapolicy@spf'])
def test_its_exposure_is_a_small_one(host: Host, name: str) -> None:
    """1.5 of 10, as the unit says."""
    said = host.machine.run(f'systemctl start {name}; systemd-analyze security --no-pager {name}.service')
    exposure = re.search(r'Overall exposure level for \S+: ([0-9.]+) ', said)
    assert exposure and float(exposure[1]) <= 1.5, said


def test_six_kills_in_a_row_are_recovered_from(host: Host) -> None:
    """Five quick failures are systemd's limit: the unit has none. Its socket stays open, and who connects waits."""
    host.machine.run('systemctl start hapolicy')
    inode = Path(host.path).stat().st_ino
    for count in range(6):
        wait_until(lambda count=count: host.pid and host.show('NRestarts') == str(count))  # type: ignore[misc]
        host.machine.run('systemctl kill --signal=KILL hapolicy')
    with host.client() as client:
        assert client.ask_own() == 'A'
    assert (Path(host.path).stat().st_ino, host.show('NRestarts')) == (inode, '6')


@pytest.mark.parametrize('command', ['kill --signal=KILL', 'restart'])
def test_kills_and_restarts_under_load_cost_no_request(host: Host, command: str) -> None:
    """After a kill Postfix's second try, a second later, is answered by the next process; a restart needs none."""
    host.server.behaviour = slow(0.02)
    host.machine.run('systemctl start hapolicy')
    load = SmtpdLoad(host.path, 16)
    with load:
        for _ in range(3):
            host.machine.run(f'systemctl {command} hapolicy')
            load.flows()
    assert bool(load.lost) == (command != 'restart'), load.lost[:5]


def test_a_stop_under_load_answers_what_is_in_flight_and_leaves_no_socket(host: Host) -> None:
    host.server.behaviour = slow(1)
    host.machine.run('systemctl start hapolicy')
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(host.client()) for _ in range(40)]
        for number, client in enumerate(clients):
            client.send(request(instance=f'in.flight.{number}'))
        wait_until(lambda: len(host.server.requests) == 40, what='the requests are in flight')
        host.machine.run('systemctl stop hapolicy.socket hapolicy.service')
        for number, client in enumerate(clients):
            assert client.read_answer() == b'action=DUNNO in.flight.%d A\n\n' % number
            assert client.at_end()
    assert (host.show('Result'), host.show('ExecMainStatus')) == ('success', '0')
    assert not Path(host.path).exists() and [*Path(host.path).parent.iterdir()] == []


def test_a_port_that_is_busy_for_five_seconds_is_waited_for(host: Host) -> None:
    busy = 'import socket,time; s=socket.create_server(("127.0.0.1",10060)); time.sleep(5)'
    host.configure('--listen=127.0.0.1:10060')
    host.machine.run(f"systemd-run --quiet --collect --unit=busy python3 -c '{busy}'")
    wait_until(lambda: host.machine.run("grep -c ':274C 00000000:0000 0A' /proc/net/tcp", check=False) == '1\n')
    host.machine.run('systemctl start --no-block hapolicy')
    wait_until(lambda: int(host.show('NRestarts')) >= 2, what='it was tried again')
    wait_until(lambda: host.pid and host.show('ActiveState', 'busy.service') != 'active', what='it serves')
    with host.client() as client:
        assert client.ask_own() == 'A'
    assert 'Address already in use' in host.machine.run('journalctl -u hapolicy -p err -n 20 --no-pager')


def test_an_option_that_cannot_be_used_is_said_once_and_refuses_clients(host: Host) -> None:
    """It is not started again and again, who asks is told at once, and a start after the repair suffices."""
    host.configure('--nonsense')
    host.machine.run('systemctl start hapolicy', check=False)
    assert (host.show('ActiveState'), host.show('NRestarts'), host.show('ExecMainStatus')) == ('failed', '0', '2')
    assert 'nonsense' in host.machine.run('journalctl -u hapolicy -p err -n 3 --no-pager')
    begun = time.monotonic()
    with host.client() as client, contextlib.suppress(ConnectionResetError):
        client.send(request())
        assert client.read_answer() == b''
    wait_until(lambda: not Path(host.path).exists(), what='nobody can connect')
    assert time.monotonic() - begun < 60
    host.configure()
    host.machine.run('systemctl start hapolicy')
    with host.client() as client:
        assert client.ask_own() == 'A'


def test_a_value_with_blanks_reaches_the_program_as_one(host: Host) -> None:
    host.configure("--default='451 4.7.1 Try later'", '--summary=0')
    host.server.stop()
    host.machine.run('systemctl start hapolicy')
    with host.client() as client:
        assert client.ask(request()) == '451 4.7.1 Try later'


def test_the_question_in_the_readme_is_answered(host: Host) -> None:
    found = re.search(r"^ +\$ (printf .* \| nc .*)\n +(action=\w+)$", (ROOT / 'README.md').read_text(), re.MULTILINE)
    assert found
    host.machine.install('netcat-openbsd')
    host.machine.run('systemctl start hapolicy')
    assert host.machine.run(found[1]).startswith(found[2])


def test_instances_have_options_sockets_and_names_of_their_own(host: Host) -> None:
    for name, action in (('spf', '550 no SPF'), ('grey', '450 later')):
        host.machine.write(f'/etc/default/hapolicy-{name}', f'OPTIONS="-s X=127.0.0.1:9 --default=\'{action}\'"\n')
    host.machine.run('systemctl start hapolicy@spf hapolicy@grey')
    for name, action in (('spf', '550 no SPF'), ('grey', '450 later')):
        with PostfixClient(str(Path(host.path).with_name(name))) as client:
            assert client.ask(request()) == action
        assert 'serves up to' in host.machine.run(f'journalctl -t {name} -u hapolicy@{name} --no-pager')


def test_an_upgrade_restarts_each_instance_that_runs_and_starts_no_other(host: Host) -> None:
    units = [f'hapolicy@{name}.service' for name in ('spf', 'grey', 'quota')]
    for name in ('spf', 'grey', 'quota'):
        host.configure(name=f'hapolicy-{name}')
    host.machine.run(f'systemctl start {units[0]} {units[1]}')
    before = [host.show('MainPID', unit) for unit in units]
    host.machine.run('apt-get install -y --reinstall hapolicy-gevent')
    wait_until(lambda: all(host.show('ActiveState', unit) == 'active' for unit in units[:2]))
    after = [host.show('MainPID', unit) for unit in units]
    assert after[0] != before[0] and after[1] != before[1] and after[2] == before[2] == '0', (before, after)
    assert host.pid == 0


def test_instances_with_reuse_port_serve_one_port(host: Host) -> None:
    for name in '12':
        host.configure('--listen=127.0.0.1:10060 --reuse-port', name=f'hapolicy-{name}')
    host.machine.run('systemctl start hapolicy@1 hapolicy@2')
    listening = host.machine.run("grep ':274C 00000000:0000 0A' /proc/net/tcp")
    assert len(listening.splitlines()) == 2
    asked = 'exec 3<>/dev/tcp/127.0.0.1/10060; printf "request=smtpd_access_policy\\n\\n" >&3; head -n 1 <&3'
    for _ in range(8):
        assert re.match('action=DUNNO', host.machine.run(f"bash -c '{asked}'"))

"""Debian's policy servers behind the proxy: the verdicts that they give directly, also after a restart of them.

test_postfix.py has postgrey and postfwd, as mail meets them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.postfix import Postfix, accepts, arguments, missing_programs, processes
from tests.status import StatusProxy
from tests.support import ROOT, PostfixClient, free_port, new_instance, request, wait_until

#: A file of each of Debian's packages that are needed.
PROGRAMS = {
    '/usr/bin/policyd-spf': 'postfix-policyd-spf-python',
    '/usr/sbin/postfix-policyd-spf-perl': 'postfix-policyd-spf-perl',
    '/usr/sbin/sqlgrey': 'sqlgrey',
    '/usr/bin/policyd-rate-limit': 'policyd-rate-limit',
    '/usr/sbin/policyd-weight': 'policyd-weight',
    '/usr/lib/dovecot/quota-status': 'dovecot-core',
}
MISSING = [package for program, package in PROGRAMS.items() if not os.path.exists(program)]

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason='not root, who alone can start them as Debian does'),
    pytest.mark.skipif(bool(MISSING or missing_programs()), reason=f'not installed: {MISSING} {missing_programs()}'),
]


class Daemon:
    """A server in the foreground, at a port or a path, to be killed and started again."""

    def __init__(self, where: int | str, command: list[str]) -> None:
        self.where, self._command = where, command
        self.start()

    def _listens(self) -> bool:
        if isinstance(self.where, int):
            return accepts(self.where)
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.where) == 0

    def start(self) -> None:
        """Start it; return when it listens."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        wait_until(self._listens, what=f'{self._command[0]} listens')

    def kill(self) -> None:
        """Kill all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    close = kill


class Spawned:
    """A program that spawn(8) of a Postfix runs, one for each connection, as user nobody."""

    def __init__(self, port: int, command: list[str]) -> None:
        self.where, self._program = port, command[0]
        line = f'127.0.0.1:{port} inet n n n - 0 spawn\n  user=nobody argv={" ".join(command)}\n'
        self._postfix = Postfix(master=line, settings={f'127.0.0.1:{port}_time_limit': '3600'})
        self._postfix.__enter__()

    def start(self) -> None:
        """Nothing to do: spawn starts the next one when it is asked."""

    def kill(self) -> None:
        """Kill all processes of the program."""
        for pid in processes(self._postfix.directory):
            if self._program in arguments(pid)[:2]:  # spawn itself has it behind argv=
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop Postfix."""
        self._postfix.close()


def spf_python(directory: Path, port: int) -> Spawned:
    settings = 'skip_addresses = 127.0.0.0/8\nWhitelist = 198.51.100.0/24\ndebugLevel = 0\n'
    (directory / 'conf').write_text(settings)
    return Spawned(port, ['/usr/bin/policyd-spf', f'{directory}/conf'])


def spf_perl(directory: Path, port: int) -> Spawned:
    return Spawned(port, ['/usr/sbin/postfix-policyd-spf-perl'])


def sqlgrey(directory: Path, port: int) -> Daemon:
    shutil.copytree('/etc/sqlgrey', directory / 'lists')
    (directory / 'lists' / 'clients_ip_whitelist').write_text('198.51.100.7\n')
    settings = {'conf_dir': f'{directory}/lists', 'inet': str(port), 'pidfile': f'{directory}/pid', 'db_type': 'SQLite',
                'db_name': f'{directory}/sqlgrey.db', 'user': 'sqlgrey', 'group': 'sqlgrey'}  # fmt: skip
    (directory / 'conf').write_text(''.join(f'{name} = {value}\n' for name, value in settings.items()))
    shutil.chown(directory, 'sqlgrey')
    return Daemon(port, ['/usr/sbin/sqlgrey', '-f', f'{directory}/conf'])


def rate_limit(directory: Path, port: int) -> Daemon:
    text = Path('/etc/policyd-rate-limit.yaml').read_text()
    for name, value in {'pidfile': f'"{directory}/pid"', 'SOCKET': f'"{directory}/socket"', 'debug': 'False',
                        '    database': f'"{directory}/db"', 'limits': '\n    - [2, 600]'}.items():  # fmt: skip
        text = re.sub(rf'^{name}:.*(\n    - .*)*', f'{name}: {value}', text, count=1, flags=re.MULTILINE)
    (directory / 'conf.yaml').write_text(text)
    shutil.chown(directory, 'policyd-rate-limit')
    return Daemon(f'{directory}/socket', ['/usr/bin/policyd-rate-limit', '--file', f'{directory}/conf.yaml'])


def weight(directory: Path, port: int) -> Daemon:
    (directory / 'lock').mkdir(mode=0o700)
    shutil.chown(directory / 'lock', 'polw')
    settings = {'LOCKPATH': f'{directory}/lock', 'SPATH': f'{directory}/lock/socket', 'PIDFILE': f'{directory}/pid',
                'TCP_PORT': str(port - 1)}  # -d adds 1 to the port  # fmt: skip
    (directory / 'conf').write_text(''.join(f'${name} = "{value}";\n' for name, value in settings.items()) + '1;\n')
    return Daemon(port, ['/usr/sbin/policyd-weight', '-d', '-f', f'{directory}/conf', 'start'])


QUOTA = """\
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
ssl = no
protocols =
first_valid_uid = 1
mail_location = maildir:{directory}/mail/%u
mail_plugins = quota
passdb {
  driver = static
  args = nopassword=y
}
userdb {
  driver = static
  args = uid=mail gid=mail home={directory}/mail/%u allow_all_users=yes
}
plugin {
  quota = count:User quota
  quota_rule = *:storage=10M
  quota_vsizes = yes
  quota_status_success = DUNNO
  quota_status_overquota = 552 5.2.2 Mailbox is full
}
service quota-status {
  executable = quota-status -p postfix
  inet_listener {
    address = 127.0.0.1
    port = {port}
  }
  client_limit = 1
}
"""


def quota(directory: Path, port: int) -> Daemon:
    (directory / 'mail').mkdir()
    shutil.chown(directory / 'mail', 'mail', 'mail')
    (directory / 'conf').write_text(QUOTA.replace('{directory}', str(directory)).replace('{port}', str(port)))
    return Daemon(port, ['/usr/sbin/dovecot', '-F', '-c', f'{directory}/conf'])


@dataclass
class Case:
    """A server, what it is asked, and a part of each of its answers."""

    start: Callable[[Path, int], Daemon | Spawned]
    questions: list[dict[str, str]]
    expected: list[str]
    after: list[str] = field(default_factory=list)  # a restart, where that is other


CASES = {
    'policyd-spf (Python)': Case(
        spf_python, [{'client_address': '127.0.0.1'}, {'client_address': '198.51.100.7'}],
        ['local connections', 'whitelist']),
    'policyd-spf-perl': Case(
        spf_perl, [{'client_address': '127.0.0.1'}, {'client_address': '::1'}], ['localhost', 'localhost']),
    'sqlgrey': Case(
        sqlgrey, [{}, {}, {'client_address': '198.51.100.7'}], ['Greylisted', 'Greylisted', 'whitelisted']),
    'policyd-rate-limit': Case(
        rate_limit, [{'sasl_username': 'alice'}] * 3, ['dunno', 'dunno', 'Rate limit'], ['Rate limit'] * 3),
    'policyd-weight': Case(
        weight, [{'sender': ''}, {'sender': '', 'client_address': '127.0.0.1'}], ['NULL', 'NULL']),
    'Dovecot quota-status': Case(
        quota, [{'size': '1000'}, {'size': '99000000'}], ['DUNNO', '552 5.2.2']),
}  # fmt: skip


@contextlib.contextmanager
def running(case: Case) -> Iterator[Daemon | Spawned]:
    with tempfile.TemporaryDirectory(prefix='hapolicy-server-', ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # the servers' own users go through
        server = case.start(Path(name), free_port())
        try:
            yield server
        finally:
            server.close()


def ask(where: int | str, case: Case) -> list[str]:
    """Ask all questions, each of a message and on a connection of its own; return the answers without their numbers."""
    said = []
    for question in case.questions:
        with PostfixClient(where) as client:
            client.send(request(instance=new_instance(), **question))
            said.append(re.sub(r'\d+', '#', client.read_answer().decode().strip()))
    return said


@pytest.mark.parametrize('name', CASES)
def test_its_verdicts_are_those_given_directly_also_after_a_restart(name: str) -> None:
    case = CASES[name]
    with running(case) as direct, running(case) as behind:
        place = f'127.0.0.1:{behind.where}' if isinstance(behind.where, int) else f'unix:{behind.where}'
        with StatusProxy('-s', f'A={place}', '--default=451 4.3.0 nobody answered') as proxy:

            def service() -> dict[str, Any]:
                found: dict[str, Any] = json.loads(proxy.get('/status.json').text)['services'][0]
                return found

            for expected in (case.expected, case.after or case.expected):
                wait_until(lambda: service()['state'] == 'up' and service()['idle_connections'], what='a check passes')
                verdicts = ask(direct.where, case)
                for verdict, part in zip(verdicts, expected, strict=True):
                    assert re.sub(r'\d+', '#', part) in verdict
                assert ask(proxy.port, case) == verdicts
                used = service()['use']
                for server in (direct, behind):
                    server.kill()
                    server.start()
                time.sleep(0.3)  # the end of a connection is seen at once
        assert 'Default action' not in proxy.log, proxy.log
    rows = re.findall(r'^\| (.*) \|$', (ROOT / 'docs' / 'operations.md').read_text(), re.MULTILINE)
    [row] = [row for row in rows if row.startswith(f'{name} |') and row.count(' | ') == 5]
    assert used in row, f'{name} is {used}'

"""Debian's policy servers behind the proxy: the verdicts that they give directly, also after a restart of them.

What operations.md says of the check there is held to what they do. test_postfix.py has postgrey and postfwd as mail
meets them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import postfix
from tests.postfix import Postfix, arguments, missing_programs, processes
from tests.status import StatusProxy
from tests.support import MODULE, ROOT, SCALE, PostfixClient, accepts, free_port, new_instance, request, wait_until

#: A file of each of Debian's packages that are needed.
PROGRAMS = {
    '/usr/bin/mtpolicyd': 'mtpolicyd',
    '/usr/bin/policyd-spf': 'postfix-policyd-spf-python',
    '/usr/sbin/postfix-policyd-spf-perl': 'postfix-policyd-spf-perl',
    '/usr/sbin/sqlgrey': 'sqlgrey',
    '/usr/bin/policyd-rate-limit': 'policyd-rate-limit',
    '/usr/sbin/policyd-weight': 'policyd-weight',
    '/usr/lib/dovecot/quota-status': 'dovecot-core',
}
MISSING = [package for program, package in PROGRAMS.items() if not os.path.exists(program)]
assert not MISSING or os.geteuid() != 0 or os.environ.get('CI') != 'true', f'not installed: {MISSING}'

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason='not root, who alone can start them as Debian does'),
    pytest.mark.skipif(bool(MISSING or missing_programs()), reason=f'not installed: {MISSING} {missing_programs()}'),
]


class Daemon:
    """A server in the foreground, at a port or a path, to be killed and started again; `log` is what it says."""

    def __init__(self, where: int | str, log: Path, command: list[str]) -> None:
        self.where, self.log, self._command = where, log, command
        self.start()

    def _listens(self) -> bool:
        if isinstance(self.where, int):
            return accepts(self.where)
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.where) == 0

    def start(self) -> None:
        """Start it; return when it listens."""
        with self.log.open('ab') as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True)  # fmt: skip
        wait_until(self._listens, what=f'{self._command[0]} listens')

    def kill(self) -> None:
        """Kill all its processes; return when none listens."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not self._listens(), what=f'{self._command[0]} has ended')  # its children, too

    close = kill


class Background:
    """A server that puts itself in the background, and logs to syslog."""

    log = None

    def __init__(self, where: int, directory: Path, command: list[str]) -> None:
        self.where, self._daemon = where, postfix.Daemon(where, directory)
        self._daemon.start(*command)
        self.start, self.kill, self.close = self._daemon.start_again, self._daemon.kill, self._daemon.kill


class Spawned:
    """A program that spawn(8) of a Postfix runs, one for each connection, as user nobody; it logs to syslog."""

    log = None

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


Server = Daemon | Background | Spawned


def postgrey(directory: Path, port: int) -> Daemon:
    (directory / 'clients').write_text('198.51.100.7\n')
    (directory / 'data').mkdir()
    shutil.chown(directory / 'data', 'postgrey')
    return Daemon(port, directory / 'log', ['/usr/sbin/postgrey', f'--inet=127.0.0.1:{port}', '--delay=4',
                  f'--whitelist-clients={directory}/clients', f'--dbdir={directory}/data'])  # fmt: skip


def postfwd(directory: Path, port: int) -> Background:
    (directory / 'rules').write_text('id=A; sender==spam@example.net; action=REJECT no spam\n')
    shutil.chown(directory, 'postfw')
    return Background(port, directory, [
        '/usr/sbin/postfwd', '--nodns', f'--cache_socket=unix::{directory}/cache', '--daemon',
        f'--file={directory}/rules', '--interface=127.0.0.1', f'--port={port}', '--user=postfw', '--group=postfw',
        f'--pidfile={directory}/pid'])  # fmt: skip


MTPOLICYD = """\
user = mtpolicyd
group = mtpolicyd
port = "127.0.0.1:{port}"
pid_file = "{directory}/pid"
<SessionCache>
  module = "None"
</SessionCache>
<VirtualHost {port}>
  name = "test"
  <Plugin spam>
    module = "Condition"
    key = "sender"
    match = "spam@example.net"
    action = "REJECT no spam"
  </Plugin>
</VirtualHost>
"""


def mtpolicyd(directory: Path, port: int) -> Daemon:
    (directory / 'conf').write_text(MTPOLICYD.replace('{directory}', str(directory)).replace('{port}', str(port)))
    shutil.chown(directory, 'mtpolicyd')
    return Daemon(port, directory / 'log', ['/usr/bin/mtpolicyd', '-f', '-c', f'{directory}/conf'])


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
    return Daemon(port, directory / 'log', ['/usr/sbin/sqlgrey', '-f', f'{directory}/conf'])


def rate_limit(directory: Path, port: int) -> Daemon:
    text = Path('/etc/policyd-rate-limit.yaml').read_text()
    for name, value in {'pidfile': f'"{directory}/pid"', 'SOCKET': f'"{directory}/socket"', 'debug': 'False',
                        '    database': f'"{directory}/db"', 'limits': '\n    - [2, 600]'}.items():  # fmt: skip
        text = re.sub(rf'^{name}:.*(\n    - .*)*', f'{name}: {value}', text, count=1, flags=re.MULTILINE)
    (directory / 'conf.yaml').write_text(text)
    shutil.chown(directory, 'policyd-rate-limit')
    return Daemon(f'{directory}/socket', directory / 'log',
                  ['/usr/bin/policyd-rate-limit', '--file', f'{directory}/conf.yaml'])  # fmt: skip


def weight(directory: Path, port: int) -> Daemon:
    (directory / 'lock').mkdir(mode=0o700)
    shutil.chown(directory / 'lock', 'polw')
    settings = {'LOCKPATH': f'{directory}/lock', 'SPATH': f'{directory}/lock/socket', 'PIDFILE': f'{directory}/pid',
                'TCP_PORT': str(port - 1)}  # -d adds 1 to the port  # fmt: skip
    (directory / 'conf').write_text(''.join(f'${name} = "{value}";\n' for name, value in settings.items()) + '1;\n')
    return Daemon(port, directory / 'log', ['/usr/sbin/policyd-weight', '-d', '-f', f'{directory}/conf', 'start'])


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
    return Daemon(port, directory / 'log', ['/usr/sbin/dovecot', '-F', '-c', f'{directory}/conf'])


@dataclass
class Case:
    """A server, what it is asked, and a part of each of its answers."""

    start: Callable[[Path, int], Server]
    questions: list[dict[str, str]]
    expected: list[str]
    after: list[str] = field(default_factory=list)  # a restart, where that is other
    pause: float = 0.3  # seconds between both


CASES = {
    'postgrey': Case(
        postgrey, [{}, {}, {'client_address': '198.51.100.7'}], ['Greylisted', 'Greylisted', 'DUNNO'],
        ['X-Greylist: delayed', 'DUNNO', 'DUNNO'], pause=5),
    'postfwd': Case(postfwd, [{'sender': 'spam@example.net'}, {}], ['REJECT no spam', 'DUNNO']),
    'mtpolicyd': Case(mtpolicyd, [{'sender': 'spam@example.net'}, {}], ['REJECT no spam', 'dunno']),
    'policyd-spf (Python)': Case(
        spf_python, [{'client_address': '127.0.0.1'}, {'client_address': '198.51.100.7'}],
        ['local connections', 'whitelist']),
    'policyd-spf-perl': Case(
        spf_perl, [{'client_address': '127.0.0.1'}, {'helo_name': 'mail', 'sender': ''}],
        ['localhost', 'none (mail: ']),
    'sqlgrey': Case(
        sqlgrey, [{}, {}, {'client_address': '198.51.100.7'}], ['Greylisted', 'Greylisted', 'whitelisted']),
    'policyd-rate-limit': Case(
        rate_limit, [{'sasl_username': 'alice'}] * 3, ['dunno', 'dunno', 'Rate limit'], ['Rate limit'] * 3),
    'policyd-weight': Case(
        weight, [{'sender': ''}, {'recipient': 'postmaster@example.org'}], ['NULL', 'mail for postmaster@example.org']),
    'Dovecot quota-status': Case(
        quota, [{'size': '1000'}, {'size': '99000000'}], ['DUNNO', '552 5.2.2']),
}  # fmt: skip


@contextlib.contextmanager
def running(case: Case) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix='hapolicy-server-', ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # the servers' own users go through
        server = case.start(Path(name), free_port())
        try:
            yield server
        finally:
            server.close()


def place(server: Server) -> str:
    """Return where a server listens, as -s has it."""
    return f'127.0.0.1:{server.where}' if isinstance(server.where, int) else f'unix:{server.where}'


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
        with StatusProxy('-s', f'A={place(behind)}', '--default=451 4.3.0 nobody answered') as proxy:

            def service() -> dict[str, Any]:
                found: dict[str, Any] = json.loads(proxy.get('/status.json').text)['services'][0]
                return found

            for expected in (case.expected, case.after or case.expected):
                wait_until(lambda: service()['state'] == 'up' and service()['idle_connections'],
                           what=lambda: f'a check passes: {service()}\n{proxy.log}')  # fmt: skip
                verdicts = ask(direct.where, case)
                for verdict, part in zip(verdicts, expected, strict=True):
                    assert re.sub(r'\d+', '#', part) in verdict
                assert ask(proxy.port, case) == verdicts
                used = service()['use']
                for server in (direct, behind):
                    server.kill()
                    server.start()
                time.sleep(case.pause)  # the end of a connection is seen at once
        assert 'Default action' not in proxy.log, proxy.log
    assert documented(name)[4] == used


def documented(name: str) -> list[str]:
    """Return what operations.md says of a server: its name, its answer, what it stores and logs, use and max."""
    lines = re.findall(r'^\| (.*) \|$', (ROOT / 'docs' / 'operations.md').read_text(), re.MULTILINE)
    rows: list[list[str]] = [line.split(' | ') for line in lines]
    [row] = [row for row in rows if row[0] == name and len(row) == 6]
    return row


def ask_ours(server: Server) -> str:
    """Ask the check; return what is said of its answer."""
    command = [sys.executable, str(MODULE), '--check-services', f'-sA={place(server)}']
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60 * SCALE).stdout


@pytest.mark.parametrize('name', CASES)
def test_what_it_answers_to_the_check_and_logs_of_it_is_documented(name: str) -> None:
    _, answers, _, logs, *_ = documented(name)
    with running(CASES[name]) as server:
        before = server.log.read_text() if server.log is not None else ''
        said = ask_ours(server)
        assert any(all(part in said for part in quoted.split(' ... ')) for quoted in re.findall('`(.+?)`', answers))
        if server.log is not None:
            time.sleep(0.5)
            logged = server.log.read_text().removeprefix(before)
            assert logged == '' if logs.startswith('nothing') else re.findall('`(.+?)`', logs)[0] in logged, logged


def tables(path: Path) -> dict[str, list[Any]]:
    """Return the rows of each table of SQLite that has any."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        found = {name: database.execute(f'select * from {name}').fetchall() for name in names}
    return {name: rows for name, rows in found.items() if rows and name != 'config'}


#: Writes the keys of both databases of a postgrey that has ended.
KEYS = """
use BerkeleyDB;
my $env = BerkeleyDB::Env->new(-Home => $ARGV[0], -Flags => DB_CREATE|DB_RECOVER|DB_INIT_TXN|DB_INIT_MPOOL|DB_INIT_LOG);
for my $name ('postgrey.db', 'postgrey_clients.db') {
    tie my %entries, 'BerkeleyDB::Btree', -Filename => $name, -Env => $env or die $BerkeleyDB::Error;
    print map { "$name $_\n" } keys %entries;
}
"""


def test_what_the_check_writes_into_databases_is_what_is_documented() -> None:
    """An entry of a greylist that no mail can match, at first; once its delay is over, 127.0.0.1 is counted once."""
    with running(CASES['postgrey']) as server:
        assert server.log is not None
        for _ in range(3):
            ask_ours(server)
            time.sleep(2.5)  # the third time the delay is over
        server.kill()
        keys = subprocess.run(['perl', '-e', KEYS, server.log.parent / 'data'], stdout=subprocess.PIPE, check=True)
        assert keys.stdout.decode() == 'postgrey.db 127.0.0.0//\npostgrey_clients.db 127.0.0.1\n'
    with running(CASES['sqlgrey']) as server:
        assert server.log is not None
        for _ in range(3):
            ask_ours(server)
        [(table, [row])] = tables(server.log.parent / 'sqlgrey.db').items()
        assert (table, *row[:4]) == ('connect', '-undef-', '-undef-', '127.0.0', '')
    with running(CASES['policyd-rate-limit']) as server:
        assert server.log is not None
        ask_ours(server)
        assert tables(server.log.parent / 'db') == {}

"""The command line: every mistake is one line and a status; stdin/stdout mode for spawn(8) and pipes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hapolicy_gevent
from hapolicy_gevent import parse_command_line, review
from tests.servers import checked
from tests.support import (
    ACTIVATED,
    MODULE,
    ROOT,
    SCALE,
    Behaviour,
    ProxyProcess,
    answer,
    echo,
    free_port,
    hang,
    hang_up,
    new_instance,
    request,
    slow,
    stubs,
    wait_until,
)

ONE = b'request=smtpd_access_policy\ninstance=%s\n\n'


def run(*arguments: str, stdin: bytes = b'') -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, str(MODULE), *arguments], input=stdin, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([], '--service'),
        (['-s', 'a'], "'a'"),
        (['-s', 'a=h:0'], "port '0'"),
        (['-s', 'a=h:1:x'], "prio 'x'"),
        (['-s', 'a=h:1', '-s', 'a=h:2'], "'a' is given twice"),
        (['-s', 'a=h:1', '-d', ''], '--default'),
        (['-s', 'a=h:1', '-d', '550'], 'bare number'),
        (['-s', 'a=h:1', '-d', 'a\nb'], 'line break'),
        (['-s', 'a=h:1', '--failed='], "--failed ''"),
        (['-s', 'a=h:1', '--failed=550'], "--failed '550': the bare number 550"),
        (['-s', 'a=h:1', '--listen=nonsense'], "'nonsense'"),
        (['-s', 'a=h:1', '--listen=localhost:10060'], "'localhost:10060': a name"),
        (['-s', 'a=127.0.0.1%lo:1'], "'127.0.0.1%lo'"),
        (['-s', 'a=127.0.0.1:1', '--listen=[::1]:1', '--listen=127.0.0.1:1'], "'a': 127.0.0.1:1"),
        (['-s', 'a=unix:/s:1', '--listen=unix:/s'], "'a': unix:/s"),
        (['-s', 'a=h:1', '--listen=127.0.0.1:65536'], "'65536'"),
        (['-s', 'a=h:1', '--socket-mode=999'], "'999'"),
        (['-s', 'a=h:1', '--deadline=0'], "--deadline '0'"),
        (['-s', 'a=h:1', '--deadline=0.005'], "--deadline '0.005' is not a number of seconds from 0.1"),
        (['-s', 'a=h:1', '--deadline=soon'], "--deadline 'soon'"),
        (['-s', 'a=h:1', '--max-clients=0'], "--max-clients '0'"),
        (['-s', 'a=h:1', '--fall=0'], "--fall '0'"),
        (['-s', 'a=h:1', '--stall=-1'], "--stall '-1'"),
        (['-s', 'a=h:1', '--summary=-1'], "--summary '-1'"),
        (['-s', 'a=h:1', '--frobnicate'], "'--frobnicate'"),
        (['-s', 'a=h:1', '-x'], "'-x'"),
        (['-s', 'a=h:1', 'word'], 'word'),
        (['-s', 'a=h:1', '-d', '451', 'later'], 'quote values with blanks'),
        (['-d', '-s', 'a=h:1'], 'give each option its value'),
        (['-s', 'a=h:1', '--listen', '-l'], "--listen '-l'"),
        (['-s', 'a=h:1', '--', '-l'], "'-s a=h:1 -- -l': a word is no option"),
        (['-s', 'a=h:1', '--name='], "--name '' is not 1 to 32 letters"),
        (['-s', 'a=h:1', '--name=' + 33 * 'x'], "xx' is not 1 to 32 letters"),
        (['-s', 'a=h:1', '--name=a b'], "--name 'a b' is not"),
        (['-s', 'a=h:1', '--name=a[1]:'], "--name 'a[1]:' is not"),
        (['-s', 'a=h:1', '--logging=yes'], '--logging must not have an argument'),
        (['-s', 'a=h:1', '--s=x'], '--s is not a unique prefix'),
    ],
)
def test_a_mistake_ends_the_start_with_one_line_and_status_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == b''
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith('hapolicy: ') and said in lines[0], lines


OPTIONS = re.findall(r'^  (?:(-.), )?(--[a-z-]+)[ =][<A-Z]', hapolicy_gevent.__doc__ or '', re.MULTILINE)


@pytest.mark.parametrize('option', sorted(name for pair in OPTIONS for name in pair if name))
def test_each_option_without_its_value_is_named(option: str) -> None:
    assert len(OPTIONS) > 11
    done = run('-s', 'a=h:1', option)
    assert (done.returncode, done.stderr.count(b'\n')) == (2, 1)
    assert f'hapolicy: {option} requires argument' in done.stderr.decode()


def test_an_address_that_cannot_be_listened_on_ends_the_start_with_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        where = f'127.0.0.1:{taken.getsockname()[1]}'
        done = run('-s', 'a=h:1', f'--listen={where}')
        assert done.returncode == 1
        assert done.stderr.decode().count('\n') == 1
        assert where in done.stderr.decode() and 'Address already in use' in done.stderr.decode()
    for where in ('192.0.2.1:10060', '[fe80::1%nowhere]:1', 'unix:/no/such/directory/s', f'unix:{MODULE}'):
        done = run('-s', 'a=h:1', f'--listen={where}')
        assert (done.returncode, done.stderr.decode().count('\n')) == (1, 1), done.stderr
        assert where in done.stderr.decode()


def link_local() -> str:
    """Return an address of this machine that is valid at one interface alone, as getaddrinfo(3) takes it."""
    for line in Path('/proc/net/if_inet6').read_text().splitlines():
        digits, _, _, scope, flags, interface = line.split()
        if scope == '20' and not int(flags, 16) & 0x40:  # not tentative
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)) + f'%{interface}'
    pytest.skip('this machine has no link-local address')


def test_a_link_local_address_is_listened_on_at_its_interface() -> None:
    host, port = link_local(), free_port()
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, f'--listen=[{host}]:{port}') as proxy:
        assert f'[{host}]:{port}' in proxy.log
        with socket.create_connection((host, port), 20) as client:
            client.sendall(ONE % b'i')
            assert client.recv(1000) == b'action=DUNNO i A\n\n'


def test_what_systemd_hands_over_is_checked(tmp_path: Path) -> None:
    def start(*arguments: str, count: str = '1', service: str = 'a=h:1') -> tuple[int, bytes]:
        done = subprocess.run(
            [sys.executable, '-c', ACTIVATED, sys.executable, str(MODULE), '-s', service, *arguments],
            env={**os.environ, 'LISTEN_FDS': count}, capture_output=True, timeout=30,
            pass_fds=[3], preexec_fn=lambda: os.dup2(handed.fileno(), 3),
        )  # fmt: skip
        return done.returncode, done.stderr

    with (tmp_path / 'file').open('w') as handed:
        status, said = start()
        assert status == 1 and said.count(b'\n') == 1 and b'descriptor 3' in said
        status, said = start(count='abc')
        assert status == 2 and said.count(b'\n') == 1 and b"LISTEN_FDS 'abc'" in said
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handed:  # type: ignore[assignment]
        assert start()[0] == 1
    handed, theirs = socket.socketpair()  # type: ignore[assignment]
    with handed, theirs:
        status, said = start()
        assert status == 1 and said.count(b'\n') == 1 and b'Accept=no' in said
    with socket.create_server(('127.0.0.1', 0)) as handed:  # type: ignore[assignment]
        where = f'127.0.0.1:{handed.getsockname()[1]}'  # type: ignore[attr-defined]
        status, said = start(service=f'a={where}')
        assert status == 2 and said.count(b'\n') == 1 and where.encode() in said and b'itself' in said


def test_too_few_descriptors_for_the_listeners_are_one_line() -> None:
    listens = [f'--listen=127.0.0.1:{free_port()}' for _ in range(16)]
    command = ['prlimit', '--nofile=16', sys.executable, str(MODULE), '-s', 'a=h:1', *listens]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr.count(b'\n')) == (1, 1) and b'--listen' in done.stderr, done.stderr


def test_ctrl_c_ends_a_check_without_a_traceback() -> None:
    with stubs(hang) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service, '--check-services']
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            wait_until(lambda: a.checks)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[1] == b''
            assert process.returncode == -signal.SIGINT


def test_a_start_that_has_neither_listeners_nor_a_client_says_so() -> None:
    command = [sys.executable, str(MODULE), '-L', '-s', 'a=h:1']
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert done.returncode == 0 and b'Without --listen' in done.stdout


def test_without_syslog_one_at_a_terminal_sees_the_log() -> None:
    if os.path.exists('/dev/log'):
        pytest.skip('there is a /dev/log')
    ours, theirs = os.openpty()
    command = [sys.executable, str(MODULE), '-s', f'a=127.0.0.1:{free_port()}']
    done = subprocess.run(command, input=ONE % b'i' + b'nonsense\n\n', stdout=-1, stderr=theirs, timeout=30)
    said = os.read(ours, 65536)
    assert done.stdout == b'action=dunno\n\n' * 2
    assert b'No service is up' in said and b'given 1 times: not a request' in said
    os.close(ours)
    os.close(theirs)


def test_help_and_version() -> None:
    assert run('--help').stdout.decode().strip() == (hapolicy_gevent.__doc__ or '').strip()
    assert run('-h').returncode == 0
    assert run('--version').stdout.decode() == f'hapolicy {hapolicy_gevent.__version__} (not compiled)\n'


def test_readme_and_help_name_the_same_options() -> None:
    readme = (ROOT / 'README.md').read_text()
    assert (hapolicy_gevent.__doc__ or '').strip() in readme, 'README quotes the whole usage text'


def test_the_ancestors_forms_of_options_are_taken() -> None:
    with stubs(echo) as (a,):
        for arguments in (
            ['-lv', '-s', a.service + ':'],
            [f'--service={a.service}', '--default', 'dunno', '--logging'],
            ['--service', a.service, '-ddunno', '-l', '--verbose'],
        ):
            assert run(*arguments, stdin=ONE % b'i').stdout == b'action=DUNNO i A\n\n', arguments


def test_options_may_be_repeated_and_the_last_value_counts() -> None:
    for arguments in (['-v', '-v', '-ll', '-d', 'ok', '-ddefer later'], ['-lvvl', '-d', 'defer later', '--']):
        done = run('-s', 'a=127.0.0.1:1', *arguments, stdin=ONE % b'i')
        assert (done.stdout, done.returncode) == (b'action=defer later\n\n', 0), done


def reviewed(*arguments: str) -> list[str]:
    """Return what is logged at the start of these options."""
    lines: list[str] = []
    log: Any = lambda level, text: lines.append(f'{level} {text}')  # noqa: E731
    review(parse_command_line(['-s', 'a=h:1', *arguments]), log)
    return lines


@pytest.mark.parametrize(
    'action',
    ['dunno', 'OK', 'Reject', 'REJECT 5.7.1 no', 'defer_if_permit x', '451 4.3.5 later', '550 no', 'PREPEND X-A: b',
     'hold', 'DISCARD x', 'redirect a@example.org', 'bcc a@example.org', 'FILTER smtp:', 'WARN x', 'info x', 'relay',
     'permit'],
)  # fmt: skip
def test_an_action_of_access_5_is_no_reason_to_warn(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    assert reviewed('-d', action, '--failed', action) == []


@pytest.mark.parametrize('action', ['REJECTT', '250 2.0.0 fine', '4.7.1 later', '550-5.7.1 no', 'my_class', '-l'])
def test_an_action_that_postfix_may_not_know_is_taken_with_a_warning(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    why = f"'{action}' is no action of access(5), unless it names a restriction"
    assert reviewed('-d', action) == [f'4 --default {why}']
    assert reviewed('-d', 'dunno', '--failed', action) == [f'4 --failed {why}']
    assert reviewed('-d', action, '--failed', 'x') == [f"4 --failed {why.replace(action, 'x')}", f'4 --default {why}']


def test_the_warnings_are_in_the_log_and_requests_are_answered() -> None:
    done = run('-L', '-s', 'a=127.0.0.1:1', '-d', 'REJECTT', stdin=ONE % b'i')
    assert b"[LOG warning]: --default 'REJECTT' is no action of access(5)" in done.stdout
    assert b'action=REJECTT\n\n' in done.stdout and done.returncode == 0


def test_a_start_as_root_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    assert [line.partition(':')[0] for line in reviewed()] == ['4 Started as root']


def test_under_systemd_a_mistake_has_its_level() -> None:
    command = [sys.executable, str(MODULE), '-s', 'nonsense']
    done = subprocess.run(command, capture_output=True, timeout=30, env={**os.environ, 'JOURNAL_STREAM': '8:1'})
    assert done.returncode == 2 and done.stderr.startswith(b"<3>hapolicy: --service 'nonsense'")


def test_a_pipe_is_served_in_order_and_its_end_ends_the_process() -> None:
    with stubs(echo, echo) as (a, b):
        instances = [new_instance().encode() for _ in range(50)]
        done = run('-s', a.service, '-s', b.service, stdin=b''.join(ONE % instance for instance in instances))
        answers = done.stdout.split(b'\n\n')
        assert [answer.split()[1] for answer in answers[:-1]] == instances
        assert {answer.split()[2] for answer in answers[:-1]} == {b'A', b'B'}
        assert (done.returncode, done.stderr) == (0, b'')


def test_a_file_on_stdin_is_served(tmp_path: Path) -> None:
    (tmp_path / 'requests').write_bytes(ONE % b'x')
    with stubs(echo) as (a,), (tmp_path / 'requests').open() as file:
        command = [sys.executable, str(MODULE), '-s', a.service]
        done = subprocess.run(command, stdin=file, capture_output=True, timeout=30)
        assert done.stdout == b'action=DUNNO x A\n\n'


def test_pipes_that_another_program_left_non_blocking_lose_nothing(tmp_path: Path) -> None:
    count = 6000  # more than a pipe holds
    (tmp_path / 'requests').write_bytes(b''.join(ONE % b'%d' % i for i in range(count)))
    with stubs(echo) as (a,):
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        with (tmp_path / 'requests').open() as file:
            process = subprocess.Popen([sys.executable, str(MODULE), '-s', a.service], stdin=file, stdout=writes)
        os.close(writes)
        time.sleep(1)  # what fits into the pipe is there, and more to come
        with open(reads, 'rb') as answers:
            assert answers.read().count(b'action=DUNNO') == count
        assert process.wait(20) == 0

        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        with subprocess.Popen([sys.executable, str(MODULE), '-s', a.service], stdin=reads, stdout=-1) as process:
            os.close(reads)
            time.sleep(1)  # it has found nothing to read
            with open(writes, 'wb') as requests:
                requests.write(ONE % b'x')
            assert process.communicate(timeout=20)[0] == b'action=DUNNO x A\n\n'


def test_answers_that_nobody_reads_are_no_success(tmp_path: Path) -> None:
    (tmp_path / 'requests').write_bytes(ONE % b'x' * 6000)
    with stubs(echo) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service, '--grace=5']
        reads, writes = os.pipe()
        with (tmp_path / 'requests').open() as file:
            process = subprocess.Popen(command, stdin=file, stdout=writes)
        wait_until(lambda: not select.select([], [writes], [], 0)[1], 20, 'a full pipe')
        process.terminate()
        started = time.monotonic()
        assert process.wait(30) == 1
        assert time.monotonic() - started < 9, 'the grace was spent twice'
        os.close(reads)
        with (tmp_path / 'requests').open() as file:
            assert subprocess.run(command, stdin=file, stdout=writes, timeout=20).returncode == 1
        os.close(writes)


def test_what_was_answered_is_passed_on_although_the_client_is_at_fault_after() -> None:
    with stubs(echo) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            answers = process.communicate(ONE % b'x' * 150 + b'y' * 400_000, timeout=30)[0]
        assert answers.count(b'action=DUNNO x A\n\n') == 150


class Spawned:
    """The proxy as spawn(8) runs it: stdin, stdout and stderr are one socket."""

    def __init__(self, *arguments: str, program: tuple[str, ...] = (str(MODULE),),
                 environment: dict[str, str] | None = None) -> None:  # fmt: skip
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments], stdin=fd, stdout=fd, stderr=fd, cwd=ROOT,
                env={'PATH': '/usr/bin:/bin', 'LANG': 'C', **(environment or {})},
            )  # fmt: skip

    def ask(self, message: bytes) -> bytes:
        self.socket.sendall(message)
        data = b''
        while not data.endswith(b'\n\n'):
            more = self.socket.recv(65536)
            if not more:
                break
            data += more
        return data

    def rest(self) -> bytes:
        """Return all that comes until the end."""
        data = b''
        while more := self.socket.recv(65536):
            data += more
        return data

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def test_i5_under_spawn_nothing_but_answers_is_written() -> None:
    with stubs(echo, hang) as (a, b), Spawned('-lv', '-s', a.service, '-s', b.service + ':1::0.2') as spawned:
        for i in range(5):
            assert spawned.ask(ONE % b'%d' % i) == b'action=DUNNO %d A\n\n' % i
        assert spawned.ask(b'nonsense\n\n') == b'action=dunno\n\n'
        spawned.socket.shutdown(socket.SHUT_WR)
        assert spawned.rest() == b''
        assert spawned.process.wait(10) == 0


def test_under_spawn_nothing_is_imported_that_is_not_needed() -> None:
    """Each smtpd pays for it: pprint, say, is what gevent's hub would import for 10 ms."""
    spared = ('dataclasses', 'gevent.monkey', 'gevent.pywsgi', 'gevent.server', 'hashlib', 'html', 'http.client',
              'json', 'logging', 'pprint', 'prometheus_client')  # fmt: skip
    code = f"""if True:
        import sys, hapolicy_gevent
        hapolicy_gevent.main()
        print([name for name in {spared} if name in sys.modules], file=sys.stderr)
    """
    with stubs(echo) as (a,):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(ONE % b'i')
            ours.shutdown(socket.SHUT_WR)
            command, client = [sys.executable, '-c', code, '-s', a.service], theirs.fileno()
            done = subprocess.run(command, stdin=client, stdout=client, stderr=subprocess.PIPE, cwd=ROOT, timeout=30)
            assert ours.recv(1000) == b'action=DUNNO i A\n\n' and done.stderr == b'[]\n', done


def test_i5_under_spawn_no_warning_of_python_reaches_the_client(tmp_path: Path) -> None:
    """As of docopt 0.6.2, for which newer Pythons have one where it was not compiled at its installation."""
    anew = {'PYTHONWARNINGS': 'always', 'PYTHONPYCACHEPREFIX': str(tmp_path)}
    with stubs(echo) as (a,), Spawned('-s', a.service, environment=anew) as spawned:
        assert spawned.ask(ONE % b'i') == b'action=DUNNO i A\n\n'
        spawned.socket.shutdown(socket.SHUT_WR)
        assert spawned.rest() == b''


#: Runs the program with syslog at the path of its first argument.
WITH_SYSLOG_AT = ('-c', 'import sys, hapolicy_gevent as h; h.SyslogSink.PATH = sys.argv.pop(1); sys.exit(h.main())')


@pytest.mark.parametrize('kind', [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_under_spawn_syslog_has_why_a_start_failed(kind: int, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, kind) as syslog:
        syslog.bind(str(tmp_path / 'log'))
        if kind == socket.SOCK_STREAM:
            syslog.listen()
        with Spawned(str(tmp_path / 'log'), '-s', 'nonsense', program=WITH_SYSLOG_AT) as spawned:
            assert spawned.rest() == b''
            assert spawned.process.wait(10) == 2
            syslog.settimeout(20)
            said = (syslog.accept()[0] if kind == socket.SOCK_STREAM else syslog).recv(10000)
    assert re.fullmatch(rb"<20>.{15} hapolicy\[\d+\]: --service 'nonsense': [^\0]+\0?", said), said
    assert said.endswith(b'\0') is (kind == socket.SOCK_STREAM)


@pytest.mark.parametrize('kind', [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_under_spawn_a_log_daemon_that_hangs_does_not_keep_a_failed_start(kind: int, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, kind) as syslog, contextlib.ExitStack() as after:
        syslog.bind(str(tmp_path / 'log'))
        if kind == socket.SOCK_STREAM:
            syslog.listen(0)
        for _ in range(2):  # a backlog of 0 holds one connection
            other = after.enter_context(socket.socket(socket.AF_UNIX, kind))
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(str(tmp_path / 'log'))
                while kind == socket.SOCK_DGRAM:
                    other.send(b'x')
        started = time.monotonic()
        with Spawned(str(tmp_path / 'log'), '-s', 'nonsense', program=WITH_SYSLOG_AT) as spawned:
            assert spawned.rest() == b''
            assert spawned.process.wait(10) == 2
        assert time.monotonic() - started < 6 * SCALE


@pytest.mark.parametrize('arguments', [[], ['-s', 'nonsense'], ['--frobnicate'], ['-s', 'a=h:1', '-d', '550']])
def test_i5_under_spawn_a_mistake_in_master_cf_writes_nothing(arguments: list[str]) -> None:
    with Spawned(*arguments) as spawned:
        assert spawned.rest() == b''
        assert spawned.process.wait(10) == 2


def test_i5_under_spawn_stdout_is_never_the_log() -> None:
    with stubs(echo) as (a,), Spawned('-lvL', '-s', a.service) as spawned:
        assert spawned.ask(ONE % b'i') == b'action=DUNNO i A\n\n'
        spawned.socket.shutdown(socket.SHUT_WR)
        assert spawned.rest() == b''


def test_under_spawn_no_check_is_made_and_its_one_connection_is_kept() -> None:
    with stubs(echo) as (a,), Spawned('-s', a.service) as spawned:
        time.sleep(1)
        assert a.accepted == 0, 'the first request opens it'
        for i in range(5):
            assert spawned.ask(ONE % b'%d' % i) == b'action=DUNNO %d A\n\n' % i
        time.sleep(1)
        assert (a.accepted, a.checks, len(a.requests)) == (1, 0, 5)


@pytest.mark.parametrize('behaviour', [hang_up, answer(b'action=550\n\n')])
def test_under_spawn_a_server_that_fails_at_a_request_gets_it_the_action_of_failed(behaviour: Behaviour) -> None:
    with stubs(behaviour) as (a,), Spawned('-s', a.service, '-d', 'dunno', '--failed=451 later') as spawned:
        assert spawned.ask(ONE % b'i') == b'action=451 later\n\n'
        assert len(a.requests) == 1
        a.stop()
        assert spawned.ask(ONE % b'j') == b'action=dunno\n\n', 'it is down'


def test_under_spawn_sigterm_answers_what_is_in_flight() -> None:
    with stubs(slow(0.5)) as (a,), Spawned('-s', a.service) as spawned:
        spawned.socket.sendall(ONE % b'i')
        wait_until(lambda: a.requests)
        spawned.process.send_signal(signal.SIGTERM)
        assert spawned.rest() == b'action=DUNNO i A\n\n'
        assert spawned.process.wait(10) == 0


def test_in_a_shell_stdout_has_log_and_answers() -> None:
    with stubs(echo) as (a,):
        done = run('-lL', '-s', a.service, stdin=ONE % b'i')
        assert b'action=DUNNO i A\n\n' in done.stdout and b'[LOG info]: [A] (' in done.stdout


def test_sigterm_answers_what_is_in_flight_and_ends_with_status_0() -> None:
    with stubs(slow(0.6)) as (a,), ProxyProcess('-s', a.service) as proxy:
        clients = [proxy.client() for _ in range(8)]
        idle = proxy.client()
        for i, client in enumerate(clients):
            client.send(request(instance=f'i{i}'))
        wait_until(lambda: len(a.requests) >= 1)
        proxy.process.send_signal(signal.SIGTERM)
        assert idle.at_end()
        for i, client in enumerate(clients):
            assert client.read_answer() == b'action=DUNNO i%d A\n\n' % i
            assert client.at_end()
        assert proxy.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            proxy.client()


def test_after_the_grace_it_ends_with_status_1() -> None:
    with stubs(checked(hang)) as (a,), ProxyProcess('-s', a.service, '--grace=0.5') as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: a.requests)
        started = time.monotonic()
        assert proxy.terminate() == 1
        assert time.monotonic() - started < 5


def test_a_second_signal_ends_it_at_once() -> None:
    with stubs(checked(hang)) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: a.requests)
        proxy.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert proxy.process.poll() is None
        proxy.process.send_signal(signal.SIGINT)
        assert proxy.process.wait(5) == 1


def test_importing_patches_nothing() -> None:
    code = 'import hapolicy_gevent, gevent.monkey, socket; print(gevent.monkey.saved, socket.socket.__module__)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.stdout == '{} socket\n', done


def test_the_single_file_runs_on_debians_own_python(tmp_path: Path) -> None:
    python = '/usr/bin/python3'
    probe = subprocess.run([python, '-c', 'import gevent, docopt'], capture_output=True)
    if probe.returncode:
        pytest.skip('python3-gevent or python3-docopt is not installed')
    copy = tmp_path / 'hapolicy'
    copy.write_bytes(MODULE.read_bytes())
    with stubs(echo) as (a,):
        done = subprocess.run([python, str(copy), '-s', a.service], input=ONE % b'i', capture_output=True, timeout=30)
        assert (done.stdout, done.stderr, done.returncode) == (b'action=DUNNO i A\n\n', b'', 0)
        with ProxyProcess('-s', a.service, python=python) as proxy:
            with proxy.client() as client:
                assert [client.ask_own() for _ in range(100)] == ['A'] * 100
            assert proxy.terminate() == 0


def test_a_unix_listener_replaces_a_stale_socket_and_leaves_a_live_one_alone(tmp_path: Path) -> None:
    path = tmp_path / 'policy'
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, f'--listen=unix:{path}', '--socket-mode=0640'):
        assert oct(path.stat().st_mode)[-3:] == '640'
        done = run('-s', a.service, f'--listen=unix:{path}')
        assert done.returncode == 1 and b'Address already in use' in done.stderr
        assert os.listdir(tmp_path) == ['policy']


def test_every_function_is_short_and_the_module_within_its_wall() -> None:
    source = MODULE.read_text().partition('STATUS_PAGE = ')[0]
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith('#')]
    assert len(code) < 2270, len(code)
    assert not re.search(r'(?i)\b(todo|fixme|xxx)\b', source)

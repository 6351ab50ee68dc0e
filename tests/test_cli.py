"""The command line: every mistake is one line and a status."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hapolicy_gevent
from hapolicy_gevent import UsageError, parse_command_line, review
from tests.support import (
    ACTIVATED,
    MODULE,
    ONE,
    ROOT,
    SCALE,
    ProxyProcess,
    echo,
    free_port,
    hang,
    run,
    stubs,
    wait_until,
)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([], '--service'),
        (['-s', 'a'], "'a'"),
        (['-s', 'a=h:0'], "port '0'"),
        (['-s', 'a=h:1:x'], "prio 'x'"),
        (['-s', 'a=h:000000000165536'], "port '000000000165536'"),
        (['-s', 'a=h:1:0000000001' + 5000 * '9'], 'prio'),
        (['-s', 'a=h:1', '-s', 'a=h:2'], "'a' is given twice"),
        (['-s', 'a=h:1', '-d', ''], '--default'),
        (['-s', 'a=h:1', '-d', '550'], 'bare number'),
        (['-s', 'a=h:1', '--failed='], "--failed ''"),
        (['-s', 'a=h:1', '--failed=550'], "--failed '550': the bare number 550"),
        (['-s', 'a=h:1', '--listen=nonsense'], "'nonsense'"),
        (['-s', 'a=h:1', '--listen=localhost:10060'], "'localhost:10060': a name"),
        (['-s', 'a=h:1', f'--listen=unix:/{97 * "d"}/s'], 'a directory of over 97 bytes'),
        (['-s', 'a=127.0.0.1%lo:1'], "'127.0.0.1%lo'"),
        (['-s', 'a=h:1', '--listen=127.0.0.1:65536'], "'65536'"),
        (['-s', 'a=h:1', '--socket-mode=999'], "'999'"),
        (['-s', 'a=h:1', '--deadline=0'], "--deadline '0'"),
        (['-s', 'a=h:1', '--deadline=0.005'], "--deadline '0.005' is not a number of seconds from 0.1"),
        (['-s', 'a=h:1', '--deadline=soon'], "--deadline 'soon'"),
        (['-s', 'a=h:1', '--max-clients=0'], "--max-clients '0'"),
        (['-s', 'a=h:1', '--fall=0'], "--fall '0'"),
        (['-s', 'a=h:1', '--stall=-1'], "--stall '-1'"),
        (['-s', 'a=h:1', '--summary=-1'], "--summary '-1'"),
        (['-s', 'a=h:1', '--sticky=sender,client_adress'], "--sticky 'sender,client_adress': 'client_adress' is no"),
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
def test_a_mistake_is_named(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_command_line(arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([], '--service'),
        (['-s', 'a=h:1', '-x'], "'-x'"),
        (['-s', 'a=h:1', '-d', 'a\nb'], 'line break'),
        (['-s', 'a=127.0.0.1:1', '--listen=[::1]:1', '--listen=127.0.0.1:1'], "'a': 127.0.0.1:1"),
        (['-s', 'a=127.0.0.1:1', '--listen=0.0.0.0:1'], "'a': 127.0.0.1:1"),
        (['-s', 'a=[::1]:1', '--listen=[::]:1'], "'a': [::1]:1"),
        (['-s', 'a=unix:/s:1', '--listen=unix:/s'], "'a': unix:/s"),
    ],
)
def test_a_mistake_ends_the_start_with_one_line_and_status_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, b'')
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith('hapolicy: ') and said in lines[0], lines


OPTIONS = re.findall(r'^  (?:(-.), )?(--[a-z-]+)[ =][<A-Z]', hapolicy_gevent.__doc__ or '', re.MULTILINE)


@pytest.mark.parametrize('option', sorted(name for pair in OPTIONS for name in pair if name))
def test_each_option_without_its_value_is_named(option: str) -> None:
    assert len(OPTIONS) > 11
    with pytest.raises(UsageError, match=f'^{option} requires argument'):
        parse_command_line(['-s', 'a=h:1', option])


def test_an_address_that_cannot_be_listened_on_ends_the_start_with_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        where = f'127.0.0.1:{taken.getsockname()[1]}'
        done = run('-s', 'a=h:1', f'--listen={where}')
        assert done.returncode == 1
        assert done.stderr.decode().count('\n') == 1
        assert done.stderr.decode().endswith(f"{where}': Address already in use\n"), done.stderr
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
        done = run('-s', service, *arguments, program=(sys.executable, '-c', ACTIVATED, sys.executable, MODULE),
                   env={**os.environ, 'LISTEN_FDS': count}, pass_fds=[3],
                   preexec_fn=lambda: os.dup2(handed.fileno(), 3))  # fmt: skip
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


def test_a_descriptor_that_is_closed_at_the_start_becomes_neither_a_listener_nor_a_client() -> None:
    closed = ('sh', '-c', 'exec "$0" "$@" <&- 2>&-')
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, before=closed) as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        assert {os.readlink(f'/proc/{proxy.process.pid}/fd/{fd}') for fd in (0, 2)} == {'/dev/null'}


def test_too_few_descriptors_for_the_listeners_are_one_line() -> None:
    listens = [f'--listen=127.0.0.1:{free_port()}' for _ in range(16)]
    done = run('-s', 'a=h:1', *listens, program=('prlimit', '--nofile=16', sys.executable, MODULE))
    assert (done.returncode, done.stderr.count(b'\n')) == (1, 1) and b'--listen' in done.stderr, done.stderr


def catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler of a signal, as Python has at its start."""
    (caught,) = re.findall(r'SigCgt:\s*(\w+)', Path(f'/proc/{pid}/status').read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_ctrl_c_ends_a_check_without_a_traceback() -> None:
    with stubs(hang) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service, '--check-services']
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            # a check alone may be that of another test's proxy, at a port that was used before
            wait_until(lambda: a.checks and not catches(process.pid, signal.SIGINT))
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20 * SCALE)[1] == b''
            assert process.returncode == -signal.SIGINT


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
            assert run(*arguments, input=ONE % b'i').stdout == b'action=DUNNO i A\n\n', arguments


def test_options_may_be_repeated_and_the_last_value_counts() -> None:
    for arguments in (['-v', '-v', '-ll', '-d', 'ok', '-ddefer later'], ['-lvvl', '-d', 'defer later', '--']):
        done = run('-s', 'a=127.0.0.1:1', *arguments, input=ONE % b'i')
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
    done = run('-L', '-s', 'a=127.0.0.1:1', '-d', 'REJECTT', input=ONE % b'i')
    assert b"[LOG warning]: --default 'REJECTT' is no action of access(5)" in done.stdout
    assert b'action=REJECTT\n\n' in done.stdout and done.returncode == 0


def test_a_start_as_root_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    assert [line.partition(':')[0] for line in reviewed()] == ['4 Started as root']


def test_under_systemd_a_mistake_has_its_level() -> None:
    done = run('-s', 'nonsense', env={**os.environ, 'JOURNAL_STREAM': '8:1'})
    assert done.returncode == 2 and done.stderr.startswith(b"<3>hapolicy: --service 'nonsense'")


def test_importing_patches_nothing() -> None:
    code = 'import hapolicy_gevent, gevent.monkey, socket; print(gevent.monkey.saved, socket.socket.__module__)'
    assert run(code, program=(sys.executable, '-c'), cwd=ROOT).stdout == b'{} socket\n'


def test_the_single_file_runs_on_debians_own_python(tmp_path: Path) -> None:
    python = '/usr/bin/python3'
    probe = subprocess.run([python, '-c', 'import gevent, docopt'], capture_output=True)
    if probe.returncode:
        pytest.skip('python3-gevent or python3-docopt is not installed')
    copy = tmp_path / 'hapolicy'
    copy.write_bytes(MODULE.read_bytes())
    with stubs(echo) as (a,):
        done = run('-s', a.service, program=(python, copy), input=ONE % b'i')
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
    assert len(code) < 2252, len(code)
    assert not re.search(r'(?i)\b(todo|fixme|xxx)\b', source)

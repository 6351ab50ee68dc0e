"""One client on stdin and stdout: under spawn(8), in a pipe, in a shell."""

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

import pytest

from tests.servers import Prefork, for_sender
from tests.support import (
    MODULE,
    ONE,
    ROOT,
    SCALE,
    Behaviour,
    Peer,
    answer,
    echo,
    free_port,
    hang,
    hang_up,
    in_threads,
    new_instance,
    request,
    run,
    slow,
    stubs,
    wait_until,
)


def test_a_start_that_has_neither_listeners_nor_a_client_says_so() -> None:
    done = run('-L', '-s', 'a=h:1', stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b'Without --listen' in done.stdout


def test_without_syslog_one_at_a_terminal_sees_the_log() -> None:
    if os.path.exists('/dev/log'):
        pytest.skip('there is a /dev/log')
    ours, theirs = os.openpty()
    done = run('-s', f'a=127.0.0.1:{free_port()}', input=ONE % b'i' + b'nonsense\n\n', capture_output=False,
               stdout=subprocess.PIPE, stderr=theirs)  # fmt: skip
    said = os.read(ours, 65536)
    assert done.stdout == b'action=dunno\n\n' * 2
    assert b'No service is up' in said and b'given 1 times: not a request' in said
    os.close(ours)
    os.close(theirs)


def test_a_pipe_is_served_in_order_and_its_end_ends_the_process() -> None:
    with stubs(echo, echo) as (a, b):
        instances = [new_instance().encode() for _ in range(50)]
        done = run('-s', a.service, '-s', b.service, input=b''.join(ONE % instance for instance in instances))
        answers = done.stdout.split(b'\n\n')
        assert [answer.split()[1] for answer in answers[:-1]] == instances
        assert {answer.split()[2] for answer in answers[:-1]} == {b'A', b'B'}
        assert (done.returncode, done.stderr) == (0, b'')


def test_a_file_on_stdin_is_served(tmp_path: Path) -> None:
    (tmp_path / 'requests').write_bytes(ONE % b'x')
    with stubs(echo) as (a,), (tmp_path / 'requests').open() as file:
        assert run('-s', a.service, stdin=file).stdout == b'action=DUNNO x A\n\n'


def test_pipes_that_another_program_left_non_blocking_lose_nothing(tmp_path: Path) -> None:
    count = 6000  # more than a pipe holds
    (tmp_path / 'requests').write_bytes(b''.join(ONE % b'%d' % i for i in range(count)))
    with stubs(echo) as (a,):
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        with (tmp_path / 'requests').open() as file:
            process = subprocess.Popen([sys.executable, str(MODULE), '-s', a.service], stdin=file, stdout=writes)
        wait_until(lambda: not select.select([], [writes], [], 0)[1], what='a full pipe')
        os.close(writes)
        with open(reads, 'rb') as answers:
            assert answers.read().count(b'action=DUNNO') == count
        assert process.wait(20 * SCALE) == 0

        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        with subprocess.Popen([sys.executable, str(MODULE), '-s', a.service], stdin=reads, stdout=-1) as process:
            os.close(reads)
            time.sleep(0.5)  # it has found nothing to read
            with open(writes, 'wb') as requests:
                requests.write(ONE % b'x')
            assert process.communicate(timeout=20 * SCALE)[0] == b'action=DUNNO x A\n\n'


@pytest.mark.slow
def test_answers_that_nobody_reads_are_no_success(tmp_path: Path) -> None:
    (tmp_path / 'requests').write_bytes(ONE % b'x' * 6000)
    with stubs(echo) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service, f'--grace={2 * SCALE:g}']
        reads, writes = os.pipe()
        with (tmp_path / 'requests').open() as file:
            process = subprocess.Popen(command, stdin=file, stdout=writes)
        wait_until(lambda: not select.select([], [writes], [], 0)[1], 20, 'a full pipe')
        process.terminate()
        started = time.monotonic()
        assert process.wait(30 * SCALE) == 1
        assert time.monotonic() - started < 3.6 * SCALE, 'the grace was spent twice'
        os.close(reads)
        with (tmp_path / 'requests').open() as file:
            assert subprocess.run(command, stdin=file, stdout=writes, timeout=20 * SCALE).returncode == 1
        os.close(writes)


def test_what_was_answered_is_passed_on_although_the_client_is_at_fault_after() -> None:
    with stubs(echo) as (a,):
        command = [sys.executable, str(MODULE), '-s', a.service]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            answers = process.communicate(ONE % b'x' * 150 + b'y' * 400_000, timeout=30 * SCALE)[0]
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
        assert spawned.process.wait(10 * SCALE) == 0


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
            done = run('-s', a.service, program=(sys.executable, '-c', code), stdin=theirs, stdout=theirs,
                       capture_output=False, stderr=subprocess.PIPE, cwd=ROOT)  # fmt: skip
            assert ours.recv(1000) == b'action=DUNNO i A\n\n' and done.stderr == b'[]\n', done


def test_i5_under_spawn_no_warning_of_python_reaches_the_client(tmp_path: Path) -> None:
    """As of docopt 0.6.2, for which newer Pythons have one where it was not compiled at its installation."""
    anew = {'PYTHONWARNINGS': 'always', 'PYTHONPYCACHEPREFIX': str(tmp_path)}
    with stubs(echo) as (a,), Spawned('-s', a.service, environment=anew) as spawned:
        assert spawned.ask(ONE % b'i') == b'action=DUNNO i A\n\n'
        spawned.socket.shutdown(socket.SHUT_WR)
        assert spawned.rest() == b''


#: Runs the program with syslog at the path of its first argument.
WITH_SYSLOG_AT = ('-c', 'import sys, hapolicy_gevent as h; h.Log.PATH = sys.argv.pop(1); sys.exit(h.main())')


@pytest.mark.parametrize('kind', [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_under_spawn_syslog_has_why_a_start_failed(kind: int, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, kind) as syslog:
        syslog.bind(str(tmp_path / 'log'))
        if kind == socket.SOCK_STREAM:
            syslog.listen()
        with Spawned(str(tmp_path / 'log'), '-s', 'nonsense', program=WITH_SYSLOG_AT) as spawned:
            assert spawned.rest() == b''
            assert spawned.process.wait(10 * SCALE) == 2
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
            assert spawned.process.wait(10 * SCALE) == 2
        assert time.monotonic() - started < 6 * SCALE


@pytest.mark.parametrize('arguments', [[], ['-s', 'nonsense'], ['--frobnicate'], ['-s', 'a=h:1', '-d', '550']])
def test_i5_under_spawn_a_mistake_in_master_cf_writes_nothing(arguments: list[str]) -> None:
    with Spawned(*arguments) as spawned:
        assert spawned.rest() == b''
        assert spawned.process.wait(10 * SCALE) == 2


def test_i5_under_spawn_stdout_is_never_the_log() -> None:
    with stubs(echo) as (a,), Spawned('-lvL', '-s', a.service) as spawned:
        assert spawned.ask(ONE % b'i') == b'action=DUNNO i A\n\n'
        spawned.socket.shutdown(socket.SHUT_WR)
        assert spawned.rest() == b''


def test_under_spawn_no_check_is_made_and_its_one_connection_is_kept() -> None:
    with stubs(echo) as (a,), Spawned('-s', a.service) as spawned:
        assert spawned.ask(b'nonsense\n\n') == b'action=dunno\n\n'
        time.sleep(0.2)
        assert a.accepted == 0, 'the first request opens it'
        for i in range(5):
            assert spawned.ask(ONE % b'%d' % i) == b'action=DUNNO %d A\n\n' % i
        time.sleep(0.2)
        assert (a.accepted, a.checks, len(a.requests)) == (1, 0, 5)


@pytest.mark.slow
def test_under_spawn_processes_share_a_server_with_fewer_children() -> None:
    with Prefork(2) as a, contextlib.ExitStack() as stack:
        every = [stack.enter_context(Spawned('-s', a.service)) for _ in range(5)]
        end = time.monotonic() + 12

        def work(number: int) -> set[str]:
            names = set()
            while time.monotonic() < end:
                names.add(every[number].ask(request(instance=new_instance())).decode().split()[-1])
                time.sleep(0.05)
            return names

        assert set().union(*in_threads(5, work)) == {'A'}, 'its timeout is 30 s'
        assert time.monotonic() < end + 10 * SCALE


@pytest.mark.parametrize('behaviour', [hang_up, answer(b'action=550\n\n')])
def test_under_spawn_a_server_that_fails_at_a_request_gets_it_the_action_of_failed(behaviour: Behaviour) -> None:
    with stubs(behaviour) as (a,), Spawned('-s', a.service, '-d', 'dunno', '--failed=451 later') as spawned:
        assert spawned.ask(ONE % b'i') == b'action=451 later\n\n'
        assert len(a.requests) == 1
        a.stop()
        wait_until(lambda: spawned.ask(ONE % b'j') == b'action=dunno\n\n', 5, 'it is down')


@pytest.mark.slow
@pytest.mark.parametrize('alone', [False, True])
def test_under_spawn_a_server_that_hangs_costs_few_mails_its_timeout_and_is_found_again(alone: bool) -> None:
    def behave(peer: Peer, message: bytes) -> None:
        (hang if hangs else echo)(peer, message)

    hangs = True
    with stubs(behave, echo) as (a, b):
        others = [] if alone else ['-s', b.service + ':20']
        with Spawned('-s', a.service + ':::0.5', *others) as spawned:
            held, end = 0, time.monotonic() + 5
            while time.monotonic() < end:
                started = time.monotonic()
                answer = spawned.ask(request(instance=new_instance()))
                assert answer == b'action=dunno\n\n' if alone else answer.endswith(b' B\n\n')
                held += time.monotonic() - started > 0.45
                time.sleep(0.02)
            assert 2 <= held <= 5, held
            hangs = False
            wait_until(lambda: spawned.ask(request(instance=new_instance())).endswith(b' A\n\n'))


def test_under_spawn_a_server_that_hangs_up_is_asked_by_each_mail_where_it_is_alone() -> None:
    with stubs(for_sender('poison', hang_up, echo)) as (a,), Spawned('-s', a.service) as spawned:
        for _ in range(20):
            assert spawned.ask(request(sender='poison', instance=new_instance())) == b'action=dunno\n\n'
            assert spawned.ask(request(instance=new_instance())).endswith(b' A\n\n')


def test_under_spawn_a_server_that_is_dead_is_not_up_for_the_first_mail() -> None:
    with stubs(echo) as (a,):
        a.stop()
        with Spawned('-s', a.service, '-d', 'dunno', '--failed=451 later') as spawned:
            assert [spawned.ask(ONE % b'i') for _ in range(3)] == [b'action=dunno\n\n'] * 3
            a.start()
            wait_until(lambda: spawned.ask(ONE % b'i') == b'action=DUNNO i A\n\n')


def test_i9_under_spawn_mail_that_makes_a_server_hang_takes_no_verdict_from_other_mail() -> None:
    with stubs(for_sender('tarpit', hang, echo)) as (a,), Spawned('-s', a.service + ':::0.3') as spawned:
        for _ in range(6):
            assert spawned.ask(request(sender='tarpit', instance=new_instance())) == b'action=dunno\n\n'
            assert spawned.ask(request(sender='tarpit', instance=new_instance())) == b'action=dunno\n\n'
            assert spawned.ask(request(instance=new_instance())).endswith(b' A\n\n')


def test_under_spawn_sigterm_answers_what_is_in_flight() -> None:
    with stubs(slow(0.5)) as (a,), Spawned('-s', a.service) as spawned:
        spawned.socket.sendall(ONE % b'i')
        wait_until(lambda: a.requests)
        spawned.process.send_signal(signal.SIGTERM)
        assert spawned.rest() == b'action=DUNNO i A\n\n'
        assert spawned.process.wait(10 * SCALE) == 0


def test_in_a_shell_stdout_has_log_and_answers() -> None:
    with stubs(echo) as (a,):
        done = run('-lL', '-s', a.service, input=ONE % b'i')
        assert b'action=DUNNO i A\n\n' in done.stdout and b'[LOG info]: [A] (' in done.stdout

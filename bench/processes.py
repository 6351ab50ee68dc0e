"""The processes that tests, checks and the demo are made of: started, polled for readiness, and always stopped.

HAPOLICY_TEST_SCALE stretches each wait on a slow machine; HAPOLICY_PROGRAM is another program to run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(os.environ.get('HAPOLICY_PROGRAM', ROOT / 'hapolicy_gevent.py'))
SCALE = float(os.environ.get('HAPOLICY_TEST_SCALE', '1'))

#: Seconds a process may take until it accepts connections, on a machine with much else to do.
READY_SECONDS = 60.0 * SCALE
#: Seconds a process may take to end after SIGTERM; then it is killed.
STOP_SECONDS = 5.0
#: What ends us: in each case the processes are stopped first.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StartError(Exception):
    """A process ended, or did not accept connections in time; the text has the end of its log."""


def accepts(port: int, host: str = '127.0.0.1') -> bool:
    """Tell whether something accepts connections."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0


def is_free(port: int, family: int = socket.AF_INET) -> bool:
    """Tell whether a server could listen at a port of the loopback."""
    with socket.socket(family) as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(('127.0.0.1' if family == socket.AF_INET else '::1', port))
        return True
    return False


def _ports() -> Iterator[int]:
    """Yield the ports of a block that no other process of ours has, below those that connections leave from."""
    first = 10000 + os.getpid() % 100 * 200
    while True:
        _block.append(socket.socket(socket.AF_UNIX))
        try:
            _block[-1].bind(f'\0hapolicy-test-ports-{first}')  # to its end
            break
        except OSError:
            first = 10000 + (first - 9800) % 20000
    yield from itertools.cycle(range(first, first + 200))


_block: list[socket.socket] = []
_free = _ports()


def free_port(family: int = socket.AF_INET) -> int:
    """Return a port of the loopback that nobody listens at now, and that nobody else is given soon."""
    return next(port for port in _free if is_free(port, family))


class Process:
    """A child process, its log kept in a file without a name. Further options are those of Popen."""

    def __init__(self, arguments: Sequence[str | Path], pipes: bool = False, **options: Any) -> None:
        self.arguments = arguments
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # a session of its own: Ctrl-C reaches us alone, and we stop the others
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._log,
            stderr=self._log,
            cwd=ROOT,
            start_new_session=True,
            **options,
        )

    @property
    def log(self) -> str:
        """What it has printed."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors='replace')

    @property
    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self.process.poll() is None

    @property
    def descriptors(self) -> int:
        """Descriptors it has open."""
        return len(os.listdir(f'/proc/{self.process.pid}/fd'))

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f'/proc/{self.process.pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    @property
    def cpu(self) -> float:
        """Seconds of processor it has used."""
        return sum(map(int, self._stat()[11:13])) / os.sysconf('SC_CLK_TCK')

    def _stat(self) -> list[str]:
        """Return the fields of /proc/PID/stat, from the state on."""
        return Path(f'/proc/{self.process.pid}/stat').read_text().rsplit(')', 1)[1].split()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        """Stop it with SIGSTOP, all its threads: the kernel goes on accepting its connections, and nobody answers."""
        self.send(signal.SIGSTOP)
        while self._stat()[0] != 'T':
            time.sleep(0.001)

    def wake(self) -> None:
        """Let it go on after hang()."""
        self.send(signal.SIGCONT)

    def wait_ready(self, port: int, host: str = '127.0.0.1') -> None:
        """Wait until it accepts connections. Raises StartError."""
        give_up = time.monotonic() + READY_SECONDS
        while not accepts(port, host):
            if not self.running or time.monotonic() > give_up:
                raise StartError(f'{" ".join(map(str, self.arguments))} does not serve: {self.log[-2000:]}')
            time.sleep(0.01)

    def close(self) -> None:
        """Kill it if it has not ended, and free its pipes and its log."""
        if self.running:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


class PolicyService:
    """A bench/policy_service.py at a fixed port: it can be killed, hung, and brought back.

    `before` is a command that runs it, elsewhere perhaps, at another host.
    """

    def __init__(self, processes: Processes, name: str, options: Sequence[str] = (), host: str = '127.0.0.1',
                 before: Sequence[str] = ()) -> None:  # fmt: skip
        self._processes, self._options, self._host, self._before = processes, options, host, before
        self.name, self.port = name, free_port()
        self._process: Process | None = None

    @property
    def service(self) -> str:
        """The proxy's option for it, without further fields."""
        return f'{self.name}={self._host}:{self.port}'

    @property
    def process(self) -> Process:
        """The process that serves, or served last."""
        assert self._process is not None, f'{self.name} was not started'
        return self._process

    def launch(self) -> PolicyService:
        """Start it, again after kill(), and do not wait."""
        self._process = self._processes.start([
            *self._before, sys.executable, '-m', 'bench.policy_service',
            f'--listen={self._host}:{self.port}', f'--name={self.name}', *self._options,
        ])  # fmt: skip
        return self

    def wait_ready(self) -> None:
        """Wait until it serves. Raises StartError."""
        self.process.wait_ready(self.port, self._host)

    def start(self) -> None:
        """Start it and wait until it serves. Raises StartError."""
        self.launch().wait_ready()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()

    def hang(self) -> None:
        """Stop it as it is."""
        self.process.hang()

    def wake(self) -> None:
        """Let it go on after hang()."""
        self.process.wake()


class Processes:
    """All processes of a check: the end of the `with` block stops them, whatever ended it.

    SIGTERM and SIGHUP end the block as Ctrl-C does. Only a SIGKILL of this process leaves them behind.
    """

    def __init__(self) -> None:
        self._started: list[Process] = []
        self._handlers: dict[int, object] = {}
        self._starting = False
        self._asked: int | None = None

    def start(self, arguments: Sequence[str], pipes: bool = False) -> Process:
        """Start a process; with `pipes` its stdin and stdout are ours."""
        self._starting = True  # a signal now would lose the process
        try:
            process = Process(arguments, pipes)
            self._started.append(process)
        finally:
            self._starting = False
        if self._asked is not None:
            self._end(self._asked)
        return process

    def policy_services(self, names: Sequence[str], *options: str) -> list[PolicyService]:
        """Start policy servers of these names and wait until they serve. Raises StartError."""
        services = [PolicyService(self, name, options).launch() for name in names]
        for service in services:
            service.wait_ready()
        return services

    def proxy(self, port: int, *options: str) -> Process:
        """Start the proxy at a port of 127.0.0.1 and wait until it serves. Raises StartError."""
        process = self.start([sys.executable, str(MODULE), f'--listen=127.0.0.1:{port}', '--stdout', *options])
        process.wait_ready(port)
        return process

    def __enter__(self) -> Processes:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)  # we are about to end, and soon
        try:
            self.stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._asked = number
        if not self._starting:
            self._end(number)

    def _end(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def stop(self) -> None:
        """Stop all of them now, before the end of the block."""
        for process in reversed(self._started):
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)  # one that hangs could not take the other
        give_up = time.monotonic() + STOP_SECONDS
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(max(0.0, give_up - time.monotonic()))
            process.close()
        self._started.clear()

"""The processes that the checks and the demo are made of: started, polled for readiness, and always stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / 'hapolicy_gevent.py'

#: Seconds a process may take until it accepts connections, on a machine with much else to do.
READY_SECONDS = 60.0
#: Seconds a process may take to end after SIGTERM; then it is killed.
STOP_SECONDS = 5.0
#: Ports to choose from: below those that the kernel gives to outgoing connections, or one of these could
#: take the port of a server that was killed and is to return.
PORTS = range(15000, 32000)
#: What ends us: in each case the processes are stopped first.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StartError(Exception):
    """A process ended, or did not accept connections in time; the text has the end of its log."""


def accepts(port: int) -> bool:
    """Tell whether something accepts connections at 127.0.0.1."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(('127.0.0.1', port)) == 0


def is_free(port: int) -> bool:
    """Tell whether a server could listen at 127.0.0.1."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(('127.0.0.1', port))
        except OSError:
            return False
    return not accepts(port)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens at."""
    while not is_free(port := random.choice(PORTS)):
        pass
    return port


class Process:
    """A child process, its log kept in a file without a name."""

    def __init__(self, arguments: Sequence[str], pipes: bool = False) -> None:
        self.arguments = arguments
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # a session of its own: Ctrl-C reaches us alone, and we stop the others
        self.popen = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._log,
            stderr=self._log,
            cwd=ROOT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        """What it has printed."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors='replace')

    @property
    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.popen.kill()
        self.popen.wait()

    def wait_ready(self, port: int) -> None:
        """Wait until it accepts connections at a port of 127.0.0.1. Raises StartError."""
        give_up = time.monotonic() + READY_SECONDS
        while not accepts(port):
            if not self.running or time.monotonic() > give_up:
                raise StartError(f'{" ".join(self.arguments)} does not serve: {self.log[-2000:]}')
            time.sleep(0.01)

    def close(self) -> None:
        """Free the pipes and the log of a process that has ended."""
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


class PolicyService:
    """A bench/policy_service.py at a fixed port: it can be killed, hung, and brought back."""

    def __init__(self, processes: Processes, name: str, options: Sequence[str]) -> None:
        self._processes, self._options = processes, options
        self.name, self.port = name, free_port()
        self.process: Process | None = None

    def service(self, fields: str = '') -> str:
        """Return the proxy's option for it; `fields` is prio:weight:timeout:max."""
        return f'--service={self.name}=127.0.0.1:{self.port}:{fields}'

    def start(self) -> None:
        """Start it, again after kill(). Raises StartError."""
        self.process = self._processes.start([
            sys.executable, '-m', 'bench.policy_service',
            f'--listen=127.0.0.1:{self.port}', f'--name={self.name}', *self._options,
        ])  # fmt: skip
        self.process.wait_ready(self.port)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        assert self.process is not None
        self.process.kill()

    def hang(self) -> None:
        """Stop it with SIGSTOP: the kernel goes on accepting its connections, and nobody answers."""
        assert self.process is not None
        self.process.send(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on after hang()."""
        assert self.process is not None
        self.process.send(signal.SIGCONT)


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

    def policy_service(self, name: str, *options: str) -> PolicyService:
        """Start a policy server and wait until it serves. Raises StartError."""
        service = PolicyService(self, name, options)
        service.start()
        return service

    def absent_service(self, name: str) -> PolicyService:
        """Return a policy server that was not started: connections to it are refused."""
        return PolicyService(self, name, ())

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
            try:
                process.popen.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            process.close()
        self._started.clear()

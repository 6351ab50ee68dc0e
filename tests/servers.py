"""Policy servers of the kinds that exist: prefork, with a limit of connections, that close, that cannot be checked."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import (
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    attributes,
    echo,
    free_port,
    is_check,
    reset,
    wait_until,
)

SERVER = """
import socket, sys, threading
def serve(sock):
    buffer = b''
    while True:
        data = sock.recv(65536)
        if not data:
            return
        buffer += data
        while b'\\n\\n' in buffer:
            message, _, buffer = buffer.partition(b'\\n\\n')
            instance = message.partition(b'\\ninstance=')[2].partition(b'\\n')[0]
            sock.sendall(b'action=DUNNO ' + instance + b' ' + sys.argv[2].encode() + b'\\n\\n')
def safely(sock):
    try:
        serve(sock)
    except OSError:
        pass
    sock.close()
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])), backlog=1024)
while True:
    threading.Thread(target=safely, args=(listener.accept()[0],), daemon=True).start()
"""


class ServerProcess:
    """An echo server as a process of its own, to be killed, stopped, continued and restarted."""

    def __init__(self, name: str) -> None:
        self.name, self.port = name, free_port()
        self.start()

    def start(self) -> None:
        """Start; return when it can be connected to."""
        self.process = subprocess.Popen([sys.executable, '-c', SERVER, str(self.port), self.name])

        def connects() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', self.port)):
                return True
            return False

        wait_until(connects)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop it as it is; return when all its threads stand still."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ') T ' in Path(f'/proc/{self.process.pid}/stat').read_text())

    @property
    def service(self) -> str:
        return f'{self.name}=127.0.0.1:{self.port}'


@contextlib.contextmanager
def processes(names: str) -> Iterator[list[ServerProcess]]:
    """Run an echo server process for each letter."""
    started = [ServerProcess(name) for name in names]
    try:
        yield started
    finally:
        for server in started:
            if server.process.poll() is None:
                server.kill()


class Prefork(PolicyServerStub):
    """Has so many children, each of which serves one connection to its end; more wait in the kernel."""

    def __init__(self, children: int, behaviour: Behaviour = echo, name: str = 'A') -> None:
        self._children = children
        super().__init__(behaviour, name)

    def start(self) -> None:
        super().start()
        assert self._listener is not None
        for _ in range(self._children - 1):  # the first is super's
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _begin(self, peer: Peer) -> None:
        self._serve(peer)


class FewAtATime(PolicyServerStub):
    """Ends connections beyond a limit, as xinetd's `instances` and systemd's `MaxConnections` do."""

    def __init__(self, limit: int, behaviour: Behaviour = echo,
                 end: Callable[[socket.socket], None] = socket.socket.close) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._free, self._end = limit, end
        super().__init__(behaviour)

    def take_place(self) -> None:
        """Have one place less from now on, as if someone else held it."""
        with self._lock:
            self._free -= 1

    def _serve(self, peer: Peer) -> None:
        with self._lock:
            self._free -= 1
            full = self._free < 0
        if full:
            peer.closed.set()
            self._end(peer.sock)
        else:
            super()._serve(peer)
        with self._lock:
            self._free += 1


class OneInTen(PolicyServerStub):
    """Ends one in ten new connections: at once, at its first bytes, or when it has read all of a request."""

    def __init__(self, when: str, end: Callable[[socket.socket], None] = reset) -> None:
        self._when, self._end = when, end
        self._count = itertools.count(1)
        super().__init__(echo)

    def _serve(self, peer: Peer) -> None:
        if next(self._count) % 10 == 0:
            with contextlib.suppress(OSError):
                if self._when == 'first bytes':
                    peer.sock.recv(10)
                elif self._when == 'request':
                    peer.sock.recv(65536)
            peer.closed.set()
            self._end(peer.sock)
        else:
            super()._serve(peer)


class ClosesIdle(PolicyServerStub):
    """Closes a connection that was idle for so many seconds."""

    def __init__(self, seconds: float, end: Callable[[socket.socket], None] = socket.socket.close) -> None:
        self._seconds, self._end = seconds, end
        super().__init__(echo)

    def _serve(self, peer: Peer) -> None:
        peer.sock.settimeout(self._seconds)
        super()._serve(peer)


def checked(mail: Behaviour, check: Behaviour = echo) -> Behaviour:
    """Behave differently at mail and at a check."""
    return lambda peer, message: (check if is_check(message) else mail)(peer, message)


def for_sender(sender: str, fault: Behaviour, otherwise: Behaviour = echo) -> Behaviour:
    """Misbehave at mail of one sender."""
    return lambda peer, message: (fault if attributes(message)['sender'] == sender else otherwise)(peer, message)


def closes_after(answers: int, behaviour: Behaviour = echo,
                 end: Callable[[socket.socket], None] = socket.socket.close) -> Behaviour:  # fmt: skip
    """Hang up behind every so many answers of a connection."""

    def behave(peer: Peer, message: bytes) -> None:
        behaviour(peer, message)
        if peer.requests % answers == 0:
            end(peer.sock)
            raise HangUp

    return behave


def twice(pause: float, now: Callable[[Peer], bool] = lambda peer: True) -> Behaviour:
    """Answer, and where `now` says so, answer again after a pause."""

    def behave(peer: Peer, message: bytes) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo(peer, message)
        if now(peer):
            end = time.perf_counter() + pause
            while time.perf_counter() < end:
                time.sleep(0)
            echo(peer, message)

    return behave



"""Policy servers of the kinds that exist: prefork, with a limit of connections, that close, that cannot be checked."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable

from tests.support import (
    Behaviour,
    HangUp,
    Peer,
    PolicyServerStub,
    attributes,
    echo,
    is_check,
    reset,
)

#: How a server ends a connection.
End = Callable[[socket.socket], None]


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
                 end: End = socket.socket.close) -> None:  # fmt: skip
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


class RefusesBeyond(PolicyServerStub):
    """Listens while it has fewer connections than its limit."""

    def __init__(self, limit: int, behaviour: Behaviour) -> None:
        self._limit, self._lock = limit, threading.Lock()
        super().__init__(behaviour)

    def _begin(self, peer: Peer) -> None:
        with self._lock:
            if self.open >= self._limit and self._listener is not None:
                self._listener.close()
                self._listener = None
        super()._begin(peer)

    def _serve(self, peer: Peer) -> None:
        super()._serve(peer)
        with self._lock:
            if self._listener is None and self.open < self._limit:
                self.start()


class OneInTen(PolicyServerStub):
    """Ends one in ten new connections: at once, at its first bytes, or when it has read all of a request."""

    def __init__(self, when: str, end: End = reset) -> None:
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


def checked(mail: Behaviour, check: Behaviour = echo) -> Behaviour:
    """Behave differently at mail and at a check."""
    return lambda peer, message: (check if is_check(message) else mail)(peer, message)


def for_sender(sender: str, fault: Behaviour, otherwise: Behaviour = echo) -> Behaviour:
    """Misbehave at mail of one sender."""
    return lambda peer, message: (fault if attributes(message)['sender'] == sender else otherwise)(peer, message)


def closes_after(answers: int, behaviour: Behaviour = echo,
                 end: End = socket.socket.close) -> Behaviour:  # fmt: skip
    """Hang up behind every so many answers of a connection."""

    def behave(peer: Peer, message: bytes) -> None:
        behaviour(peer, message)
        if peer.requests % answers == 0:
            end(peer.sock)
            raise HangUp

    return behave


def closes_idle(seconds: float, end: End = socket.socket.close) -> Behaviour:
    """Hang up where no request follows an answer for so many seconds."""

    def behave(peer: Peer, message: bytes) -> None:
        echo(peer, message)
        if not select.select([peer.sock], [], [], seconds)[0]:
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



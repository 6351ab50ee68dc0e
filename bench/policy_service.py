"""A small, fast policy server for loads and checks: every answer says whose it is and who gave it.

Usage:
  policy_service --listen=WHERE --name=NAME [options]
  policy_service -h | --help

Answers each request with `action=DUNNO <its instance> <NAME>`. Run from the project's folder:
python -m bench.policy_service --listen=127.0.0.1:10061 --name=A

Options:
  --listen=WHERE     127.0.0.1:10061, [::1]:10061 or unix:/path
  --name=NAME        what it calls itself in its answers
  --delay=SECONDS    time it takes for an answer [default: 0]
  --jitter=SECONDS   more time, at random between none and this [default: 0]
  --close-after=N    hang up after so many answers on a connection, 0: never [default: 0]
  --size=BYTES       make answers this long with padding, 0: as they are [default: 0]
  -h, --help         show this text
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from typing import Any, NamedTuple

import gevent
import gevent.socket
from docopt import docopt
from gevent.server import StreamServer
from greenlet import greenlet

from bench.protocol import echo_of

#: Bytes asked from one recv(); a usual request has 550.
RECEIVE = 65536
#: Connections the kernel holds for us.
BACKLOG = 1024
READ = 1  # libev's EV_READ


class Manner(NamedTuple):
    """How a policy server answers."""

    name: bytes
    delay: float  # seconds
    jitter: float  # seconds
    close_after: int  # answers, 0: never
    size: int  # bytes, 0: as they are

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a request."""
        answer = echo_of(request, self.name)
        return answer[:-2].ljust(self.size - 3) + b'.\n\n' if self.size else answer

    def pause(self) -> None:
        """Take the time that an answer takes."""
        if self.delay or self.jitter:
            gevent.sleep(self.delay + random.random() * self.jitter)


class Reader:
    """Waits for a socket with a watcher that stays registered: far cheaper than a recv() that has to wait."""

    def __init__(self, fd: int) -> None:
        self._hub = gevent.get_hub()
        self._waiter: greenlet | None = None
        self._watcher: Any = self._hub.loop.io(fd, READ)

    def _readable(self) -> None:
        if self._waiter is not None:
            self._waiter.switch()
        else:
            self._watcher.stop()  # it is at work; wait() starts it again

    def wait(self) -> None:
        """Sleep until there is something to receive."""
        if not self._watcher.active:
            self._watcher.start(self._readable)
        self._waiter = gevent.getcurrent()
        try:
            self._hub.switch()
        finally:
            self._waiter = None

    def close(self) -> None:
        """Free the watcher."""
        self._watcher.stop()
        self._watcher.close()


def serve(sock: gevent.socket.socket, manner: Manner) -> None:
    """Answer the requests of one connection until it ends, however they are cut or joined."""
    sock_reader, buffer, answers = Reader(sock.fileno()), b'', 0
    try:
        while True:
            sock_reader.wait()
            data = sock.recv(RECEIVE)
            if not data:
                return
            buffer = buffer + data if buffer else data
            while (end := buffer.find(b'\n\n')) >= 0:
                request, buffer = buffer[: end + 1], buffer[end + 2 :]
                manner.pause()
                send(sock, manner.answer(request))
                answers += 1
                if answers == manner.close_after:
                    return
    except OSError:
        return  # the other side is gone
    finally:
        sock_reader.close()


def send(sock: gevent.socket.socket, data: bytes) -> None:
    """Send all; nearly always at once, where sendall() costs several times as much. Raises OSError."""
    sent = sock.send(data)
    if sent < len(data):
        sock.sendall(data[sent:])


def listener(where: str) -> gevent.socket.socket:
    """Return a listening socket for host:port or unix:/path. Raises OSError, ValueError."""
    if where.startswith('unix:'):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(where[5:])
        sock = gevent.socket.socket(socket.AF_UNIX)
        sock.bind(where[5:])
    else:
        host, _, port = where.rpartition(':')
        sock = gevent.socket.socket(socket.AF_INET6 if host.startswith('[') else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip('[]'), int(port)))
    sock.listen(BACKLOG)
    return sock


def main() -> int:
    """Run the command; return its exit status."""
    given = docopt(__doc__)
    manner = Manner(given['--name'].encode(), float(given['--delay']), float(given['--jitter']),
                    int(given['--close-after']), int(given['--size']))  # fmt: skip

    def handle(sock: gevent.socket.socket, _address: object) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serve(sock, manner)

    try:
        server = StreamServer(listener(given['--listen']), handle)
    except (OSError, ValueError) as error:
        print(f"policy_service: --listen '{given['--listen']}': {error}", file=sys.stderr)
        return 1
    print(f'policy server {given["--name"]} serves at {given["--listen"]}', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""What the tests are made of: scripted policy servers, the proxy as a process, and clients; the rest is in bench/.

Nothing here is monkey-patched: stubs are plain threads and sockets, the proxy runs as its user would start it. A
stub is for what no process of bench/policy_service.py can show. HAPOLICY_TEST_SCALE stretches every wait on a slow
machine.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gevent.event import Event

from bench.processes import MODULE as MODULE
from bench.processes import ROOT as ROOT
from bench.processes import SCALE as SCALE
from bench.processes import PolicyService, Process, Processes
from bench.processes import accepts as accepts
from bench.processes import free_port as free_port
from bench.protocol import attributes as attributes
from bench.protocol import echo_of
from bench.protocol import is_check as is_check
from bench.protocol import new_instance as new_instance
from bench.protocol import request as request
from bench.smtpd import Plan, Try, start_load
from bench.smtpd import PostfixClient as PostfixClient
from hapolicy_gevent import Client, Pool

T = TypeVar('T')

#: Becomes the command in its arguments, to which systemd has handed sockets over.
ACTIVATED = 'import os,sys; os.environ["LISTEN_PID"]=str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])'


def wait_until(condition: Callable[[], object], seconds: float = 30, what: str | Callable[[], str] = '') -> None:
    """Poll until `condition` holds; fail after so many seconds, saying what was waited for."""
    give_up = time.monotonic() + seconds * SCALE
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f'not within {seconds}s: {what() if callable(what) else what or condition}')
        time.sleep(0.01)


def reset(sock: socket.socket) -> None:
    """Close with a reset instead of a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    sock.close()


class HangUp(Exception):
    """Raised by a behaviour to end the connection."""


class Peer:
    """One connection that a stub server serves, as its behaviour sees it."""

    def __init__(self, sock: socket.socket, server: PolicyServerStub) -> None:
        self.sock, self.server = sock, server
        self.requests = 0
        self.closed = threading.Event()  # seen closed by the proxy

    def send(self, data: bytes) -> None:
        """Send bytes as they are; a closed connection is no error."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def hang(self) -> None:
        """Answer nothing until the other side or the test ends the connection."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        raise HangUp


#: What a stub does with a request: it sends on the peer, hangs, or raises HangUp.
Behaviour = Callable[[Peer, bytes], None]


def echo(peer: Peer, message: bytes) -> None:
    """Answer with the request's own instance and the server's name: whose answer is it, and from where."""
    peer.send(echo_of(message, peer.server.name.encode()))


def answer(data: bytes) -> Behaviour:
    """Send these bytes."""
    return lambda peer, message: peer.send(data)


def hang(peer: Peer, message: bytes) -> None:
    """Never answer."""
    peer.hang()


def hang_up(peer: Peer, message: bytes) -> None:
    """Close without an answer."""
    raise HangUp


def slow(seconds: float) -> Behaviour:
    """Answer as echo does, after so many seconds."""

    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(seconds)
        echo(peer, message)

    return behave


class PolicyServerStub:
    """A policy server at an address (or a unix path) that does as its `behaviour` says, a thread per connection."""

    def __init__(self, behaviour: Behaviour = echo, name: str = 'A', port: int = 0, path: str = '',
                 host: str = '127.0.0.1') -> None:  # fmt: skip
        self.behaviour, self.name, self.path, self._host = behaviour, name, path, host
        self._family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self.port = port or free_port(self._family)
        self.requests: list[bytes] = []  # of mail
        self.checks = 0  # requests that the proxy asked of its own
        self.accepted = 0
        self.peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self.start()

    @property
    def service(self) -> str:
        """The -s option's value for this server, without further fields."""
        host = f'[{self._host}]' if ':' in self._host else self._host
        return f'{self.name}=unix:{self.path}' if self.path else f'{self.name}={host}:{self.port}'

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len([peer for peer in self.peers if not peer.closed.is_set()])

    def start(self) -> None:
        """Listen, again after stop()."""
        if self.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.path)
            listener.listen(1024)
        else:
            listener = socket.create_server((self._host, self.port), family=self._family, backlog=1024)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and end those that are open, as a killed server does."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            peer = Peer(sock, self)
            self.peers.append(peer)
            self._begin(peer)

    def _begin(self, peer: Peer) -> None:
        threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        buffer = b''
        try:
            while True:
                while b'\n\n' in buffer:
                    message, _, buffer = buffer.partition(b'\n\n')
                    message += b'\n\n'
                    if is_check(message):
                        self.checks += 1
                    else:
                        self.requests.append(message)
                    peer.requests += 1
                    self.behaviour(peer, message)
                data = peer.sock.recv(65536)
                if not data:
                    return
                buffer += data
        except (OSError, HangUp):
            pass
        finally:
            peer.closed.set()
            peer.sock.close()

    def __enter__(self) -> PolicyServerStub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class SmtpdLoad:
    """Clients that ask one request after another, as smtpds do, from `with` to its end: a load of bench/smtpd.py.

    Each request must be answered by a server, with its own answer; with `second_try` at Postfix's second try, too,
    which it makes a second after a connection ended in place of an answer. `defaults` is the part of the answers that
    may be the default action.
    """

    def __init__(self, where: int | str, clients: int = 4, think: float = 0.005, second_try: bool = True,
                 defaults: float = 0.0, request_limit: int = 0) -> None:  # fmt: skip
        place = f'unix:{where}' if isinstance(where, str) else f'127.0.0.1:{where}'
        self._plan = Plan(place, clients, seconds=3600, think=think, patience=60 * SCALE, trace=True,
                          request_limit=request_limit)  # fmt: skip
        self._processes, self._second_try, self._defaults = Processes(), second_try, defaults
        self._ended: list[Try] | None = None

    @property
    def tries(self) -> list[Try]:
        """All tries until now."""
        return self._load.tries if self._ended is None else self._ended

    def servers(self, since: float = 0, until: float = math.inf) -> Counter[str]:
        """Return who answered how often between two instants (monotonic seconds)."""
        return Counter(each.server for each in self.tries if not each.error and since <= each.when < until)

    def held(self, since: float = 0) -> list[float]:
        """Return how long the requests were held that were answered since an instant, the longest last."""
        return sorted(each.seconds for each in self.tries if not each.error and each.when >= since)

    @property
    def lost(self) -> list[Try]:
        """The tries that failed at a connection that had not been found closed before; a second one has to succeed."""
        return [each for each in self.tries if each.error not in ('', 'closed')]

    def flows(self, number: int = 50) -> None:
        """Wait for further answers."""
        count = len(self.tries) + number
        wait_until(lambda: len(self.tries) > count, what='answers')

    def __enter__(self) -> SmtpdLoad:
        self._processes.__enter__()
        try:
            self._load = start_load(self._plan, self._processes)
            self.flows(self._plan.clients)
        except BaseException:
            self._processes.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: Any) -> None:
        try:
            self._load.stop()
            result = self._load.result()
            self._ended = self._load.tries
        finally:
            self._processes.__exit__(kind, *more)
        wrong = result.lost + result.swapped + result.malformed
        wrong += result.defaults if result.defaults > self._defaults * result.requests else 0
        wrong += 0 if self._second_try else result.errors.total()
        assert kind is not None or not wrong, (wrong, [each for each in self._ended if each.error][:5])


class ProxyProcess(Process):
    """hapolicy_gevent.py as a process of its own, listening on 127.0.0.1."""

    def __init__(self, *arguments: str, port: int = 0, python: str = sys.executable,
                 before: tuple[str, ...] = (), environment: dict[str, str] | None = None,
                 inherited: socket.socket | None = None, module: Path = MODULE) -> None:  # fmt: skip
        self.port = port or free_port()
        options: dict[str, Any] = {}
        if inherited is not None:
            before, environment = (*before, python, '-c', ACTIVATED), {**(environment or {}), 'LISTEN_FDS': '1'}
            options = {'pass_fds': [3], 'preexec_fn': functools.partial(os.dup2, inherited.fileno(), 3)}
        super().__init__([*before, python, module, f'--listen=127.0.0.1:{self.port}', '-lL', *arguments],
                         env={**os.environ, **(environment or {})}, **options)  # fmt: skip
        wait_until(lambda: 'serves up to' in self.log or not self.running, 60, 'the proxy serves')
        assert self.running, self.log

    def logged(self, text: str, seconds: float = 30) -> None:
        """Wait until the log holds `text`."""
        wait_until(lambda: text in self.log, seconds, lambda: f'{text!r} in the log:\n{self.log[-2000:]}')

    def client(self, seconds: float = 30) -> PostfixClient:
        """Connect as Postfix does."""
        return PostfixClient(self.port, seconds)

    def terminate(self, seconds: float = 40) -> int:
        """Send SIGTERM; return the exit status."""
        self.send(signal.SIGTERM)
        return self.process.wait(seconds * SCALE)

    def __enter__(self) -> ProxyProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.running:
            self.kill()
        assert kind is not None or 'Internal error' not in self.log, self.log


@contextlib.contextmanager
def processes(names: str, *options: str) -> Iterator[list[PolicyService]]:
    """Run a process of bench/policy_service.py for each letter: to be killed, hung and brought back."""
    with Processes() as started:
        yield started.policy_services(names, *options)


def ask_all(proxy: ProxyProcess, clients: int, requests: int) -> list[str]:
    """Ask from many clients at once, each answer checked to be one, and its own; return who answered."""

    def work(_: int) -> list[str]:
        with proxy.client(120) as client:
            return [client.ask_own() for _ in range(requests)]

    return [server for each in in_threads(clients, work) for server in each]


#: A short request; its instance is to be put in.
ONE = b'request=smtpd_access_policy\ninstance=%s\n\n'


def run(*arguments: str | Path, program: Sequence[str | Path] = (sys.executable, MODULE),
        **options: Any) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """Run the program to its end; further options are those of subprocess.run."""
    if 'stdin' not in options:
        options = {'input': b'', **options}
    return subprocess.run([*program, *arguments], **{'capture_output': True, 'timeout': 60 * SCALE, **options})


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


@contextlib.contextmanager
def stubs(*behaviours: Behaviour) -> Iterator[list[PolicyServerStub]]:
    """Run a stub server for each behaviour, named A, B, C..."""
    servers = [PolicyServerStub(behaviour, name) for behaviour, name in zip(behaviours, 'ABCDEFGH', strict=False)]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def in_threads(number: int, work: Callable[[int], T]) -> list[T]:
    """Run work(0..number-1) in threads of their own; return the results, raise the first failure."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400 * SCALE)
        assert not thread.is_alive(), 'a client still waits'
    if errors:
        raise errors[0]
    return [results[i] for i in range(number)]


def wait_in_line(pool: Pool) -> None:
    """Let a request wait for a connection of a pool."""
    client = Client(socket.socketpair()[0])
    client.woken = Event()
    client.join(pool)

"""What the tests are made of: scripted policy servers, a Postfix client, and the proxy as a process.

Nothing here is monkey-patched: servers and clients are plain threads and sockets, the proxy runs
as its user would start it. HAPOLICY_TEST_SCALE stretches every wait on a slow machine.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
#: What is tested; test_compiled.py has it run another program.
MODULE = Path(os.environ.get('HAPOLICY_PROGRAM', ROOT / 'hapolicy_gevent.py'))
T = TypeVar('T')
SCALE = float(os.environ.get('HAPOLICY_TEST_SCALE', '1'))

_instances = itertools.count(1)


#: Becomes the command in its arguments, to which systemd has handed sockets over.
ACTIVATED = 'import os,sys; os.environ["LISTEN_PID"]=str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])'


def wait_until(condition: Callable[[], object], seconds: float = 30, what: str | Callable[[], str] = '') -> None:
    """Poll until `condition` holds; fail after so many seconds, saying what was waited for."""
    give_up = time.monotonic() + seconds * SCALE
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f'not within {seconds}s: {what() if callable(what) else what or condition}')
        time.sleep(0.01)


def _ports() -> Iterator[int]:
    """Yield the ports of a block that no other process of the tests has, below those that connections leave from."""
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
    """Return a port that nobody listens on now, and that nobody else is given soon."""
    while True:
        port = next(_free)
        with socket.socket(family) as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(('127.0.0.1' if family == socket.AF_INET else '::1', port))
            return port


def new_instance() -> str:
    """Return an `instance` that no other message has, in Postfix's form."""
    return f'{os.getpid():x}.{int(time.time()):x}.{next(_instances):x}.0'


def request(**attributes: object) -> bytes:
    """Return a policy request as Postfix sends it, with these attributes changed."""
    values: dict[str, object] = {
        'request': 'smtpd_access_policy',
        'protocol_state': 'RCPT',
        'protocol_name': 'ESMTP',
        'client_address': '192.0.2.7',
        'client_name': 'mail.example.net',
        'reverse_client_name': 'mail.example.net',
        'helo_name': 'mail.example.net',
        'sender': 'alice@example.net',
        'recipient': 'bob@example.org',
        'recipient_count': '0',
        'queue_id': '',
        'instance': '',
        'size': '12345',
        'etrn_domain': '',
        'stress': '',
        'sasl_method': '',
        'sasl_username': '',
        'sasl_sender': '',
        'ccert_subject': '',
        'ccert_issuer': '',
        'ccert_fingerprint': '',
        'encryption_protocol': '',
        'encryption_cipher': '',
        'encryption_keysize': '0',
        'policy_context': '',
    }
    values.update(attributes)
    return ''.join(f'{name}={value}\n' for name, value in values.items()).encode() + b'\n'


def attributes(message: bytes) -> dict[str, str]:
    """Return the attributes of a request."""
    lines = message.decode('utf-8', 'surrogateescape').split('\n')
    return dict(line.rstrip('\r').split('=', 1) for line in lines if '=' in line)


def is_check(message: bytes) -> bool:
    """Tell whether a request is the proxy's own question."""
    return b'protocol_state=CONNECT\n' in message and b'\nsender=\nrecipient=\n' in message


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
    peer.send(b'action=DUNNO %s %s\n\n' % (attributes(message).get('instance', '').encode(), peer.server.name.encode()))


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
    """A policy server on 127.0.0.1 (or a unix path) that does as its `behaviour` says, a thread per connection."""

    def __init__(self, behaviour: Behaviour = echo, name: str = 'A', port: int = 0, path: str = '') -> None:
        self.behaviour, self.name, self.path = behaviour, name, path
        self.port = port or free_port()
        self.requests: list[bytes] = []  # of mail
        self.checks = 0  # requests that the proxy asked of its own
        self.accepted = 0
        self.peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self.start()

    @property
    def service(self) -> str:
        """The -s option's value for this server, without further fields."""
        return f'{self.name}=unix:{self.path}' if self.path else f'{self.name}=127.0.0.1:{self.port}'

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
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(('127.0.0.1', self.port))
        listener.listen(1024)
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


class PostfixClient:
    """A connection as smtpd holds it: one request at a time, answers matched by order."""

    def __init__(self, where: int | str, seconds: float = 30) -> None:
        if isinstance(where, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(seconds * SCALE)
            self.sock.connect(where)
        else:
            self.sock = socket.create_connection(('127.0.0.1', where), timeout=seconds * SCALE)
        self.buffer = b''

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def read_answer(self) -> bytes:
        """Return one answer with its empty line; fewer bytes if the connection ends first."""
        while b'\n\n' not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                rest, self.buffer = self.buffer, b''
                return rest
            self.buffer += data
        end = self.buffer.index(b'\n\n') + 2
        message, self.buffer = self.buffer[:end], self.buffer[end:]
        return message

    def ask(self, message: bytes) -> str:
        """Send a request and return the action of its answer; it must be exactly one well-formed answer (I1)."""
        self.send(message)
        reply = self.read_answer()
        assert reply.startswith(b'action=') and reply.endswith(b'\n\n') and reply.count(b'\n') == 2, reply
        assert not self.buffer, self.buffer
        return reply[7:-2].decode()

    def ask_own(self) -> str:
        """Ask with an instance of its own; return who answered. Fails on another's answer (I2)."""
        instance = new_instance()
        action = self.ask(request(instance=instance))
        if action == 'dunno':
            return 'default'
        word, answered, server = action.split(' ')
        assert (word, answered) == ('DUNNO', instance), f'asked with {instance}, got {action!r}'
        return server

    def at_end(self) -> bool:
        """Tell whether the proxy has closed the connection; waits for it."""
        return self.sock.recv(1) == b''

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> PostfixClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SmtpdLoad:
    """Clients that ask one request after another, as smtpds do, from `with` to its end.

    Where a connection ends in place of an answer, each asks once more, a second later. A request that is not
    answered then, or by the default action, is a fault; at the end there must be none.
    """

    def __init__(self, where: int | str, clients: int = 4) -> None:
        self._where, self._over = where, threading.Event()
        self.answers = 0
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(clients)]

    def _ask(self, client: PostfixClient | None) -> PostfixClient | None:
        for pause in (1, 0):
            try:
                client = client or PostfixClient(self._where, 60)
                assert client.ask_own() != 'default'
                self.answers += 1
                return client
            except (OSError, AssertionError) as error:
                client = None
                if not pause:
                    self.faults.append(repr(error))
                time.sleep(pause)
        return None

    def _work(self) -> None:
        client = None
        while not self._over.is_set():
            client = self._ask(client)
            time.sleep(0.005)

    def flows(self) -> None:
        """Wait for further answers."""
        count = self.answers
        wait_until(lambda: self.answers > count + 50, what='answers')

    def __enter__(self) -> SmtpdLoad:
        for thread in self._threads:
            thread.start()
        self.flows()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert kind is not None or not self.faults, self.faults[:5]


class ProxyProcess:
    """hapolicy_gevent.py as a process of its own, listening on 127.0.0.1, its log kept."""

    def __init__(self, *arguments: str, port: int = 0, python: str = sys.executable,
                 before: tuple[str, ...] = (), environment: dict[str, str] | None = None,
                 inherited: socket.socket | None = None, module: Path = MODULE) -> None:  # fmt: skip
        self.port = port or free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        activated: dict[str, Any] = {}
        if inherited is not None:
            before, environment = (*before, python, '-c', ACTIVATED), {**(environment or {}), 'LISTEN_FDS': '1'}
            activated = {'pass_fds': [3], 'preexec_fn': functools.partial(os.dup2, inherited.fileno(), 3)}
        self.process = subprocess.Popen(
            [*before, python, str(module), f'--listen=127.0.0.1:{self.port}', '-lL', *arguments],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**os.environ, **(environment or {})}, **activated,
        )  # fmt: skip
        wait_until(lambda: 'serves up to' in self.log or self.process.poll() is not None, 60, 'the proxy serves')
        assert self.process.poll() is None, self.log

    @property
    def log(self) -> str:
        """Everything it has logged."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def logged(self, text: str, seconds: float = 30) -> None:
        """Wait until the log holds `text`."""
        wait_until(lambda: text in self.log, seconds, lambda: f'{text!r} in the log:\n{self.log[-2000:]}')

    def client(self, seconds: float = 30) -> PostfixClient:
        """Connect as Postfix does."""
        return PostfixClient(self.port, seconds)

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
        fields = Path(f'/proc/{self.process.pid}/stat').read_text().rsplit(')', 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def terminate(self, seconds: float = 40) -> int:
        """Send SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds * SCALE)

    def __enter__(self) -> ProxyProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert kind is not None or 'Internal error' not in self.log, self.log


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

"""One process of a load: bench/smtpd.py starts it with a plan, tells it when to begin, and reads its result.

It ends early when its stdin does. With `trace` each try is a line on stderr: Load.tries reads them.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import select
import socket
import sys
import time
from collections import Counter
from typing import Any

import gevent
import gevent.socket
from greenlet import greenlet

from bench.protocol import around_instance
from bench.smtpd import Plan, Result

#: Postfix's smtpd_policy_service_try_limit, and _retry_delay in seconds.
TRIES, RETRY_DELAY = 2, 1.0
#: Seconds of delay that a load with a rate makes up for; what is later is left out, never sent in a burst.
CATCH_UP = 0.1
#: Bytes of an answer at most.
MAX_ANSWER = 65536
READ = 1  # libev's EV_READ

#: The answers of bench/policy_service.py: another's instance in one is a stranger's verdict.
ECHO = re.compile(rb'action=DUNNO [0-9a-f]+\.[0-9a-f]+\.[0-9a-f]+\.[0-9a-f]+ .*\n\n')


class TryFailed(Exception):
    """A try got no answer; the text is the kind of error."""


class FoundClosed(Exception):
    """The connection was readable before the request was written: Postfix takes another."""


def kind_of(error: OSError) -> str:
    """Return the word that an error is counted under."""
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
        return 'refused'
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return 'reset'
    if isinstance(error, TimeoutError):
        return 'late'
    return errno.errorcode.get(error.errno or 0, 'failed')


def connect(where: str, seconds: float) -> socket.socket:
    """Return a connected non-blocking socket. Raises OSError."""
    if where.startswith('unix:'):
        return connect_unix(where[5:], seconds)
    host, _, port = where.rpartition(':')
    # not gevent's own connect(): its resolver asks a thread even for a number, which costs more than to connect
    sock = socket.socket(socket.AF_INET6 if host.startswith('[') else socket.AF_INET)
    try:
        sock.setblocking(False)
        error = sock.connect_ex((host.strip('[]'), int(port)))
        if error == errno.EINPROGRESS:
            gevent.socket.wait_write(sock.fileno(), seconds, TimeoutError())
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_unix(path: str, seconds: float) -> socket.socket:
    """Return a connected non-blocking unix socket. Raises OSError."""
    sock = gevent.socket.socket(socket.AF_UNIX)
    sock.settimeout(seconds)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


class Connection:
    """A connection to what is under load, waited for with a watcher that stays registered."""

    def __init__(self, where: str, patience: float) -> None:
        self._socket = connect(where, patience)
        self._patience = patience
        self._hub = gevent.get_hub()
        self._waiter: greenlet | None = None
        self._late = False
        self.waiting_since = 0.0  # monotonic seconds, 0.0: it does not wait
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)
        self._watcher: Any = self._hub.loop.io(self._socket.fileno(), READ)

    def readable(self) -> bool:
        """Tell whether there is something to receive, or the end."""
        return bool(self._poll.poll(0))

    def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                gevent.socket.wait_write(self._socket.fileno(), self._patience, TimeoutError())

    def receive(self) -> bytes:
        """Wait for bytes and return them; b'' at the end. Raises TryFailed, OSError."""
        if not self._watcher.active:
            self._watcher.start(self._wake)
        self._waiter = gevent.getcurrent()
        self.waiting_since = time.monotonic()
        try:
            self._hub.switch()
        finally:
            self._waiter, self.waiting_since = None, 0.0
        if self._late:
            raise TryFailed('late')
        return self._socket.recv(MAX_ANSWER)

    def _wake(self) -> None:
        if self._waiter is not None:
            self._waiter.switch()
        else:
            self._watcher.stop()  # readable() will see it

    def give_up(self) -> None:
        """End a wait that has lasted too long."""
        if self._waiter is not None:
            self._late = True
            self._hub.loop.run_callback(self._wake)

    def close(self) -> None:
        """Close it and free its watcher."""
        self._watcher.stop()
        self._watcher.close()
        self._socket.close()


class Worker:
    """All clients of a process, and what becomes of their requests."""

    def __init__(self, plan: Plan, started: float) -> None:
        self.plan, self.started = plan, started
        self.result = Result()
        self._ends = started + plan.seconds
        self._left = plan.requests
        self._interval = 1 / plan.rate if plan.rate else 0.0
        self._due = started
        self._default = b'action=%b\n\n' % plan.default.encode()
        self._clients = [Client(self, number) for number in range(plan.clients)]

    def run(self) -> None:
        """Run all clients to their end."""
        gevent.sleep(max(0.0, self.started - time.monotonic()))
        watch, end = gevent.spawn(self._watch), gevent.spawn(self._wait_for_end)
        gevent.joinall([gevent.spawn(client.run) for client in self._clients], raise_error=True)
        gevent.killall([watch, end])

    def _wait_for_end(self) -> None:
        gevent.socket.wait_read(sys.stdin.fileno())
        self._ends = 0.0

    def next_turn(self) -> bool:
        """Wait until a client may send its next request; return False at the end of the load."""
        now = time.monotonic()
        if now >= self._ends or (self.plan.requests and self._left <= 0):
            return False
        self._left -= 1
        if not self._interval:
            return True
        due = max(self._due, now - CATCH_UP)
        self._due = due + self._interval
        if due >= self._ends:
            return False
        if due > now:
            gevent.sleep(due - now)
        return True

    def trace(self, began: float, error: str, server: str = '-') -> None:
        """Tell of a try of a request that began at a monotonic second, if the plan asks for it."""
        if self.plan.trace:
            now = time.monotonic()
            os.write(2, f'{now:.6f} {now - began:.6f} {error or "-"} {server}\n'.encode())

    def _watch(self) -> None:
        """Find those who have waited too long: one timer for all, where one for each request costs more."""
        patience = self.plan.patience
        while True:
            gevent.sleep(min(1.0, patience / 20))
            overdue = time.monotonic() - patience
            for client in self._clients:
                connection = client.connection
                if connection is not None and 0 < connection.waiting_since < overdue:
                    connection.give_up()

    def count(self, answer: bytes, expected: bytes, latency: float) -> str:
        """Count an answer; return who gave it, '' if the connection is out of step."""
        result, server = self.result, '?'
        result.requests += 1
        result.seconds = time.monotonic() - self.started
        result.latency.add(latency)
        if answer.startswith(expected) and answer.find(b'\n') == len(answer) - 2:
            server = answer[len(expected) : -2].split(b' ', 1)[0].decode(errors='replace')
        elif not answer.startswith(b'action=') or answer.find(b'\n') != len(answer) - 2 or b'\r' in answer:
            result.malformed += 1
            return ''
        elif answer == self._default:
            result.defaults += 1
            return 'default'
        elif ECHO.fullmatch(answer):
            result.swapped += 1
            return 'swapped'
        second = int(result.seconds)
        servers = result.by_second.get(second)
        if servers is None:
            servers = result.by_second[second] = Counter()
        servers[server] += 1
        return server


class Client:
    """An smtpd: it asks, checks the answer, and tries again as Postfix does (attr_clnt.c)."""

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker = worker
        self._head, self._tail = around_instance(**worker.plan.attributes)
        self._fixed = worker.plan.attributes.get('instance')
        self._prefix = b'%x.%x.%x.' % (os.getpid(), int(time.time()), number)
        self.connection: Connection | None = None

    def run(self) -> None:
        """Send requests until the load is over."""
        worker, serial = self._worker, 0
        while worker.next_turn():
            if worker.plan.think:
                gevent.sleep(random.uniform(0, 2 * worker.plan.think))
            serial += 1
            instance = b'%b%x' % (self._prefix, serial) if self._fixed is None else self._fixed.encode()
            self._deliver(self._head + instance + self._tail, b'action=DUNNO %b ' % instance)
            if worker.plan.request_limit and not serial % worker.plan.request_limit:
                self._close()
        self._close()

    def _deliver(self, request: bytes, expected: bytes) -> None:
        """Get a request answered, in two tries as Postfix does."""
        result, started = self._worker.result, time.monotonic()
        for number in range(TRIES):
            if number:
                gevent.sleep(RETRY_DELAY)
            try:
                answer = self._ask(request)
            except FoundClosed:
                result.reconnects += 1
                self._worker.trace(started, 'closed')
            except TryFailed as failure:
                result.errors[str(failure)] += 1
                self._worker.trace(started, str(failure))
            except OSError as error:
                result.errors[kind_of(error)] += 1
                self._worker.trace(started, kind_of(error))
            else:
                server = self._worker.count(answer, expected, time.monotonic() - started)
                self._worker.trace(started, '', server or 'malformed')
                if not server:
                    self._close()
                return
            self._close()
        result.requests += 1
        result.seconds = time.monotonic() - self._worker.started
        result.lost += 1

    def _ask(self, request: bytes) -> bytes:
        """Return the bytes that came for a request. Raises FoundClosed, TryFailed, OSError."""
        if self.connection is None:
            self.connection = Connection(self._worker.plan.where, self._worker.plan.patience)
        elif self.connection.readable():
            raise FoundClosed
        self.connection.send(request)
        answer = self.connection.receive()
        chunk = answer
        while chunk and b'\n\n' not in answer and len(answer) <= MAX_ANSWER:
            chunk = self.connection.receive()
            answer += chunk
        if not chunk:
            raise TryFailed('ended')
        return answer

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def main() -> None:
    """Take the plan from the command line and the start from stdin; print the result."""
    plan = Plan(**json.loads(sys.argv[1]))
    print('ready', flush=True)
    line = os.read(0, 100)  # nothing is to be kept in a buffer: the next thing is the end
    if line:
        worker = Worker(plan, float(line))
        worker.run()
        print(json.dumps(worker.result.dump()))


if __name__ == '__main__':
    main()

#!/usr/bin/env python3
from __future__ import annotations

# assigned, as mypyc leaves a bare docstring out
__doc__ = """hapolicy - policy delegation high availability proxy

Usage:
  hapolicy [options] [--service=<service>]... [--listen=WHERE]...
  hapolicy -h | --help
  hapolicy --version

Stands between Postfix and its policy servers: picks a service for every
request by prio and weight, asks the next one when a service fails, and
returns a default action when none could answer. Without --listen it serves
one client on stdin/stdout, as Postfix spawn(8) runs it.

Service options:
  -s, --service <service>  a policy server, may be repeated:
                           <name>=<address>:<port>[:<prio>[:<weight>[:<timeout>[:<max>]]]]
                           address: IPv4, [IPv6] or a host name; or unix:/path
                             in place of <address>:<port>
                           prio: 1 or more, lower wins (10)
                           weight: 1 to 256, share among equal prios (1)
                           timeout: seconds for a whole query (30)
                           max: requests in flight at most (100)
                           an empty field takes its default

Options:
  -d, --default <action>  returns <action> if no service was available [default: dunno]
  -l, --logging           log requests
  -v, --verbose           increase logging verbosity
  -L, --stdout            log to stdout, for debugging, do NOT use with postfix
  -h, --help              show this text
  --version               show the version

Server options:
  --listen=WHERE          serve many clients: 127.0.0.1:10060, [::1]:10060 or
                          unix:/path, may be repeated
  --socket-mode=MODE      octal permissions of unix sockets [default: 0666]
  --deadline=SECONDS      answer every request within this time; keep it below
                          Postfix's smtpd_policy_service_timeout [default: 90]
  --failed=ACTION         returned in place of the default when a service is up,
                          and all that were asked failed at this request
  --max-clients=N         clients served at once, more wait in the backlog
                          (what the descriptor limit carries)
  --fall=N                failed mails in a row that take a service down while
                          another is up [default: 2]
  --stall=SECONDS         a service silent for so long while it has requests
                          gets no new ones if another is up [default: 5]
  --grace=SECONDS         time to finish after SIGTERM or SIGINT [default: 30]
  --reuse-port            let a new process listen beside this one, to replace it
  --status=WHERE          serve a status page, /status.json, /metrics and /health
                          by HTTP: 127.0.0.1:10069, [::1]:10069 or unix:/path
  --summary=SECONDS       log a summary so often while there are requests,
                          0: never [default: 60]
  --check-services        ask each service once, tell what it answered, and end

Signals:
  SIGTERM, SIGINT         stop accepting, answer what is in flight, close each
                          client between requests, end; a second one ends at once

Exit status:
  0  ended by the client, or every answer was given after a signal
  1  could not listen, or ended before every answer was given
  2  the command line cannot be used; one line on stderr says why
  With --check-services: 0 if every service answered, 1 if not
"""

import contextlib
import errno
import functools
import heapq
import itertools
import math
import operator
import os
import re
import resource
import select
import signal
import socket
import stat
import sys
import time
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import gevent
import gevent.event
import gevent.socket
from greenlet import getcurrent, greenlet

with warnings.catch_warnings():
    # docopt 0.6.2 makes newer Pythons warn when they compile it; under spawn(8) stderr is the client
    warnings.simplefilter('ignore')
    from docopt import DocoptExit, docopt

__version__ = '2.1.0'

# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------

#: Bytes of one request or answer, at most. Postfix sends under 20 kB; it would take 200 kB
#: answers, and hand them to the SMTP client as one line.
MAX_MESSAGE = 65536
#: Bytes asked from one recv(); a usual request has 600. 64 kB would be allocated and given back each time.
RECEIVE = 8192

DEFAULT_PRIO, DEFAULT_WEIGHT = 10, 1
#: Turns of a service in a cycle, which is laid out in memory: HAProxy's.
MAX_WEIGHT = 256
#: Seconds; the ancestor's, above the 20 s that SPF servers allow themselves.
DEFAULT_TIMEOUT = 30.0
#: Requests in flight per service: Postfix's default_process_limit.
DEFAULT_MAX = 100
#: Seconds to connect, inside the service's timeout: two lost SYNs (1 s + 2 s) and some room.
CONNECT_TIMEOUT = 5.0

#: Seconds of silence behind an answer that prove that no second one follows.
QUIET = 0.05
#: Seconds after which a connection that was never silent for QUIET rests, before its next use.
REST_AFTER = 1.0
#: Seconds for which a message holds the connection that answered it, and how many are opened for that.
HOLD, MAX_IDLE = 1.0, 20
#: Seconds for which an idle connection is kept beside another: a server may have few workers.
SPARE_IDLE = 2.0
#: Seconds for which each connection is used once, after a server said more than an answer.
ONCE = 60.0
#: Seconds a server connection is used at most: Postfix's own smtpd_policy_service_max_ttl.
MAX_AGE = 1000.0
#: Seconds between two connections that are given up: another proxy, or a Postfix, may wait for one of the server's few
#: children. For a slow server ten times of what a query takes.
GIVE_UP = 2.0
#: Seconds a connection waits for the lookup of its service's name before it takes the address of last time, and for one
#: that is under way when it cannot connect there.
LOOKUP, LOOKUP_MAX = 0.1, 1.0

#: Seconds between looks at the checks that run.
TICK = 0.1
#: Seconds by which a request that was answered was sent later than a check that is not: the service is full.
UNANSWERED = 1.0
#: Seconds without any answer after which a service is checked, and its last idle connection closed.
UNHEARD = 30.0
#: Seconds between checks of a service that is down: doubled by each that fails, from the first to the most. The first
#: where none is up, or a service is full.
BACKOFF_FIRST, BACKOFF_MAX = 1.0, 30.0
#: From 0.8 to 1.2: proxies that saw one server die are not to check it together.
JITTER = 0.8 + 0.4 * os.urandom(1)[0] / 255
#: Mails at once for a service on trial, where no service is up; and seconds for which others wait for their answer.
TRIALS, TRIAL_PATIENCE = 5, 0.5
#: Messages whose service is remembered: twice this at most, ten minutes of a very busy site.
MAX_INSTANCES = 20000
#: Bytes of an instance that is remembered; Postfix's have about 30.
MAX_INSTANCE = 128

#: Seconds without a request after which a client is closed at once when we drain. Another will ask again soon,
#: and is closed with that answer: a request could cross the end of its connection.
LINGER = 1.0
#: Seconds that are no time to ask a service: a request's last ones are for its default action; the shortest --deadline.
TOO_SHORT, MIN_DEADLINE = 0.005, 0.1
#: Seconds a request waits for the service it was balanced to, before any other may have it; and before one may that
#: gives no answers, which is mostly the doing of a slow message.
PATIENCE, STALLED_AFTER = 0.1, 1.0

#: HTTP connections served at once, the seconds each may last, and bytes of a request's headers.
STATUS_CONNECTIONS, STATUS_SECONDS, STATUS_HEAD = 20, 5.0, 8192
#: Seconds for which a client is read that has its answer, and more to send; and between two pieces of that.
STATUS_LINGER, STATUS_PAUSE = 0.3, 0.02
#: Seconds for which what was built for one is given to others too.
STATUS_FRESH = 0.25
#: Seconds between two samples of the counters, and how many are kept: ten minutes.
SAMPLE_SECONDS, SAMPLES = 5.0, 121
#: Seconds that the rate on the status page looks back, and its shares and quantiles.
RATE_SECONDS, SHARE_SECONDS = 10.0, 60.0

#: Connections the kernel holds for us: a `postfix reload` brings them all at once.
BACKLOG = 1024
#: Descriptors kept back for listeners, log, epoll, probes and resolving.
RESERVED_DESCRIPTORS = 16
#: Log lines waiting for the log daemon; more are dropped and counted.
MAX_LOG_LINES = 10000
#: Lines written at once.
LOG_BATCH = 200
#: Bytes of one log line; longer ones are cut, as rsyslog does at 8 kB.
MAX_LOG_LINE = 8000

NUL, LF, CR, SPACE = b'\0\n\r '  # numbers: `CR in data` takes a fourth of `b'\r' in data`, which tries a number first
SWITCH_TO = greenlet.switch
READ = 1  # libev's EV_READ, as gevent's loop.io() takes it

# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------


class HapolicyError(Exception):
    """Base of every error this module raises."""


class UsageError(HapolicyError):
    """The user's: the command line cannot be used. The text names option, value and what is allowed."""


class ListenError(HapolicyError):
    """The system's: an address cannot be listened on."""


class InvalidAnswer(HapolicyError):
    """The service's: an answer that Postfix would misread, or none."""


#: Why a client's connection is closed.
TOO_LONG, TOO_SLOW, CUT_OFF = 'request too long', 'request too slow', 'left in mid-request'
NOT_TAKEN, RESET = 'answer not taken', 'reset by the client'
CLIENT_FAULTS = (TOO_LONG, TOO_SLOW, CUT_OFF, NOT_TAKEN, RESET)


class ClientFault(HapolicyError):
    """The client's: its connection is closed; `reason` is one of CLIENT_FAULTS."""

    def __init__(self, reason: str, text: str = '') -> None:
        super().__init__(f'{reason} {text}'.rstrip())
        self.reason = reason


class ServiceFailure(HapolicyError):
    """The service's: a query got no usable answer; `reason` is one of FAILURES."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Ended(ServiceFailure):
    """Nobody's: a connection that had been used ended before the first byte of an answer."""


# ---------------------------------------------------------------------------
# Protocol: bytes in, requests and actions out. SMTPD_POLICY_README and attr_scan_plain.c of
# Postfix are the grammar.
# ---------------------------------------------------------------------------


EMPTY_LINE = re.compile(rb'\n\r?\n').search
#: An answer as nearly all are: one line of printable ASCII, no number first, no blank last.
PLAIN_ANSWER = re.compile(rb'action=([!-/:-~](?:[ -~]*[!-~])?)\n\n').fullmatch
LINE_ENDS = b'\r\n'
CONTROLS = bytes(range(SPACE + 1)) + b'\x7f'  # and the blank
#: Control characters become '?', but for a tab.
VISIBLE = bytes(code if code in b'\t' or (code >= SPACE and code != 127) else ord('?') for code in range(256))


def end_of_message(data: bytes, start: int = 0) -> int:
    """Return the offset behind the first empty line, 0 while there is none; `start` skips lines seen before."""
    if not start and data.startswith((b'\n', b'\r\n')):
        return data.index(b'\n') + 1
    found = EMPTY_LINE(data, start)
    return found.end() if found else 0


class RequestBuffer:
    """The bytes of one client, cut into requests whatever way they arrive."""

    __slots__ = ('_scanned', 'data')

    def __init__(self) -> None:
        self.data = b''  #: received and not yet taken: append to it
        self._scanned = 0

    def take(self) -> bytes | None:
        """Return the next complete request, its empty line included, or None while there is none.

        Empty lines before a request are skipped. Raises ClientFault.
        """
        if not self._scanned:
            self.data = self.data.lstrip(LINE_ENDS)
        data = self.data
        end = end_of_message(data, self._scanned)
        if not end or end > MAX_MESSAGE:
            if len(data) > MAX_MESSAGE:
                raise ClientFault(TOO_LONG, f'no end of a request within {MAX_MESSAGE} bytes')
            # an empty line may be cut in two: look at its first bytes again
            self._scanned = max(0, len(data) - 2)
            return None
        self.data, self._scanned = data[end:], 0
        return data[:end]


def attribute(request: bytes, name: bytes) -> bytes:
    """Return the first value of attribute `name`, b'' if it is absent; for looking, never for rebuilding.

    0.5 us against 7 us for a dict of all.
    """
    value = (b'\n' + request).partition(b'\n' + name + b'=')[2].partition(b'\n')[0]
    return value.removesuffix(b'\r')


def instance_of(request: bytes) -> bytes | None:
    """Return the instance of a policy request, b'' without one or one too long to remember; None of another request."""
    if request[:28] == b'request=smtpd_access_policy\n':  # as Postfix sends it: a third of the price of the below
        instance = request.partition(b'\ninstance=')[2].partition(b'\n')[0]
    elif attribute(request, b'request') == b'smtpd_access_policy':
        instance = attribute(request, b'instance')
    else:
        return None
    return instance if len(instance) <= MAX_INSTANCE else b''


def clean_action(action: bytes) -> bytes:
    """Return the action as Postfix is to get it: no surrounding blanks, and '?' for what is not printable UTF-8.

    Raises InvalidAnswer for an action that would be a permit that nobody meant: an empty one or a bare number
    (smtpd_check.c, check_table_result). Bytes that are not UTF-8 would make Postfix use its own default, and it reads
    up to a NUL only: the word that decides is kept whole.
    """
    action = re.sub(rb'^([^\0- \x7f]+)[\0-\x08\n-\x1f\x7f]', rb'\1 ', action.strip(CONTROLS))
    if not action:
        raise InvalidAnswer('an empty action')
    if action.isdigit():
        raise InvalidAnswer(f'the bare number {action[:40].decode()} as action')
    return action.translate(VISIBLE).decode('utf-8', 'replace').replace('\ufffd', '?').encode()


def parse_answer(data: bytes, closed: bool = False) -> tuple[bytes, bool] | None:
    """Return the action of an answer and whether more than an answer came, or None while it is incomplete.

    Read as Postfix reads it: other lines are skipped, the first `action` counts. LF or CRLF. Empty lines behind an
    answer are no more; `closed` says that nothing will follow. Raises InvalidAnswer.
    """
    if len(data) > MAX_MESSAGE:
        raise InvalidAnswer(f'an answer over {MAX_MESSAGE} bytes')
    end = end_of_message(data)
    if not end and not closed:
        return None
    for line in data[: end or data.rfind(b'\n') + 1].split(b'\n'):
        if line.startswith(b'action='):
            return clean_action(line[7:]), end > 0 and data[end:].strip(LINE_ENDS) != b''
        if line.rstrip(b'\r') == b'action':
            raise InvalidAnswer('an action without a value')
    raise InvalidAnswer('an answer without an action' if end else 'the end of the connection in mid-answer')


# ---------------------------------------------------------------------------
# Services and balancing: no I/O, `now` (monotonic seconds) is an argument
# ---------------------------------------------------------------------------

#: Why a query failed. The first two take a service down at once; the last three are not the service's fault.
REFUSED, UNREACHABLE, LATE, INVALID, DROPPED = JUDGED = ('refused', 'unreachable', 'timeout', 'invalid', 'dropped')
DEADLINE, DESCRIPTORS, INTERNAL = 'deadline', 'descriptors', 'internal'
FAILURES = (*JUDGED, DEADLINE, DESCRIPTORS, INTERNAL)

UP, TRIAL, DOWN = 'up', 'trial', 'down'

#: What an action does to a mail, for counting: access(5) names many.
OK, REJECT, DEFER, PREPEND, OTHER = VERDICTS = ('ok', 'reject', 'defer', 'prepend', 'other')
VERDICT_OF = {b'dunno': OK, b'ok': OK, b'permit': OK, b'reject': REJECT, b'defer': DEFER, b'defer_if_permit': DEFER,
              b'defer_if_reject': DEFER, b'prepend': PREPEND}  # fmt: skip
VERDICT_OF |= {word.upper(): kind for word, kind in VERDICT_OF.items()}  # as most servers write them


def verdict(action: bytes) -> str:
    """Return which of VERDICTS an action is; a reply code counts as its class (access(5))."""
    word = action.split(None, 1)[0].lower()
    code = re.match(rb'([45])[0-9][0-9](\.|$)', word)
    if code is not None:
        return REJECT if code[1] == b'5' else DEFER
    return VERDICT_OF.get(word, OTHER)


class Latency:
    """A histogram of seconds: ten steps for each power of ten (R10 of ISO 3), so 1-2-5 are among its bounds."""

    #: Upper bounds in seconds, 0.1 ms to 100 s; a last count holds what took longer.
    BOUNDS: ClassVar = (*(step * 10.0**power for power in range(-4, 2)
                          for step in (1, 1.25, 1.6, 2, 2.5, 3.15, 4, 5, 6.3, 8)), 100.0)  # fmt: skip

    def __init__(self) -> None:
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self.sum = 0.0  #: seconds of all queries in counts
        self._added: list[float] = []
        self.add = self._added.append  #: counts one query of so many seconds

    @property
    def mean(self) -> float:
        """Seconds of a query, as of the last counts()."""
        return self.sum / max(1, sum(self._counts))

    def counts(self) -> list[int]:
        """Return queries by bound. Sorts in what was added, which takes memory until then: cheaper than one by one."""
        self.sum += sum(self._added)
        self._added.sort()
        ends = [bisect_right(self._added, bound) for bound in self.BOUNDS]
        for place, (below, end) in enumerate(itertools.pairwise((0, *ends, len(self._added)))):
            self._counts[place] += end - below
        self._added.clear()
        return self._counts

    @classmethod
    def quantile(cls, counts: Sequence[int], part: float) -> float | None:
        """Return the bound in seconds that so large a part of what was counted keeps to; None of nothing."""
        rank = part * sum(counts)
        for bound, seen in zip((*cls.BOUNDS, math.inf), itertools.accumulate(counts), strict=True):
            if seen >= rank > 0:
                return bound
        return None


HOST_NAME = re.compile(r'(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?')


class Address(NamedTuple):
    """Where to connect or listen: a unix socket's path (port 0), or a host and a port."""

    family: int  # AF_UNSPEC: a name, to be resolved
    host: str
    port: int

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return f'unix:{self.host}'
        return f'[{self.host}]:{self.port}' if self.family == socket.AF_INET6 else f'{self.host}:{self.port}'


def parse_number(text: str, what: str, low: int, high: int) -> int:
    """Return a whole number of ASCII digits in low..high. Raises UsageError."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise UsageError(f"{what} '{text}' is not a whole number from {low} to {high}")
    return int(text)


def parse_seconds(text: str, what: str) -> float:
    """Return a time in seconds, above 0 and at most a day. Raises UsageError."""
    if not (re.fullmatch(r'[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}', text) and 0 < float(text) <= 86400):
        raise UsageError(f"{what} '{text}' is not a number of seconds above 0 and up to 86400")
    return float(text)


def parse_host(host: str, bracketed: bool) -> int:
    """Return the family of a host as written. Raises UsageError."""
    family = socket.AF_INET6 if bracketed else socket.AF_INET
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(family, re.sub(r'%[A-Za-z0-9._-]+$', '', host) if bracketed else host)
        return family
    if bracketed or not HOST_NAME.fullmatch(host) or re.fullmatch(r'[0-9.]+', host) or len(host) > 253:
        raise UsageError(f"address '{host}' is not an IPv4 address, [IPv6] address, host name or unix:/path")
    return socket.AF_UNSPEC


def parse_address(text: str) -> tuple[Address, str]:
    """Return the address at the head of `text` and what follows it, its colon included. Raises UsageError."""
    if text.startswith('unix:'):
        path, colon, rest = text[5:].partition(':')
        if not path.startswith('/') or len(os.fsencode(path)) > 107 or '\0' in path:
            raise UsageError(f"unix socket '{path}' is not an absolute path of at most 107 bytes")
        return Address(socket.AF_UNIX, path, 0), colon + rest
    found = re.fullmatch(r'(?:\[([^]]*)\]|([^:]*)):([^:]*)(.*)', text, re.DOTALL)
    if not found:
        raise UsageError(f"'{text}' has no <address>:<port> (IPv4, [IPv6] or a host name) and is not unix:/path")
    host = found[1] if found[1] is not None else found[2]
    family = parse_host(host, found[1] is not None)
    return Address(family, host, parse_number(found[3], 'port', 1, 65535)), found[4]


class Settings:
    """What the options say of one policy server, and what it was asked and answered."""

    __slots__ = ('address', 'failures', 'fall', 'latency', 'max', 'name', 'prio', 'queries', 'stall', 'timeout',
                 'verdicts', 'weight')  # fmt: skip

    def __init__(self, name: str, address: Address, prio: int = DEFAULT_PRIO, weight: int = DEFAULT_WEIGHT,
                 timeout: float = DEFAULT_TIMEOUT, maximum: int = DEFAULT_MAX) -> None:  # fmt: skip
        self.name, self.address, self.prio, self.weight = name, address, prio, weight
        self.timeout = timeout  # seconds for a whole query
        self.max = maximum  # connections and checks at once
        self.fall = 2  # failed mails in a row that take it down beside another
        self.stall = 5.0  # seconds without an answer while mail is in flight
        self.queries = 0
        self.failures = dict.fromkeys(FAILURES, 0)
        self.verdicts = dict.fromkeys(VERDICTS, 0)  # of its answers
        self.latency = Latency()  # of its answers, from the request to the answer

    @property
    def where(self) -> str:
        """Its address, as the option has it."""
        return str(self.address)

    @property
    def answers(self) -> int:
        """Queries that were answered."""
        return sum(self.verdicts.values())

    @property
    def failed(self) -> int:
        """Queries that got no usable answer."""
        return sum(self.failures.values())


class Service(Settings):
    """One policy server: its settings, its counters, and whether it is up. Pure: it never does I/O.

    States: UP takes mail; DOWN takes none until a check passes; TRIAL takes some mails at a time until one is
    answered. A check is our own question to it, asked on a new connection. Mail alone takes it down only beside
    another service that is up: what a stranger can send is no proof.
    """

    __slots__ = ('answered_at', 'blamed', 'changed', 'checked_at', 'failed_at', 'in_a_row', 'late_in_a_row', 'newest',
                 'since', 'state', 'why')  # fmt: skip

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.state, self.since, self.why = UP, 0.0, 'never down'
        self.blamed = False  # mail took it down, or put it on trial: it stays on trial until mail is answered
        self.in_a_row = self.late_in_a_row = 0  # mails that failed since one was answered; and the late
        # when a mail was answered last, a check was, and a mail failed (monotonic seconds)
        self.answered_at = self.checked_at = self.failed_at = 0.0
        self.newest = 0.0  # when the youngest request was sent that was answered
        self.changed: Callable[[Service, str, float], None] = lambda service, text, now: None

    @property
    def heard_at(self) -> float:
        """When it answered last (monotonic seconds)."""
        return max(self.answered_at, self.checked_at)

    def check_answered(self, since: float, now: float) -> None:
        """Note an answer to a check that began at `since`."""
        self.checked_at, self.newest = now, max(self.newest, since)

    def check_passed(self, now: float) -> None:
        """Note that a check passed: if it was down it is up, or on trial if mail took it down."""
        if self.state is DOWN:
            self.turn(TRIAL if self.blamed else UP, 'its check passed', now)

    def answered(self, action: bytes, since: float, current: bool, now: float) -> None:
        """Count an answer to a mail that was sent at `since`; it says something of the state if that is current."""
        self.verdicts[VERDICT_OF.get(action.partition(b' ')[0]) or verdict(action)] += 1
        add = self.latency.add
        add(now - since)
        if current:
            self.answered_at = now
            if since > self.newest:
                self.newest = since
            if self.in_a_row:
                self.in_a_row = self.late_in_a_row = 0
            if self.state is not UP:
                self.blamed = False
                self.turn(UP, 'mail was answered', now)

    def mail_failed(self, reason: str, since: float, alone: bool, crowded: bool, now: float) -> None:
        """Note that a mail failed that was sent at `since`; alone: no other service is up; crowded: mail waits for it.

        A late answer says nothing if a mail that was sent meanwhile was answered, or could not be sent: strangers'
        slow messages may hold every place. The last service that is up is never taken down by mail.
        """
        self.failed_at, late = now, reason is LATE
        if self.state is DOWN or reason not in JUDGED or (late and (self.answered_at > since or (alone and crowded))):
            return
        self.in_a_row += 1
        self.late_in_a_row = self.late_in_a_row + 1 if late else 0
        if reason in (REFUSED, UNREACHABLE):
            self.turn(DOWN, reason, now)
        elif not alone and (self.in_a_row >= self.fall or self.state is TRIAL):
            self.blamed = True
            self.turn(DOWN, f'mail failed {self.in_a_row} times in a row, the last: {reason}', now)
        elif alone and self.state is UP and self.late_in_a_row >= self.fall:
            self.blamed = True
            self.turn(TRIAL, f'{self.fall} mails in a row had no answer in time, but its check has one', now)

    def turn(self, state: str, why: str, now: float) -> None:
        """Change the state, and report it."""
        lasted = f' ({UP if self.state is UP else DOWN} for {now - self.since:.1f}s)' if self.since else ''
        if UP in (state, self.state):  # all from the failure to the first answer is one outage
            self.since = now
        if state is not TRIAL or self.state is UP:
            self.why = why
        self.state, self.in_a_row, self.late_in_a_row = state, 0, 0
        self.changed(self, f'[{self.name}] ({self.where}) is {state}: {why}{lasted}', now)


def parse_service(text: str) -> Service:
    """Return the service of a -s option. Raises UsageError naming the value and what is allowed."""
    name, equals, rest = text.partition('=')
    try:
        if not equals or not name.strip() or not name.isprintable() or len(name) > 64:
            raise UsageError('<name>= of 1 to 64 printable characters is missing')
        address, rest = parse_address(rest)
        fields = rest.split(':')[1:]
        if len(fields) > 4 and (len(fields) > 5 or fields[4]):
            raise UsageError(f"':{fields[4]}' is one field too many")
        prio, weight, timeout, maximum = (fields + [''] * 4)[:4]
        return Service(name, address,
                       parse_number(prio or str(DEFAULT_PRIO), 'prio', 1, 10**9),
                       parse_number(weight or str(DEFAULT_WEIGHT), 'weight', 1, MAX_WEIGHT),
                       parse_seconds(timeout or str(DEFAULT_TIMEOUT), 'timeout'),
                       parse_number(maximum or str(DEFAULT_MAX), 'max', 1, 10**6))  # fmt: skip
    except UsageError as error:
        raise UsageError(f"--service '{text}': {error}; allowed is"
                         ' <name>=<address>:<port>[:<prio>[:<weight>[:<timeout>[:<max>]]]]'
                         ' or <name>=unix:/path[:<prio>...]') from None  # fmt: skip


def one_cycle(pools: Sequence[Pool]) -> Iterator[Pool]:
    """Yield each as often as its service's weight says, interleaved: smooth weighted round robin (as nginx's).

    All gain their weight at each turn; the richest has the turn and pays what all gained.
    """
    weights = [pool.service.weight for pool in pools]
    total = sum(weights)
    credit = dict.fromkeys(pools, 0)
    for _ in range(total // max(1, math.gcd(*weights))):
        for pool in pools:
            credit[pool] += pool.service.weight
        richest = max(pools, key=credit.__getitem__)
        credit[richest] -= total
        yield richest


class Balancer:
    """Chooses a service for each request: affinity by instance, then prio, then weight.

    The cycle of each prio is made when a service changes its state: shares are exact over a cycle, and nobody has a
    burst at its return.
    """

    def __init__(self, pools: Iterable[Pool]) -> None:
        self.pools = sorted(pools, key=lambda pool: pool.service.prio)
        self.up = 0  # services that are up
        self._rounds: list[Callable[[], Iterator[Pool]]] = []  # for each prio: yields each turn of a cycle once
        self._bound: dict[bytes, Pool] = {}  # by instance, the longest known first
        self.update()

    def update(self) -> None:
        """Work out how many mails each service may have at once, and the cycles: a service changed its state.

        A service on trial has one, or some where none is up. So has one that is down because it hung up on its check,
        or answered rubbish: perhaps it cannot be checked, and answers mail.
        """
        self.up = sum(pool.service.state is UP for pool in self.pools)
        for pool in self.pools:
            service = pool.service
            perhaps = not self.up and pool.checker.reason in (DROPPED, INVALID)
            trial = 0 if service.state is DOWN and not perhaps else 1 if self.up else TRIALS
            pool.places = service.max if service.state is UP else min(trial, service.max)
        self._rounds = []
        for _, group in itertools.groupby(self.pools, key=lambda pool: pool.service.prio):
            turns = list(one_cycle([pool for pool in group if pool.places]))
            if turns:
                self._rounds.append(functools.partial(itertools.islice, itertools.cycle(turns), len(turns)))

    def alone(self, service: Service) -> bool:
        """Tell whether no other service is up."""
        return self.up == (service.state is UP)

    def choose(self, instance: bytes, tried: Sequence[Pool], now: float) -> Pool | None:
        """Return the pool to take a connection of, or to wait for a moment; None to wait for any."""
        if instance:
            bound = self._bound.get(instance)
            if bound is not None and bound.places and bound not in tried and not bound.stalled(now):
                return bound
        for turns in self._rounds:
            waits = False
            for pool in turns():
                if pool in tried or (now - pool.service.answered_at > pool.service.stall and pool.stalled(now)):
                    continue  # the first part saves a call, nearly always
                if pool.idle or pool.ready(now):
                    self.bind(instance, pool)
                    return pool
                waits = waits or pool.service.state is UP
            if waits:  # the next prio is for requests that have waited
                return None
        return None

    def candidates(self, first: Pool | None, tried: Sequence[Pool], waited: float, now: float) -> list[Pool]:
        """Return the pools that a request may wait for which has waited for so many seconds, best first.

        At first the one that was chosen for it alone, so that shares hold, or those of one prio; then all; and at last
        those that have stalled, which may be the doing of a slow message. None of a service whose trial is taken.
        """
        there = [pool for pool in self.pools if pool not in tried and pool.admits(waited, now)]
        answering = there if waited >= STALLED_AFTER else [pool for pool in there if not pool.stalled(now)] or there
        if waited >= PATIENCE or not answering:
            return answering
        if first is not None and first in answering:
            return [first]
        return [pool for pool in answering if pool.service.prio == answering[0].service.prio]

    def bind(self, instance: bytes, pool: Pool) -> None:
        """Remember the service of a message, whose other requests are to go there."""
        if not instance:
            return
        if len(self._bound) >= 2 * MAX_INSTANCES:  # half at once: one by one costs more
            self._bound = dict(itertools.islice(self._bound.items(), MAX_INSTANCES, None))
        self._bound[instance] = pool


# ---------------------------------------------------------------------------
# Statistics and log lines
# ---------------------------------------------------------------------------

#: Every counter of the proxy: name, help.
COUNTERS = (
    ('requests', 'complete requests read from clients'),
    ('answers', 'answers of services passed on to clients'),
    ('redispatches', 'requests handed to the next service after a failure'),
    ('retries', 'requests sent again to the same service, as a used connection had ended'),
    ('clients', 'client connections accepted'),
)
#: Why a default action was given.
NO_SERVICE, ALL_FAILED, OUT_OF_TIME, NOT_POLICY = 'no service is up', 'all services failed', 'deadline', 'not a request'

WARNING, NOTICE, INFO = 4, 5, 6
LEVELS = {WARNING: 'warning', NOTICE: 'notice', INFO: 'info'}
LOG_MAIL = 2 << 3


class Statistics:
    """The proxy's counters: one plain number for each of COUNTERS, and two by reason."""

    def __init__(self) -> None:
        self.requests = self.answers = self.redispatches = self.retries = self.clients = 0
        self.defaults = dict.fromkeys((NO_SERVICE, ALL_FAILED, OUT_OF_TIME, NOT_POLICY), 0)
        self.refused = dict.fromkeys(CLIENT_FAULTS, 0)

    def totals(self) -> list[int]:
        """Return how many requests there were, and what they got: answers and default actions."""
        return [self.requests, self.answers, sum(self.defaults.values())]

    def __str__(self) -> str:
        counted = [f'{name}: {getattr(self, name)}' for name, _ in COUNTERS]
        return ', '.join([*counted, f'defaults: {sum(self.defaults.values())}'])


class Sample(NamedTuple):
    """The counters of one service at one moment, or between two."""

    when: float  # monotonic seconds
    answers: int
    failed: int
    counts: list[int]  # of its Latency

    @classmethod
    def of(cls, service: Service) -> Sample:
        """Return the counters as they are now."""
        return cls(time.monotonic(), service.answers, service.failed, service.latency.counts().copy())

    def after(self, base: Sample) -> Sample:
        """Return what was counted since an earlier sample; `when` is how many seconds that is."""
        counts = list(map(operator.sub, self.counts, base.counts))
        return Sample(self.when - base.when, self.answers - base.answers, self.failed - base.failed, counts)


def summaries(statistics: Statistics, services: Sequence[Service]) -> Iterator[str]:
    """Yield a line for the log of what happened since the last, '' if there was no request, as at first."""
    old, before = list(map(Sample.of, services)), statistics.totals()
    while True:
        new, now = list(map(Sample.of, services)), statistics.totals()
        requests, answers, defaults = map(operator.sub, now, before)
        since = list(map(Sample.after, new, old))
        slowest = [f'{service.name} {milliseconds(Latency.quantile(sample.counts, 0.99))}'
                   for service, sample in zip(services, since, strict=True)]  # fmt: skip
        old, before = new, now
        failures = sum(sample.failed for sample in since)
        yield (f'summary of {since[0].when:.0f}s, requests: {requests}, answers: {answers}, defaults: {defaults}, '
               f'failures: {failures}, p99: {", ".join(slowest)}' if requests else '')  # fmt: skip


def milliseconds(bound: float | None) -> str:
    """Return a quantile for people."""
    return '-' if bound is None else 'over 100 s' if bound == math.inf else f'{bound * 1000:.4g} ms'


#: What a request got: the action, the service asked last, how many were asked, and why.
Decision: TypeAlias = 'tuple[bytes, Service | None, int, str]'


def printable(value: bytes) -> str:
    """Return a value as one line of text, whatever bytes it holds."""
    return escaped(value.decode('utf-8', 'backslashreplace'))


def escaped(text: str) -> str:
    """Return a text without control characters."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


#: How the attributes begin that are told of a request.
TOLD = [f'\n{name}=' for name in ('client_name', 'client_address', 'helo_name', 'sender', 'recipient', 'instance')]


def request_line(decision: Decision, request: bytes, delay: float) -> str:
    """Return the log line of a request (-l): the ancestor's fields and spelling, then ours."""
    action, service, tries, why = decision
    if service is None:
        head = '[-] (-), prio: -, weight: -, queries: -, answers: -, failed: -'
    else:
        head = (f'[{service.name}] ({service.where}), prio: {service.prio}, weight: {service.weight}, '
                f'queries: {service.queries}, answers: {service.answers}, failed: {service.failed}')  # fmt: skip
    if CR in request:
        request = request.replace(b'\r\n', b'\n')
    text = '\n' + request.decode('utf-8', 'backslashreplace')  # all at once, as it costs less than one by one
    client, address, helo, sender, recipient, instance = [text.partition(name)[2].partition('\n')[0] for name in TOLD]
    told = escaped(f'client: {client}[{address}], helo: <{helo}>, from: <{sender}>, to: <{recipient}>, '
                   f"action: '{action.decode()}', instance: {instance}")  # fmt: skip
    return f'{head}, delay: {delay:.3f}s, {told}, tries: {tries}, why: {why}'


#: Severity and text.
Line: TypeAlias = 'tuple[int, str]'


def write_all(fd: int, data: bytes) -> None:
    """Write to stdout or stderr in a thread: whatever reads the other end may stop reading. Raises OSError."""
    while data:
        data = data[gevent.get_hub().threadpool.apply(os.write, (fd, data)) :]


class StreamSink:
    """Writes log lines to a descriptor: stdout for -L, or stderr where there is no syslog."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, lines: Sequence[Line]) -> int:
        """Write lines; return how many are lost."""
        text = ''.join([f'[LOG {LEVELS[level]}]: {text}\n' for level, text in lines])
        try:
            write_all(self._fd, text.encode('utf-8', 'backslashreplace'))
        except OSError:
            return len(lines)
        return 0


class SyslogSink:
    """Writes log lines to /dev/log as syslog(3) does: facility mail, ident hapolicy[pid]."""

    PATH = '/dev/log'

    def __init__(self, fallback: StreamSink | None) -> None:
        self._fallback = fallback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(1)  # a daemon that hangs: one line a second is given up

    def _send(self, line: bytes) -> bool:
        for _ in range(2):  # the second time to a daemon that was not there yet, or restarted
            try:
                return self._socket.send(line) > 0
            except TimeoutError:
                return False
            except OSError:
                with contextlib.suppress(OSError):
                    self._socket.connect(self.PATH)
        return False

    def write(self, lines: Sequence[Line]) -> int:
        """Send lines; return how many are lost."""
        tail = f'>{time.strftime("%b %e %H:%M:%S")} hapolicy[{os.getpid()}]: '
        lost = []
        for level, text in lines:
            if not self._send(f'<{LOG_MAIL | level}{tail}{text}'.encode('utf-8', 'backslashreplace')):
                lost.append((level, text))
        return self._fallback.write(lost) if lost and self._fallback is not None else len(lost)


class Log:
    """A bounded queue of lines and the greenlet that writes them: logging never delays an answer."""

    def __init__(self, sink: StreamSink | SyslogSink, requests: bool = False, verbose: bool = False) -> None:
        self.requests, self.verbose = requests or verbose, verbose
        self.lost = 0
        self._lost_told = 0
        self._sink = sink
        self._lines: deque[Line] = deque()
        self._more = gevent.event.Event()
        gevent.spawn(self._write)

    def __call__(self, level: int, text: str) -> None:
        """Queue a line; it is dropped and counted when MAX_LOG_LINES wait already."""
        if len(self._lines) >= MAX_LOG_LINES:
            self.lost += 1
            return
        if len(text) > MAX_LOG_LINE:
            text = text[:MAX_LOG_LINE] + '...'
        self._lines.append((level, text))
        if not self._more.is_set():
            self._more.set()

    def _write(self) -> None:
        while True:
            self._more.wait()
            while self._lines:
                batch = [self._lines.popleft() for _ in range(min(len(self._lines), LOG_BATCH))]
                lost = len(batch)
                with contextlib.suppress(Exception):  # of a thread that cannot be had, say: the log goes on
                    lost = self._sink.write(batch)
                self.lost += lost
                if not lost and self.lost > self._lost_told:
                    self._lines.append((WARNING, f'{self.lost - self._lost_told} log lines were lost'))
                    self._lost_told = self.lost
            self._more.clear()

    def close(self, seconds: float = 1.0) -> None:
        """Write what is queued, for so many seconds at most."""
        give_up = time.monotonic() + seconds
        while self._more.is_set() and time.monotonic() < give_up:
            gevent.sleep(0.005)


# ---------------------------------------------------------------------------
# Connections, checks and the queue
# ---------------------------------------------------------------------------


class Wire:
    """A stream socket that waits first and then receives.

    A recv() before data is there costs a failed system call, an exception and two changes of the
    epoll set; with a read watcher that stays registered a request takes a third of the time. What
    becomes readable while nobody waits goes to unexpected().
    """

    __slots__ = ('_hub', '_recv', '_send', '_waits', '_watcher', 'socket', 'user')

    _recv: Callable[[int], bytes]

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that died sends no end
        self.socket = sock
        # of the plain socket inside gevent's: what never has to wait saves 0.3 us a call
        plain: Any = getattr(sock, '_sock', sock)
        self._recv, self._send = plain.recv, plain.send
        self._hub = gevent.get_hub()
        self.user = getcurrent()  #: the greenlet that receives: asked for at each receive() it would cost 0.1 us
        self._waits = False
        self._watcher: Any = self._hub.loop.io(sock.fileno(), READ)
        self._watcher.start(self._readable)

    def _readable(self) -> None:
        if self._waits:
            self.user.switch()
        else:
            self.unexpected()

    def unexpected(self) -> None:
        """Called in the hub when there is something to receive and nobody waits: must not block."""
        raise NotImplementedError

    def watch(self) -> None:
        """Go on to see what is there to receive, after unexpected() stopped that."""
        if not self._watcher.active:
            self._watcher.start(self._readable)

    def receive(self) -> bytes | None:
        """Sleep until there is something to receive; return it, b'' at the end, None if woken for nothing.

        Raises OSError.
        """
        self._waits = True
        try:
            SWITCH_TO(self._hub)
        finally:
            self._waits = False
        recv = self._recv  # called as self._recv() it is looked for as a method first, at full length
        try:
            return recv(RECEIVE)
        except BlockingIOError:
            return None

    def send(self, data: bytes) -> None:
        """Send all of `data`; the caller bounds the time. Raises OSError."""
        send = self._send
        try:
            sent = send(data)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            self.send_slowly(data[sent:])

    def send_slowly(self, data: bytes) -> None:
        """Send what the kernel did not take at once. Raises OSError."""
        while data:
            gevent.socket.wait_write(self.socket.fileno())
            with contextlib.suppress(BlockingIOError):
                data = data[self._send(data) :]

    def close(self) -> None:
        """Close the socket and free its watcher; more than once does no harm."""
        self._watcher.stop()
        self._watcher.close()
        self.socket.close()


def connect(family: int, where: Any, seconds: float = CONNECT_TIMEOUT) -> socket.socket:
    """Return a socket connected to a path, or to the numbers of an address, within so many seconds. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(0 if family == socket.AF_UNIX else seconds)
    give_up = time.monotonic() + seconds
    try:
        while True:
            try:
                sock.connect(where)
                return sock
            except BlockingIOError:  # the backlog of a unix socket is full, and no event tells when it no longer is
                if time.monotonic() > give_up:
                    raise TimeoutError('timed out') from None
            gevent.sleep(0.01)
    except BaseException:
        sock.close()
        raise


def connect_failure(error: OSError, family: int) -> ServiceFailure:
    """Return what an error in connecting says of the service: the one place where errno is judged."""
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
        return ServiceFailure(REFUSED, str(error.strerror).lower())
    if isinstance(error, TimeoutError):
        return ServiceFailure(LATE, 'no connection in time')
    if isinstance(error, (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)):
        return ServiceFailure(DROPPED, 'it hung up at once')
    ports = error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET  # or there is no IPv6 here
    if ports or error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return ServiceFailure(DESCRIPTORS, error.strerror or str(error))
    return ServiceFailure(UNREACHABLE, error.strerror or str(error))


def connector(address: Address, seconds: float, report: Callable[[str], None]) -> Callable[[], socket.socket]:
    """Return what connects to a service's address, within so many seconds."""
    family, host, port = address
    if family == socket.AF_UNSPEC or (family == socket.AF_INET6 and '%' in host):
        return HostName(address, seconds, report).connect
    return functools.partial(connect, family, host if family == socket.AF_UNIX else (host, port), seconds)


class HostName:
    """The name in a service's address: looked up anew for each connection; while that fails, what it was last.

    A connection waits LOOKUP for it; if it then cannot be made, LOOKUP_MAX, as the name may have moved. One lookup at
    a time: a name server that hangs keeps one of gevent's threads busy for each name, not all.
    """

    def __init__(self, address: Address, seconds: float, report: Callable[[str], None]) -> None:
        self._address, self._seconds, self._report = address, seconds, report
        self._known: list[tuple[int, Any]] = []  # families and socket addresses
        self._failed: set[tuple[int, Any]] = set()  # not connected to when last tried: asked last
        self._trouble = ''
        self._lookup: gevent.Greenlet[..., None] | None = None

    def _look_up(self) -> None:
        trouble = ''
        try:
            found = socket.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
            self._known = [(family, where) for family, _, _, _, where in found]
            self._failed.intersection_update(self._known)
        except (OSError, UnicodeError) as error:  # the latter of the idna codec
            trouble = getattr(error, 'strerror', None) or str(error)
        if trouble != self._trouble and self._known:
            self._report(f'host name: {trouble}; asking where it was last' if trouble else 'host name: found again')
        self._trouble = trouble

    def connect(self) -> socket.socket:
        """Return a socket connected to the first address that takes it. Raises OSError."""
        if self._lookup is None or self._lookup.ready():
            self._lookup = gevent.spawn(self._look_up)
        self._lookup.join(LOOKUP if self._known else LOOKUP_MAX)
        known = self._known
        try:
            return self._connect(known)
        except OSError:
            self._lookup.join(LOOKUP_MAX)
            if set(self._known) == set(known):
                raise
            return self._connect(self._known)  # it has moved

    def _connect(self, known: Sequence[tuple[int, Any]]) -> socket.socket:
        failure = None if known else OSError(errno.EHOSTUNREACH, self._trouble or 'the name is not looked up in time')
        for address in sorted(known, key=self._failed.__contains__):
            try:
                sock = connect(*address, self._seconds / len(known))
            except (OSError, gevent.Timeout, gevent.GreenletExit) as error:
                self._failed.add(address)
                if not isinstance(error, OSError):  # the query is over, or the check
                    raise
                # one that was too slow may be well: the mildest that can be said
                failure = error if failure is None or isinstance(error, TimeoutError) else failure
            else:
                self._failed.discard(address)
                return sock
        assert failure is not None
        raise failure


#: What Postfix asks of smtpd_client_restrictions, with all attributes of Postfix 3.12: no sender and no recipient, so
#: nothing to remember or to count, and an address that nobody looks up.
CHECK = (b'request=smtpd_access_policy\nprotocol_state=CONNECT\nprotocol_name=SMTP\nclient_address=127.0.0.1\n'
         b'client_name=localhost\nclient_port=0\nreverse_client_name=localhost\nserver_address=127.0.0.1\n'
         b'server_port=25\nhelo_name=\nsender=\nrecipient=\nrecipient_count=0\nqueue_id=\ninstance=\nsize=0\n'
         b'etrn_domain=\nstress=\nsasl_method=\nsasl_username=\nsasl_sender=\nccert_subject=\nccert_issuer=\n'
         b'ccert_fingerprint=\nccert_pubkey_fingerprint=\nencryption_protocol=\nencryption_cipher=\n'
         b'encryption_keysize=0\ntls_sni=\npolicy_context=\ncompatibility_level=3.6\nmail_version=3.12\n\n')
#: What may come behind an answer: the end of the connection, or more bytes.
ENDED, SURPLUS = 'ended', 'surplus'
#: How the connections of a service are used: again, if they passed a check; once each and without a check, if the
#: service ends them behind a check; or again without a check, where there are none or the service answers mail alone.
CHECKED, SINGLE_USE, UNCHECKED = 'checked', 'single use', 'unchecked'


class Connection(Wire):
    """A connection to a server: it decides what is an answer. One request at a time."""

    __slots__ = ('_data', 'expires', 'holder', 'idle_since', 'poll', 'pool', 'silent_at', 'since', 'spent', 'surplus',
                 'timer', 'used')  # fmt: skip

    def __init__(self, pool: Pool, now: float) -> None:
        """Make one that is not open yet: the first ask() opens it."""
        self.pool = pool
        self.begin(now)

    def begin(self, now: float) -> None:
        """Begin, or begin anew."""
        self.since = self.idle_since = now  # when its last request was sent, and when it was answered
        self.expires = now + MAX_AGE
        self.silent_at = -math.inf  # when it was last seen to be silent for QUIET
        self.used = False  # it answered something, its check at least
        self.spent = self.surplus = False  # not to be used again; as more than an answer came
        self.holder: Client | None = None  # whose message was answered by it last, and may ask more
        #: poll(0) asks the kernel whether there is something to receive, for 0.6 us: it may be taken again before the
        #: loop has polled. None while it is not open.
        self.poll: Callable[[int], list[tuple[int, int]]] | None = None
        self._data = b''  # of an answer
        self.timer = QueryTimeout(self.pool.service.timeout)
        self.user = getcurrent()  # that asks

    def open(self) -> None:
        """Connect. Raises ServiceFailure."""
        pool = self.pool
        pool.trace('Opening socket to')
        try:
            sock = pool.connect()
        except OSError as error:
            raise connect_failure(error, pool.service.address.family) from None
        super().__init__(sock)
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
        self.poll = poller.poll
        pool.trace('Connection established to')
        if pool.use is SINGLE_USE and time.monotonic() < pool.once_until and (said := self.listen(QUIET)):
            raise ServiceFailure(DROPPED if said is ENDED else INVALID, 'it hung up, or spoke, before it was asked')

    def ask(self, request: bytes, now: float, left: float = math.inf) -> bytes:
        """Send a request and return the action of its answer. Raises ServiceFailure.

        Within the service's timeout, or the seconds that are left if that is less; `user` is the greenlet that asks.
        """
        if self.used:
            if now - self.silent_at > REST_AFTER or not self._watcher.active:
                self._see_silence(now)
            elif now - self.idle_since >= QUIET:
                self.silent_at = now
        timer = self.timer
        if left < timer.seconds:
            timer = QueryTimeout(max(0.001, left))
        self._data, sent = b'', False
        timer.again(self.user.throw, timer)
        try:
            if self.poll is None:
                self.open()
            sent = True
            self.send(request)
            while (chunk := self.receive()) != b'':
                if not chunk:
                    continue
                if (plain := PLAIN_ANSWER(chunk)) is not None and not self._data:  # nearly always
                    self.used = True
                    return plain[1]
                if (answer := self._take_in(chunk)) is not None:
                    return answer
        except OSError:
            pass  # ended by a reset: as good as closed
        except gevent.Timeout as error:
            if error is not timer:
                raise
            return self._after_timeout(timer, sent)
        finally:
            timer.stop()
        self.spent = True
        if not self._data:
            again = self.used or self.pool.use is SINGLE_USE
            raise (Ended if again else ServiceFailure)(DROPPED, 'it hung up without an answer')
        return self._parse(closed=True) or b''

    def _see_silence(self, now: float) -> None:
        """See that nothing came since its last answer. Raises Ended.

        One that was in use for a second and never silent rests first: behind a surplus answer each request would
        read its predecessor's for as long as the next one comes at once.
        """
        rest = QUIET - (now - self.idle_since)
        if not self._watcher.active or (rest > 0 and self.listen(rest)):  # the former: since the pool has looked
            raise Ended(DROPPED, 'it was not silent before its use')
        self.silent_at = now

    def _after_timeout(self, timer: QueryTimeout, sent: bool) -> bytes:
        """Return the action if a whole answer has come while we did not run. Raises ServiceFailure."""
        timer.__traceback__ = None  # it would keep the request until the next time
        with contextlib.suppress(OSError):
            while sent and self.poll is not None and self.poll(0) and (chunk := self._recv(RECEIVE)):
                if (action := self._take_in(chunk)) is not None:
                    return action
        reason = LATE if timer.seconds > self.pool.service.timeout / 2 else DEADLINE
        raise ServiceFailure(reason, f'no answer within {timer.seconds:.3g}s') from None

    def _take_in(self, chunk: bytes) -> bytes | None:
        seen = len(self._data)
        if seen:
            self._data += chunk
            if not end_of_message(self._data, max(1, seen - 2)) and len(self._data) <= MAX_MESSAGE:
                return None  # all of one that drips is not to be read again at each drop
        else:  # behind the last answer, an empty line too many may have come late
            self._data = chunk.lstrip(LINE_ENDS) if self.used else chunk
        return self._parse() if self._data else None

    def _parse(self, closed: bool = False) -> bytes | None:
        try:
            answer = parse_answer(self._data, closed)
        except InvalidAnswer as error:
            raise ServiceFailure(DROPPED if closed else INVALID, str(error)) from None
        if answer is None:
            return None
        action, self.surplus = answer
        self.used, self.spent = True, self.spent or self.surplus
        return action

    def check(self, left: float = math.inf) -> tuple[str, bytes]:
        """Ask our own question; return what came behind the answer, as look() does, and the action.

        Raises ServiceFailure.
        """
        self.user = getcurrent()
        action = self.ask(CHECK, time.monotonic(), left)
        self.pool.service.check_answered(self.since, time.monotonic())
        if self.spent:
            return (SURPLUS if self.surplus else ENDED), action
        said = self.listen(QUIET)
        self.idle_since = self.silent_at = time.monotonic()
        return said, action

    def renew(self, left: float) -> None:
        """Open anew, for a request that is to be sent again, and check that, for so long. Raises ServiceFailure.

        Twice, as one that ends proves nothing.
        """
        for last in (False, True):
            self.close()
            self.begin(time.monotonic())
            try:
                if self.pool.unchecked or not self.check(left)[0]:
                    self.since = time.monotonic()
                    return
            except ServiceFailure:
                if last:
                    raise
        raise ServiceFailure(DROPPED, 'it ended behind the answer to its check')

    def look(self) -> str:
        """Return what came that nobody asked for: ENDED, SURPLUS, or '' for nothing, or for empty lines."""
        try:
            while data := self._recv(RECEIVE):
                if data.strip(LINE_ENDS):
                    return SURPLUS
        except BlockingIOError:
            return ''
        except OSError:
            pass
        return ENDED

    def listen(self, seconds: float) -> str:
        """Return what came within so many seconds, as look() does."""
        gevent.sleep(seconds)
        self.watch()
        return self.look()

    def ended(self) -> bool:
        """Tell whether the server has ended it, whatever is there to receive before that."""
        ends = select.POLLRDHUP | select.POLLHUP | select.POLLERR
        return self.poll is not None and any(event & ends for _, event in self.poll(0))

    def unexpected(self) -> None:
        if self not in self.pool.idle and self not in self.pool.held:
            self._watcher.stop()  # it is busy, and still sends
        elif said := self.look():
            self.pool.drop(self, said)

    def send_slowly(self, data: bytes) -> None:
        super().send_slowly(data)
        self.watch()  # for ask() to receive what came meanwhile

    def close(self) -> None:
        if self.poll is not None:
            super().close()


class QueryTimeout(gevent.Timeout):
    """A Timeout that may be started again and again: 0.4 us each time, against 1.6 us for a new one.

    gevent's own start() goes on with what the last run left of its time, as libev's ev_timer_stop()
    keeps the rest. `again`, libev's ev_timer_again(), starts from the whole; `stop` ends it.
    """

    __slots__ = ('again', 'stop')

    seconds: float

    def __init__(self, seconds: float) -> None:
        super().__init__(None)
        self.seconds = seconds
        self.timer: Any = gevent.get_hub().loop.timer(seconds, repeat=seconds)
        self.again, self.stop = self.timer.again, self.timer.stop


class Checker:
    """Decides whether one more connection to a service may be opened, by checks: grow() alone starts them.

    A check is one policy request of our own on a new connection. It passes if one valid answer comes and then silence
    for QUIET: the connection joins the pool. No mail waits on a check that is not answered, so many may run at once.

    A service is *full* when it serves some connections and lets a further check wait, or ends it: a prefork server
    whose children are all taken, or a limit. Then one check at a time is made, and twice as many after each that
    passes. Full is not down.
    """

    def __init__(self, pool: Pool, enabled: bool) -> None:
        self.pool, self.enabled = pool, enabled
        self.running: dict[Connection, Any] = {}  # each check and its greenlet
        self.at_once = pool.service.max  # checks at once: fewer while the service is full
        self.reason = ''  # why the last check failed
        self.backoff = BACKOFF_FIRST  # seconds between checks of a service that is down
        self._began = self._failed_at = -math.inf  # the last check, and the last that failed (monotonic seconds)
        self._doubted_at = math.inf  # when a check ended, before or behind its answer: one that begins later is to tell

    @property
    def full(self) -> bool:
        """Whether the service serves some connections, but no more."""
        return self.at_once < self.pool.service.max

    def spawn(self, check: Connection) -> Any:
        """Run a check in a greenlet of its own."""
        return gevent.spawn(self._run, check)

    def growing(self, now: float) -> bool:
        """Tell whether a request that waits a moment may expect a new connection."""
        if not self.enabled or self._doubted_at < now or self._pauses(now):
            return False
        if self.running and (self.full or now - next(iter(self.running)).since > PATIENCE):
            return False
        return self.pool.room > 0 or bool(self.running)

    def _pauses(self, now: float) -> bool:
        """Tell whether it is too early for a check: one failed, and the service is down, or serves what is open."""
        seconds = BACKOFF_FIRST if self.pool.open else 0.0
        if self.pool.service.state is DOWN:
            seconds = (self.backoff if self.pool.queue.balancer.up else BACKOFF_FIRST) * JITTER
        return now < self._failed_at + seconds

    def _due(self, now: float) -> bool:
        """Tell whether a check is due that no request waits for."""
        pool, service, ago = self.pool, self.pool.service, now - self._began
        return (service.failed_at > self._began  # mail did, and the check is to tell why
                or (ago > BACKOFF_FIRST and pool.use is CHECKED and not pool.open)
                or (ago > UNHEARD and (now - service.heard_at > UNHEARD or pool.use is not CHECKED))
                or (ago > service.stall and pool.stalled(now)))  # fmt: skip

    def grow(self, now: float, more: bool = False) -> None:
        """Start the checks that are due: as many as requests wait for, or one more; one where the service is down.

        One more where they have been waiting for long: what one check met may be a worker that hangs.
        """
        pool, running = self.pool, len(self.running)
        if self._pauses(now):
            return
        if pool.service.state is DOWN:
            if not self.enabled:
                self.backoff = min(BACKOFF_MAX, 2 * self.backoff)
                return pool.service.turn(TRIAL, 'mail may try it', now)
            number = 1
        elif not self.enabled or (self._doubted_at < now and running):
            return  # those that run will tell
        else:
            waits = running > 0 and now - next(reversed(self.running)).since > UNANSWERED
            more = more or self._due(now) or (waits and pool.wanting > 0)
            number = max(pool.wanting if pool.use is CHECKED else 0, running + more)
            number = min(number, self.at_once + waits)
        for _ in range(min(number - len(self.running), pool.room)):
            self._start(now)

    def _start(self, now: float) -> None:
        self._began = now
        check = Connection(self.pool, now)
        self.running[check] = self.spawn(check)

    def _run(self, check: Connection) -> None:
        kept = check  # compiled, nothing else holds it once stop() has dropped it
        try:
            said, _ = kept.check()
        except ServiceFailure as failure:
            self.failed(check, failure, time.monotonic())
        except Exception as error:  # a fault of ours says nothing of the service
            self.failed(check, ServiceFailure(INTERNAL, repr(error)), time.monotonic())
        else:
            self.passed(check, said, time.monotonic())
        finally:
            if kept not in self.pool.idle and kept not in self.pool.busy:
                kept.close()

    def stop(self, *but: Connection) -> None:
        """Close the checks that are running, but for some: they say nothing of the service now."""
        for check in [check for check in self.running if check not in but]:
            self.running.pop(check).kill(block=False)

    def passed(self, check: Connection, said: str, now: float) -> None:
        """Take in a connection whose check was answered; what it said after that decides how it is used."""
        if self.running.pop(check, None) is None:
            return
        pool = self.pool
        self._failed_at, self.backoff, self.reason = -math.inf, BACKOFF_FIRST, ''
        self.at_once = min(2 * self.at_once, pool.service.max)
        self.stop(*[other for other in self.running if check.since - other.since <= UNANSWERED or other.used])
        if said is SURPLUS:
            pool.said_more('more after the answer to its check', now)
        if not said:
            pool.use, self._doubted_at = CHECKED, math.inf
        elif said is SURPLUS or self._confirms(check, now):
            pool.use, self._doubted_at = SINGLE_USE, math.inf
        pool.give_up_at = min(pool.give_up_at, now + pool.give_up_pace)
        pool.service.check_passed(now)
        if not said:
            pool.idle.append(check)
        pool.queue.hand_over(pool, now)

    def _confirms(self, check: Connection, now: float) -> bool:
        """Tell whether another check ended before this one began; else have one more made, as one proves nothing."""
        if check.since >= self._doubted_at:
            return True
        self._doubted_at = min(self._doubted_at, now)
        if not self.running:
            self._start(now)
        return False

    def failed(self, check: Connection, failure: ServiceFailure, now: float) -> None:
        """Judge a service by a check that failed."""
        if self.running.pop(check, None) is None:
            return
        pool, service, reason = self.pool, self.pool.service, failure.reason
        self._failed_at = check.since
        if reason not in JUDGED:  # a fault of ours
            pool.report(f'cannot be checked: {failure}')
        elif service.state is DOWN:
            self.reason = reason
            if reason is LATE:
                self.backoff = BACKOFF_FIRST  # a server that was stopped answers the check that waits when it goes on
            elif pool.queue.balancer.up:
                self.backoff = min(BACKOFF_MAX, 2 * self.backoff)
            pool.queue.balancer.update()
        elif pool.use is UNCHECKED and reason in (DROPPED, INVALID):
            service.check_answered(check.since, now)  # as ever: mail is the judge
        elif (service.heard_at > check.since) if reason is LATE else pool.count_open():
            self._limit(f'{reason}, {failure}', now)
            pool.queue.hand_over(pool, now)
        elif reason not in (DROPPED, INVALID) or (self._confirms(check, now) and not self.running):
            self.reason = reason
            service.turn(DOWN, f'its check: {reason}, {failure}', now)

    def reset(self, now: float) -> None:
        """Start anew, as the service went down: a check that began before says nothing of it."""
        self.stop()
        self.at_once, self._doubted_at, self._failed_at = self.pool.service.max, math.inf, now

    def _limit(self, why: str, now: float) -> None:
        """Note that no more connections are served than are open."""
        if not self.full and self.pool.service.max > 1:
            number = max(1, self.pool.open)
            self.pool.report(f'is full: it serves {number} connections, and a further one had: {why}. If that lasts,'
                             f' set its max to {number}, or give it more workers')  # fmt: skip
        self.at_once, self._doubted_at = 1, math.inf

    def watch(self, now: float) -> None:
        """Find the service full if later requests are answered before a check, and start the checks that are due."""
        check = next((check for check in self.running if not check.used), None)  # the eldest
        overtaken = check is not None and self.pool.service.newest - check.since > UNANSWERED
        if overtaken and check is not None and (not self.full or len(self.running) > 2):
            self._limit(f'no answer for {now - check.since:.1f}s', now)
            self.stop(check)
        self.grow(now)


class Pool:
    """The connections to one service: it decides which one a request gets.

    A connection is busy with one query, held, idle, or closed; one on which a query was abandoned is closed. It is held
    by the message that it answered, which may ask more: a server may remember messages by connection. Of the idle ones
    the last used is the first taken, so that the others can end.
    """

    def __init__(self, service: Service, queue: Queue, checked: bool) -> None:
        self.service, self.queue = service, queue
        self.use = CHECKED if checked else UNCHECKED
        self.places = service.max  # mails at once
        self.wanting = 0  # requests that wait for a connection of it
        self.idle: list[Connection] = []  # the most recently used last
        self.held: dict[Connection, None] = {}  # the longest idle first
        self.busy: dict[Connection, None] = {}  # the longest busy first
        self.give_up_at = math.inf  # when a connection is given up: not before a check passed since the last
        self.once_until = 0.0  # until when each connection carries one mail, as the server said more than an answer
        #: Returns a socket connected to the service. Raises OSError.
        self.connect = connector(service.address, min(CONNECT_TIMEOUT, service.timeout), self.report)
        self.checker = Checker(self, checked)

    @property
    def open(self) -> int:
        """Connections that are open, or about to be, without those that are checked."""
        return len(self.idle) + len(self.held) + len(self.busy)

    @property
    def room(self) -> int:
        """How many connections may be opened now."""
        return self.service.max - self.open - len(self.checker.running)

    @property
    def unchecked(self) -> bool:
        """Whether mail rides on connections that were not checked: see Balancer.update() for one that is down."""
        return self.use is not CHECKED or self.service.state is DOWN

    @property
    def give_up_pace(self) -> float:
        """Seconds between two connections that are given up."""
        return max(GIVE_UP, 10 * self.service.latency.mean)

    def count_open(self) -> int:
        """Return how many connections are open, after a look for those that have ended."""
        for connection in [*self.held, *self.idle]:
            if connection.poll is not None and connection.poll(0) and (said := connection.look()):
                self.drop(connection, said)
        return len(self.idle) + len(self.held) + sum(not connection.ended() for connection in self.busy)

    def admits(self, waited: float, now: float) -> bool:
        """Tell whether a request may wait for it which has waited for so many seconds.

        For one that is on trial where a place is free, or while its answer can be expected: it was well until now.
        """
        if self.service.state is UP:
            return True
        asked = [next(iter(each)).since for each in (self.busy, self.checker.running) if each]
        return self.places > 0 and (len(self.busy) + self.wanting < self.places
                                    or all(now - since < TRIAL_PATIENCE - waited for since in asked))  # fmt: skip

    def ready(self, now: float) -> bool:
        """Tell whether it has a connection for a request, or will have one soon."""
        if len(self.busy) >= self.places:
            return False
        return bool(self.idle or self.held) or (self.room > 0 if self.unchecked else self.checker.growing(now))

    def stalled(self, now: float) -> bool:
        """Tell whether mail is in flight and none was answered for `stall` seconds."""
        service = self.service
        if now - service.answered_at <= service.stall or not self.busy:
            return False
        return now - next(iter(self.busy)).since > service.stall

    def take(self, client: Client, now: float) -> Connection | None:
        """Return a silent connection, busy from now on; None if there is none.

        The one that answered the client's message last, or the most recently used one that no message holds, or the
        longest idle one, if it may be held by a message. Then the pool grows by one.
        """
        while len(self.busy) < self.places:
            own, short = client.connection, False
            if own is not None and own.holder is client and own in self.held:
                connection = own
                del self.held[own]
            elif self.idle:
                connection = self.idle.pop()
            elif self.held and not (self.wanting and self.open < MAX_IDLE and self.checker.growing(now)):
                connection = next(iter(self.held))
                del self.held[connection]
                short = now - connection.idle_since < HOLD and self.open < MAX_IDLE and not self.checker.running
            elif self.unchecked and self.room > 0:
                connection = Connection(self, now)
            else:
                return None
            if connection.poll is not None and connection.poll(0) and (said := connection.look()):
                self.drop(connection, said)
                continue
            connection.since = now
            self.busy[connection] = None
            if short:
                self.checker.grow(now, more=True)
            return connection
        return None

    def answered(self, connection: Connection, action: bytes, reuse: bool, now: float) -> None:
        """Take back a connection whose mail was answered; close it if it is not to be used again."""
        service, current = self.service, self.busy.pop(connection, self) is None  # and not from before it went down
        if current and service.state is DOWN:
            self.use = UNCHECKED
            self.report(f'fails its checks ({self.checker.reason}), but answers mail: it is used without checks')
        service.answered(action, connection.since, current, now)
        if current and reuse and not connection.spent and self.use is not SINGLE_USE and now > self.once_until:
            connection.idle_since = now
            if connection.holder is None:
                self.idle.append(connection)
            else:
                self.held[connection] = None
            if self.wanting:
                self.queue.hand_over(self, now)
        else:
            if connection.surplus:
                self.said_more('more than one answer to a request', now)
            self._end(connection, current, now)

    def failed(self, connection: Connection, failure: ServiceFailure, now: float) -> None:
        """Close a connection whose mail was not answered: a check is to tell whether the service is well."""
        service, current = self.service, self.busy.pop(connection, self) is None
        service.failures[failure.reason] += 1
        if current:
            alone = self.queue.balancer.alone(service)
            service.mail_failed(failure.reason, connection.since, alone, self.wanting > 0, now)
            self.checker.grow(now)
        self._end(connection, current, now)

    def give_back(self, connection: Connection, now: float, unused: bool = False) -> None:
        """Take back a connection whose request was abandoned, and close it, unless it was not used at all."""
        if self.busy.pop(connection, self) is None and unused:
            self.idle.append(connection)
            self.queue.hand_over(self, now)
        else:
            self._end(connection, True, now)

    def _end(self, connection: Connection, current: bool, now: float) -> None:
        connection.close()
        if current:
            self.queue.hand_over(self, now)

    def let_go(self, connection: Connection, client: Client) -> None:
        """End the hold of a message on a connection: its client asks for another, or left."""
        if connection.holder is client:
            connection.holder = None
            if self.held.pop(connection, self) is None:
                self.idle.append(connection)

    def drop(self, connection: Connection, said: str) -> None:
        """Close an idle connection that ended, or said what nobody asked for."""
        self._close(connection)
        if said is SURPLUS:
            self.said_more('what nobody asked for', time.monotonic())

    def _close(self, *connections: Connection) -> None:
        for connection in connections:
            if self.held.pop(connection, self) is self and connection in self.idle:
                self.idle.remove(connection)
            connection.close()

    def reset(self) -> None:
        """Close what is idle, and forget what is busy: the service went down."""
        self._close(*self.idle, *self.held)
        self.busy.clear()
        self.use = CHECKED if self.checker.enabled else UNCHECKED

    def said_more(self, what: str, now: float) -> None:
        """Use each connection for one mail only, for a while: the server said more than an answer."""
        self._close(*self.idle, *self.held)
        if now >= self.once_until:
            self.report(f'sent {what}: for {ONCE:.0f}s each of its connections is used once')
        self.once_until = now + ONCE

    def prune(self, now: float) -> None:
        """Close connections that are old, or idle: all but one soon, as someone else may need the server's worker.

        So is the eldest, every two seconds, once a check has passed since the last.
        """
        there = [*self.idle, *self.held, *self.busy]
        if now >= self.give_up_at and (there if self.wanting else self.idle and len(there) > 1):
            self.give_up_at = math.inf
            min(self.idle or there, key=lambda connection: connection.expires).expires = now
            self.checker.stop()  # others are before us in the server's backlog from now on
        for connection in there:
            if now >= connection.expires:
                connection.spent = True  # after its next answer
            idle_at_most = SPARE_IDLE if self.open > 1 else UNHEARD
            if connection not in self.busy and (connection.spent or now - connection.idle_since >= idle_at_most):
                self._close(connection)

    def report(self, text: str) -> None:
        """Log what concerns this service."""
        self.queue.log(WARNING, f'[{self.service.name}] ({self.service.where}) {text}')

    def trace(self, what: str) -> None:
        """Log a step of a connection (-v)."""
        if self.queue.log.verbose:
            self.queue.log(INFO, f"{what} '{self.service.name}' ({self.service.where})")


class Waiter:
    """A request that waits for a connection."""

    __slots__ = ('client', 'connection', 'pools', 'woken')

    def __init__(self, client: Client) -> None:
        self.client = client
        self.connection: Connection | None = None  # what it got
        self.pools: list[Pool] = []  # those that it waits for: none when it is done
        self.woken = gevent.event.Event()

    def leave(self, *pools: Pool) -> None:
        """Wait no more for some pools."""
        for pool in pools:
            pool.wanting -= 1
            self.pools.remove(pool)


class Queue:
    """The requests that wait for a connection: first come, first served. It ties services, pools and balancer.

    Each pool has a heap of those that wait for it, in order of arrival. Who is done is marked, and never searched for.
    """

    def __init__(self, services: Sequence[Service], log: Log, checked: bool = True) -> None:
        self.log = log
        self.pools = {service: Pool(service, self, checked) for service in services}
        self.waiters: set[Waiter] = set()
        self._heaps: dict[Pool, list[tuple[float, int, Waiter]]] = {pool: [] for pool in self.pools.values()}
        self._numbers = itertools.count()
        self.balancer = Balancer(self._heaps)
        for service in services:
            service.changed = self.changed

    def wait(self, client: Client, first: Pool | None, tried: Sequence[Pool], deadline: float,
             since: float) -> Connection | None:  # fmt: skip
        """Return a connection of a service that was not tried; None if there is none, or none in time.

        The first is what the balancer chose: it is waited for alone, for a moment.
        """
        waiter, now = Waiter(client), since
        self.waiters.add(waiter)
        try:
            while now < deadline and (pools := self.balancer.candidates(first, tried, now - since, now)):
                self._join(waiter, pools, now)
                if waiter.connection is None:
                    ends = [since + seconds for seconds in (PATIENCE, TRIAL_PATIENCE, STALLED_AFTER)]
                    self._sleep(waiter, min([end for end in ends if end > now] + [deadline]) - now)
                if waiter.connection is not None:
                    self.balancer.bind(client.instance, waiter.connection.pool)
                    break
                waiter.woken.clear()
                now = time.monotonic()
        finally:
            waiter.leave(*waiter.pools)
            self.waiters.discard(waiter)
        return waiter.connection

    def _join(self, waiter: Waiter, pools: Sequence[Pool], now: float) -> None:
        for pool in pools:
            if pool not in waiter.pools:
                waiter.pools.append(pool)
                pool.wanting += 1
                heapq.heappush(self._heaps[pool], (waiter.client.asked, next(self._numbers), waiter))
        for pool in pools:
            if waiter.connection is None:
                self.hand_over(pool, now)

    def _sleep(self, waiter: Waiter, seconds: float) -> None:
        try:
            waiter.woken.wait(seconds)
        except BaseException:  # its client left
            if waiter.connection is not None:  # handed over in the same moment
                waiter.connection.pool.give_back(waiter.connection, time.monotonic(), unused=True)
            raise

    def hand_over(self, pool: Pool, now: float) -> None:
        """Give what the pool has to those who wait for it, and let it grow for the rest."""
        heap = self._heaps[pool]
        while heap:
            waiter = heap[0][2]
            if pool in waiter.pools:
                connection = pool.take(waiter.client, now)
                if connection is None:
                    break
                waiter.connection = connection
                waiter.leave(*waiter.pools)
                waiter.woken.set()
            heapq.heappop(heap)
        if pool.wanting:
            pool.checker.grow(now)

    def changed(self, service: Service, text: str, now: float) -> None:
        """Do what follows from a change of a service's state: a request that it concerns chooses again."""
        self.log(WARNING, text)
        pool = self.pools[service]
        self.balancer.update()
        concerned = self.waiters
        if service.state is DOWN:
            pool.reset()
            pool.checker.reset(now)
            concerned = {waiter for waiter in self.waiters if pool in waiter.pools}
            for waiter in concerned:
                waiter.leave(pool)
            self._heaps[pool].clear()
            if not self.balancer.up:
                self.log(WARNING, 'No service is up: requests get the default action')
        elif service.state is UP:
            pool.checker.backoff = BACKOFF_FIRST  # when it goes down next
        for waiter in concerned:
            waiter.woken.set()

    def tick(self, now: float) -> None:
        """Do what time alone brings: judge checks and start those that are due."""
        for pool in self._heaps:
            pool.checker.watch(now)

    def prune(self, now: float) -> None:
        """Close idle connections, and forget who is done."""
        for pool, heap in self._heaps.items():
            pool.prune(now)
            if pool.wanting:
                self.hand_over(pool, now)
            if len(heap) > 2 * pool.wanting + 100:
                heap[:] = [entry for entry in heap if pool in entry[2].pools]
                heapq.heapify(heap)


# ---------------------------------------------------------------------------
# Proxy
# ---------------------------------------------------------------------------


class Client(Wire):
    """A Postfix connection: requests in, answers out, in order."""

    __slots__ = ('_buffer', '_leaving', 'asked', 'closing', 'connection', 'ended', 'instance', 'unsent')

    def __init__(self, sock: socket.socket) -> None:
        self._buffer = RequestBuffer()
        self.ended = False  # it will send nothing more, or we have sent our end
        self.closing = False  # its next answer is its last
        self._leaving = False  # it is closed now, if it has begun nothing
        self.asked = time.monotonic()  # when its last request came
        self.instance = b''  # of its message,
        self.connection: Connection | None = None  # and what answered that last
        self.unsent = b''  # of an answer
        super().__init__(sock)

    def unexpected(self) -> None:
        # a request is under way: pipelined bytes, half a close, or a reset
        try:
            self._take_in(self._recv(RECEIVE))
        except BlockingIOError:
            pass
        except OSError:
            self._watcher.stop()
            self.user.throw(ClientFault(RESET))  # wherever it waits: for a service, most likely
        if self.ended or len(self._buffer.data) > MAX_MESSAGE:
            self._watcher.stop()

    def _take_in(self, data: bytes | None) -> None:
        if data:
            self._buffer.data += data
        elif data is not None:
            self.ended = True

    def request(self, seconds: float) -> bytes | None:
        """Return the next request, None at the client's end; idle is free, a request begun has so many seconds.

        Raises ClientFault, OSError.
        """
        buffer = self._buffer
        if buffer.data:
            gevent.sleep(0)  # one that pipelines lets the others have their turn
            if not self.ended and len(buffer.data) <= MAX_MESSAGE:
                self.watch()
        request = buffer.take() if buffer.data else None
        while not (buffer.data or request or self.ended):
            data = self.receive()
            if data:
                _, end, rest = data.partition(b'\n\n')  # find() would cost more: it wants its arguments in a tuple
                if end and not rest and CR not in data and data[0] != LF:
                    return data  # one request and no more, as nearly always
                buffer.data = data
                request = buffer.take()
            elif data is not None:
                self.ended = True
            elif self._leaving:
                return None
        return self._rest_of_request(seconds) if request is None and buffer.data else request

    def _rest_of_request(self, seconds: float) -> bytes:
        with gevent.Timeout(seconds, ClientFault(TOO_SLOW, f'{len(self._buffer.data)} bytes and no end')):
            while not self.ended:
                self._take_in(self.receive())
                request = self._buffer.take()
                if request is not None:
                    return request
        raise ClientFault(CUT_OFF, f'{len(self._buffer.data)} bytes')

    def answer(self, action: bytes) -> None:
        """Send what the kernel takes of an answer now; the rest is left to finish_answer(), as all errors are."""
        data, sent = b'action=' + action + b'\n\n', 0
        if not self.closing:
            send = self._send
            try:
                sent = send(data)
            except OSError:
                pass
        if sent != len(data):
            self.unsent = data[sent:]

    def finish_answer(self, seconds: float) -> None:
        """Send the rest of an answer, within so many seconds, and after the last one our end.

        Both in one segment, so that Postfix, which looks before it writes, can not send a request into a closed
        connection. Raises ClientFault, OSError.
        """
        last = self.closing and not self._buffer.data and not self.ended
        if last and self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        with gevent.Timeout(seconds, ClientFault(NOT_TAKEN, f'{len(self.unsent)} bytes')):
            self.send(self.unsent)
        self.unsent = b''
        if last:
            self.ended = True
            self.socket.shutdown(socket.SHUT_WR)

    def drain(self, now: float) -> None:
        """Close the connection with its next answer; now, if it is idle and none is expected soon."""
        self.closing = True
        if self._waits and not self._buffer.data and now - self.asked > LINGER:
            self._leaving = True
            self._hub.loop.run_callback(self._readable)


class Proxy:
    """Decides requests and serves clients: `handle` is what StreamServer calls for each connection."""

    def __init__(self, services: Sequence[Service], default: bytes, failed: bytes, deadline: float, log: Log,
                 checked: bool = True) -> None:  # fmt: skip
        """Checked: as one process for many clients, which may ask each service its own question."""
        self.statistics = Statistics()
        self.queue = Queue(services, log, checked)
        self.pools, self._choose = self.queue.pools, self.queue.balancer.choose
        self.clients: set[Client] = set()
        self.draining = False
        self._default, self._failed, self._log = default, failed, log
        self._deadline = deadline - TOO_SHORT  # seconds, for a request
        #: Default actions that are logged once in ten seconds and not one by one, by reason: how many were.
        self._logged = {NO_SERVICE: 0, NOT_POLICY: 0}
        self._stalled: set[Service] = set()
        for service in services:
            service.since = time.monotonic()
        gevent.spawn(self._keep, TICK if checked else 1.0)

    # -- deciding

    def decide(self, request: bytes, client: Client, now: float) -> Decision:
        """Answer a request that came `now`, always, and before the deadline. Raises ClientFault alone."""
        self.statistics.requests += 1
        instance = instance_of(request)
        if instance is None:
            return self._give_default(client, NOT_POLICY, None, [])
        if (instance != client.instance or not instance) and (last := client.connection) is not None:
            last.pool.let_go(last, client)
        client.instance = instance
        deadline = now + self._deadline
        tried: list[Pool] = []
        failure: ServiceFailure | None = None
        while now < deadline:
            pool = self._choose(instance, tried, now)
            connection = pool.take(client, now) if pool is not None else None
            if connection is None and (connection := self.queue.wait(client, pool, tried, deadline, now)) is None:
                break
            tried.append(connection.pool)
            try:
                action = self._query(connection, request, client, deadline)
            except ServiceFailure as caught:
                failure, now = caught, time.monotonic()
                continue
            self.statistics.answers += 1
            if failure is None:
                return action, connection.pool.service, 1, 'ok'
            self.statistics.redispatches += 1
            return action, connection.pool.service, len(tried), f'ok after {failure.reason}'
        reason = NO_SERVICE if failure is None else ALL_FAILED
        if time.monotonic() >= deadline:
            reason = OUT_OF_TIME
        return self._give_default(client, reason, failure, tried)

    def _query(self, connection: Connection, request: bytes, client: Client, deadline: float) -> bytes:
        """Pass on the answer of one service; return its action. Raises ServiceFailure, ClientFault."""
        pool, service, retried = connection.pool, connection.pool.service, False
        connection.user = client.user
        try:
            while True:
                service.queries += 1
                try:
                    action = connection.ask(request, connection.since, deadline - connection.since)
                    break
                except Ended:
                    if retried:
                        raise
                    retried = True
                    self.statistics.retries += 1
                    connection.renew(deadline - time.monotonic())
        except Exception as error:  # a fault of ours costs a redispatch, not the mail
            now = time.monotonic()
            if isinstance(error, ClientFault):
                pool.give_back(connection, now)
                raise
            failure = error if isinstance(error, ServiceFailure) else ServiceFailure(INTERNAL, repr(error))
            pool.report(f'failed: {failure.reason}, {failure}, instance: {printable(client.instance)}')
            pool.failed(connection, failure, now)
            raise failure from None
        now, gone = time.monotonic(), client.ended
        client.answer(action)  # first: what follows would be a tenth of the latency that we add
        client.connection, connection.holder = connection, client if client.instance else None
        # a client that had hung up may never read this: nothing more on that connection
        pool.answered(connection, action, not gone, now)
        return action

    def _give_default(self, client: Client, reason: str, failure: ServiceFailure | None,
                      tried: Sequence[Pool]) -> Decision:  # fmt: skip
        able = any(pool.service.state is not DOWN for pool in self.pools.values())
        action = self._failed if tried and able else self._default
        client.answer(action)
        self.statistics.defaults[reason] += 1
        why = f'default, {reason}' + (f', last: {failure.reason}' if failure is not None else '')
        if reason not in self._logged:
            self._log(WARNING, f"Default action '{printable(action)}' given: {why}")
        return action, tried[-1].service if tried else None, len(tried), why

    # -- serving

    def handle(self, sock: socket.socket, address: tuple[Any, ...] | str = '') -> None:
        """Serve one client until it leaves, breaks the protocol, or we drain."""
        client = Client(sock)
        client.closing = self.draining
        self.clients.add(client)
        self.statistics.clients += 1
        try:
            self._serve(client)
        except (ClientFault, OSError) as error:
            self._refuse(error if isinstance(error, ClientFault) else ClientFault(RESET), address)
        finally:
            self.clients.discard(client)
            if client.connection is not None:
                client.connection.pool.let_go(client.connection, client)
            client.close()

    def _refuse(self, fault: ClientFault, address: tuple[Any, ...] | str) -> None:
        self.statistics.refused[fault.reason] += 1
        where = f' from {address[0]}:{address[1]}' if isinstance(address, tuple) else ''  # else of a unix socket
        self._log(WARNING if fault.reason is TOO_LONG else NOTICE, f'Client connection closed{where}: {fault}')

    def _serve(self, client: Client) -> None:
        log = self._log
        while (request := client.request(self._deadline)) is not None:
            started = client.asked = time.monotonic()
            if log.verbose:
                for line in request.splitlines()[:-1]:
                    log(INFO, f'Attribute: {printable(line)}')
            decision = self.decide(request, client, started)
            if client.unsent:
                client.finish_answer(self._deadline)
            if log.requests:
                self._log_request(decision, request, time.monotonic() - started)

    def _log_request(self, decision: Decision, request: bytes, delay: float) -> None:
        action, service, _, why = decision
        if self._log.verbose:
            if service is not None and why.startswith('ok'):
                self._log(INFO, f"Answer from '{service.name}' -> '{printable(action)}'")
            self._log(INFO, f'Action: {printable(action)}')
        self._log(INFO, request_line(decision, request, delay))

    def drain(self, seconds: float) -> bool:
        """Close every client between two requests; return False if some were left after so many seconds."""
        self.draining = True
        give_up = time.monotonic() + seconds
        gevent.sleep(0.001)  # lets those begin that were accepted a moment ago
        while self.clients and (now := time.monotonic()) < give_up:
            for client in self.clients:
                client.drain(now)
            gevent.sleep(0.01)
        self._log_defaults()
        return not self.clients

    # -- what is done again and again

    def _keep(self, pause: float) -> None:
        second = 0.0
        while True:
            gevent.sleep(pause)
            try:
                now = time.monotonic()
                self.queue.tick(now)
                if now - second >= 1:
                    second = now
                    self._each_second(now)
            except Exception:  # a fault of ours costs one time, not all
                gevent.get_hub().handle_error(self, *sys.exc_info())

    def _each_second(self, now: float) -> None:
        self.queue.prune(now)
        for service, pool in self.pools.items():
            service.latency.counts()
            if pool.stalled(now) != (service in self._stalled):
                self._stalled ^= {service}
                pool.report(f'is stalled: {len(pool.busy)} requests and no answer' if service in self._stalled
                            else 'is no longer stalled')  # fmt: skip
        if int(now) % 10 == 0:
            self._log_defaults()

    def _log_defaults(self) -> None:
        for reason, logged in self._logged.items():
            given = self.statistics.defaults[reason]
            if given > logged:
                self._logged[reason] = given
                level = WARNING if reason is NO_SERVICE else NOTICE
                self._log(level, f"Default action '{printable(self._default)}' given {given - logged} times: {reason}")

    def summarize(self, seconds: float) -> None:
        """Log a summary so often, for ever."""
        for line in summaries(self.statistics, list(self.pools)):
            if line:
                self._log(NOTICE, line)
            gevent.sleep(seconds)


# ---------------------------------------------------------------------------
# Status endpoint. What only it needs is imported when it starts: under spawn(8) nobody pays for it.
# ---------------------------------------------------------------------------


def lasting(seconds: float) -> str:
    """Return a time as a person says it: '12 s', '3 min', '2 h 5 min', '3 d 4 h'."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return f'{int(seconds)} s'
    if minutes < 60:
        return f'{minutes} min'
    hours = minutes // 60
    return f'{hours} h {minutes % 60} min' if hours < 48 else f'{hours // 24} d {hours % 24} h'


def clock(when: float) -> str:
    """Return a unix time as the server's clock shows it, with its date if that was another day."""
    there = time.localtime(when)
    today = there[:3] == time.localtime()[:3]
    return time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', there)


#: Method and path; also of a proxy, which sends the whole address.
HTTP_REQUEST = rb'([!-~]+) (?:http://[^/ ]*)?(/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n'


class Status:
    """What the proxy tells of itself by HTTP: it only reads counters.

    /             the page for people: a constant, filled every 2 s from status.json
    /status.json  all of it for programs; docs/operations.md has the fields
    /metrics      for Prometheus, if its client library is installed; 501 if not
    /health       200 'ok' while a service is able to answer and no drain has begun; else 503 and why, in one line

    The Host header is not looked at: there is nothing here to change and no secret to read, and a
    reverse proxy may give it any name. Who may read it is who can reach the address.
    """

    def __init__(self, proxy: Proxy, default: bytes, log: Log) -> None:
        import base64
        import hashlib
        import json

        self._proxy, self._default, self._log = proxy, printable(default), log
        self._services = [pool.service for pool in proxy.queue.balancer.pools]
        self._started = time.monotonic()
        # the last ten minutes, sampled: requests pay nothing for it
        self._samples = {service: deque([Sample.of(service)], maxlen=SAMPLES) for service in self._services}
        self._given = deque([(self._started, 0)], maxlen=SAMPLES)  # default actions
        self._fresh: dict[str, tuple[float, bytes]] = {}
        self._dumps = functools.partial(json.dumps, separators=(',', ':'), allow_nan=False)
        self._metrics: Callable[[], bytes] | None = None
        with contextlib.suppress(ImportError):  # here: in the first scrape it would hold up mail for 0.1 s
            from prometheus_client import CollectorRegistry, generate_latest

            registry = CollectorRegistry()
            registry.register(self)
            self._metrics = functools.partial(generate_latest, registry)
        style, script = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                         for text in re.findall(r'<(?:style|script)>(.*?)</', STATUS_PAGE, re.DOTALL)]  # fmt: skip
        policy = (f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}';"
                  " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
                  " frame-ancestors 'none'")  # fmt: skip
        self._headers = [
            f'Content-Security-Policy: {policy}',
            'X-Content-Type-Options: nosniff', 'Referrer-Policy: no-referrer', 'Cache-Control: no-store',
            'Cross-Origin-Resource-Policy: same-origin', 'Allow: GET, HEAD', 'Connection: close',
        ]  # fmt: skip
        gevent.spawn(self._sample)

    def _sample(self) -> None:
        while True:
            gevent.sleep(SAMPLE_SECONDS)
            for service, samples in self._samples.items():
                samples.append(Sample.of(service))
            self._given.append((time.monotonic(), sum(self._proxy.statistics.defaults.values())))

    # -- HTTP

    def handle(self, sock: socket.socket, _address: object = None) -> None:
        """Answer one request and end: what StreamServer calls for each connection. Headers are skipped."""
        with sock, contextlib.suppress(OSError), gevent.Timeout(STATUS_SECONDS, TimeoutError()):
            head, end = b'', 0
            while not end and len(head) < STATUS_HEAD and (data := sock.recv(STATUS_HEAD - len(head))):
                head += data
                end = end_of_message(head)
            sock.sendall(self._respond(head[:end]))
            sock.shutdown(socket.SHUT_WR)
            # what is unread at the end would reset the connection, and our answer with it
            with gevent.Timeout(STATUS_LINGER, TimeoutError()):
                while sock.recv(RECEIVE):
                    gevent.sleep(STATUS_PAUSE)

    def _respond(self, head: bytes) -> bytes:
        """Return the answer to the head of a request (RFC 9112)."""
        code, kind, body = '400 Bad Request', 'text/plain', b'not understood\n'
        asked = re.match(HTTP_REQUEST, head)
        if asked:
            code, kind, body = '405 Method Not Allowed', 'text/plain', b'only GET and HEAD are answered\n'
            if asked[1] in (b'GET', b'HEAD'):
                code, kind, body = self._answer(asked[2].decode('latin-1'))
        date = time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())
        lines = [f'HTTP/1.1 {code}', f'Date: {date}', f'Content-Type: {kind}; charset=utf-8',
                 f'Content-Length: {len(body)}', *self._headers, '', '']  # fmt: skip
        return '\r\n'.join(lines).encode() + (body if not asked or asked[1] != b'HEAD' else b'')

    def _answer(self, path: str) -> tuple[str, str, bytes]:
        """Return status, type and body for a path."""
        if path == '/':
            return '200 OK', 'text/html', STATUS_PAGE.encode()
        if path == '/status.json':
            return '200 OK', 'application/json', self._kept(path, lambda: self._dumps(self.data()).encode())
        if path == '/health':
            ill = self.ill()
            return ('503 Service Unavailable' if ill else '200 OK'), 'text/plain', f'{ill or "ok"}\n'.encode()
        if path != '/metrics':
            return '404 Not Found', 'text/plain', b'there are /, /status.json, /metrics and /health\n'
        if self._metrics is None:
            return '501 Not Implemented', 'text/plain', NO_PROMETHEUS
        return '200 OK', 'text/plain; version=0.0.4', self._kept(path, self._metrics)

    def _kept(self, path: str, build: Callable[[], bytes]) -> bytes:
        """Return a body, built anew four times a second at most: mail does not pay for who asks too often."""
        until, body = self._fresh.get(path, (0.0, b''))
        if time.monotonic() >= until:
            body = build()
            self._fresh[path] = time.monotonic() + STATUS_FRESH, body
        return body

    def ill(self) -> str:
        """Return why no new client should be sent here, '' if there is no reason."""
        if self._proxy.draining:
            return 'draining'
        able = any(self.able(service) for service in self._services)
        return '' if able else f"no service is up: '{self._default}' is given to every request"

    def able(self, service: Service) -> bool:
        """Tell whether a service may get the next mail: it is up, or a trial is free."""
        return service.state is not DOWN and self._proxy.pools[service].admits(0, time.monotonic())

    # -- what is told

    def data(self) -> dict[str, Any]:
        """Return the content of /status.json; docs/operations.md has its fields."""
        now, wall = time.monotonic(), time.time()
        statistics = self._proxy.statistics
        minute = {service: self._lately(service, SHARE_SECONDS) for service in self._services}
        answers = sum(sample.answers for sample in minute.values())
        level, text = self.headline(minute, now, wall)
        return {
            'version': 1, 'program': __version__, 'pid': os.getpid(),
            'time': round(wall, 3), 'started': round(wall - (now - self._started), 3),
            'uptime': round(now - self._started, 3), 'utc_offset': time.localtime(wall).tm_gmtoff,
            'draining': self._proxy.draining, 'headline': {'level': level, 'text': text}, 'default': self._default,
            **{name: getattr(statistics, name) for name, _ in COUNTERS},
            'clients_connected': len(self._proxy.clients),
            'defaults': statistics.defaults, 'refused': statistics.refused, 'log_lines_lost': self._log.lost,
            'step': SAMPLE_SECONDS,
            'services': [self._service(service, minute[service], answers, now, wall) for service in self._services],
        }  # fmt: skip

    def _lately(self, service: Service, seconds: float) -> Sample:
        """Return what was counted in the last so many seconds, up to one sample more; all, while there is less."""
        now, samples = Sample.of(service), self._samples[service]
        old = (sample for sample in reversed(samples) if now.when - sample.when >= seconds)
        return now.after(next(old, samples[0]))

    def _service(self, service: Service, minute: Sample, answers: int, now: float, wall: float) -> dict[str, Any]:
        recent, pool = self._lately(service, RATE_SECONDS), self._proxy.pools[service]
        steps = [after.after(before) for before, after in itertools.pairwise(self._samples[service])]
        parts = {'p50': 0.5, 'p95': 0.95, 'p99': 0.99}
        slow = {name: Latency.quantile(minute.counts, part) for name, part in parts.items()}
        return {
            'name': service.name, 'address': service.where, 'prio': service.prio, 'weight': service.weight,
            'timeout': service.timeout, 'max': service.max,
            'full': pool.checker.full or None, 'use': pool.use,
            'state': service.state, 'stalled': pool.stalled(now),
            'since': round(wall - (now - service.since), 3), 'lasting': round(now - service.since, 3),
            'why': service.why,
            'in_flight': len(pool.busy), 'waiting': pool.wanting,
            'idle_connections': len(pool.idle) + len(pool.held), 'checks': len(pool.checker.running),
            'queries': service.queries, 'answers': service.answers, 'failed': service.failed,
            'verdicts': service.verdicts, 'failures': service.failures,
            # of the first moments as if of a second
            'requests_per_second': round((recent.answers + recent.failed) / max(1.0, recent.when), 2),
            'share': round(minute.answers / answers, 4) if answers else None,
            **{name: None if bound is None else min(bound, Latency.BOUNDS[-1]) for name, bound in slow.items()},
            'history': {'answers': [step.answers for step in steps], 'failed': [step.failed for step in steps]},
        }  # fmt: skip

    def headline(self, minute: dict[Service, Sample], now: float, wall: float) -> tuple[str, str]:
        """Return how bad it is (ok, warning, bad), and in words which service, since when, why and what it cost."""
        services = self._services
        ill = [service for service in services if service.state is not UP or self._proxy.pools[service].stalled(now)]
        said = [self._trouble(service, now, wall) for service in ill]
        level = 'bad' if not any(self.able(service) for service in services) else 'warning' if said else 'ok'
        if len(said) > 3:
            said[3:] = [f'{len(said) - 3} more are not well.']
        if level == 'bad' and len(services) > 1:
            said.insert(0, 'No service is up.')
        if not said:
            said.append(f'All {len(services)} services are up.' if len(services) > 1 else f'{services[0].name} is up.')
        given = sum(self._proxy.statistics.defaults.values()) - self._given[0][1]
        failing = [f'{service.name} failed {sample.failed} of {sample.failed + sample.answers} queries in the last'
                   f' {sample.when:.0f} s.' for service, sample in minute.items() if sample.failed]  # fmt: skip
        if self._proxy.draining:
            said.insert(0, f'Draining: no new client is accepted, {len(self._proxy.clients)} are connected.')
        if level == 'ok' and (given or failing or self._proxy.draining):
            level = 'warning'
        return level, ' '.join([*said, *failing[:3], *([self._cost(given, now)] if level != 'ok' else [])])

    def _trouble(self, service: Service, now: float, wall: float) -> str:
        """Return a sentence about a service that is down, on trial or stalled."""
        if service.state is UP:
            busy = self._proxy.pools[service].busy
            silent = lasting(now - max(service.answered_at, next(iter(busy)).since))
            return f'{service.name} is stalled: {len(busy)} in flight and no answer for {silent}.'
        since = f'since {clock(wall - (now - service.since))} (for {lasting(now - service.since)}): {service.why}'
        trial = '; it can be connected to and waits for a request' if self.able(service) else ''
        return f'{service.name} is down {since}{trial}.'

    def _cost(self, given: int, now: float) -> str:
        """Return a sentence about the default actions given lately."""
        whole = len(self._given) == SAMPLES
        when = f'in the last {(now - self._given[0][0]) / 60:.0f} minutes' if whole else 'since the start'
        many = {0: 'No request', 1: '1 request'}.get(given, f'{given} requests')
        return f"{many} got the default action '{self._default}' {when}."

    # -- metrics

    def collect(self) -> Iterable[Any]:
        """Yield the metric families, as prometheus_client asks a collector to."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for kind, rows in ((CounterMetricFamily, self._counters()), (GaugeMetricFamily, self._gauges())):
            for name, text, labels, values in rows:
                family = kind(f'hapolicy_{name}', text, labels=labels)
                for labelled, value in values:
                    family.add_metric(labelled, value)
                yield family
        seconds = HistogramMetricFamily('hapolicy_query_seconds', 'time to each answer', labels=['service'])
        for service in self._services:
            seconds.add_metric([service.name], buckets(service.latency), service.latency.sum)
        yield seconds

    def _counters(self) -> Iterable[Metric]:
        statistics = self._proxy.statistics
        for name, text in COUNTERS:
            if name != 'answers':  # told by service
                yield name, text, [], [([], getattr(statistics, name))]
        yield 'log_lines_lost', 'log lines that could not be written', [], [([], self._log.lost)]
        for name, text, counts in (
            ('defaults', 'default actions given', statistics.defaults),
            ('refused', 'client connections closed for what the client did', statistics.refused),
        ):
            yield name, text, ['reason'], [([reason], count) for reason, count in counts.items()]
        yield 'answers', 'answers by what they do to the mail', ['service', 'verdict'], [
            ([service.name, kind], count) for service in self._services
            for kind, count in service.verdicts.items()]  # fmt: skip
        yield 'failures', 'queries without a usable answer', ['service', 'reason'], [
            ([service.name, reason], count) for service in self._services
            for reason, count in service.failures.items()]  # fmt: skip

    def _gauges(self) -> Iterable[Metric]:
        now = time.monotonic()
        started = round(time.time() - (now - self._started), 1)
        yield 'clients', 'clients connected', [], [([], len(self._proxy.clients))]
        yield 'build_info', 'always 1; the version is its label', ['version'], [([__version__], 1)]
        yield 'start_time_seconds', 'unix time of the start', [], [([], started)]
        values: tuple[tuple[str, str, Callable[[Pool], float]], ...] = (
            ('up', '1 if it is up, or on trial and waiting for a request', lambda pool: self.able(pool.service)),
            ('stalled', '1 if mail is in flight and none was answered for --stall', lambda pool: pool.stalled(now)),
            ('in_flight', 'requests in flight', lambda pool: len(pool.busy)),
            ('max', 'connections at most', lambda pool: pool.service.max),
            ('full', '1 if it does not serve a connection more', lambda pool: pool.checker.full > 0),
            ('idle_connections', 'idle connections', lambda pool: len(pool.idle) + len(pool.held)),
        )
        for name, text, value in values:
            rows = [([service.name], value(pool)) for service, pool in self._proxy.pools.items()]
            yield f'service_{name}', text, ['service'], rows


#: Name, help, names of the labels, and values by those of the labels.
Metric: TypeAlias = 'tuple[str, str, list[str], list[tuple[list[str], float]]]'


#: The body of /metrics where the client library is missing.
NO_PROMETHEUS = f"""\
The Prometheus client library is not installed. Either of these does it, then restart hapolicy:
  {sys.executable} -m pip install prometheus-client
  apt-get install python3-prometheus-client
""".encode('utf-8', 'backslashreplace')


def buckets(latency: Latency) -> list[tuple[str, int]]:
    """Return a histogram as Prometheus has it: cumulative, here with 1-2-5 bounds."""
    seen = list(itertools.accumulate(latency.counts()))
    bounds = [f'{bound:g}' for bound in latency.BOUNDS]
    kept = [(text, count) for text, count in zip(bounds, seen, strict=False) if text.strip('0.') in ('1', '2', '5')]
    return [*((str(float(text)), count) for text, count in kept), ('+Inf', seen[-1])]


def start_server(listener: socket.socket, handle: Callable[..., None], greenlets: Any) -> Any:
    """Serve each connection by a greenlet of this pool, or of so many; return the StreamServer."""
    from gevent.server import StreamServer

    server = StreamServer(listener, handle, spawn=greenlets)
    server.max_delay = 0.1  # seconds without accepting after an error
    server.start()
    return server


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


def parse_action(text: str, option: str) -> bytes:
    """Return the action that an option gives, as bytes. Raises UsageError for one that Postfix would misread."""
    action = os.fsencode(text)
    try:
        if b'\n' in action or b'\r' in action:
            raise InvalidAnswer('a line break in the action')
        if action.lower().startswith(b'action='):
            raise InvalidAnswer("'action=' before the action")
        if clean_action(action) != action.strip():
            raise InvalidAnswer('bytes that are not UTF-8, or control characters')
        return action.strip()
    except InvalidAnswer as error:
        raise UsageError(f"{option} '{text}': Postfix would misread {error}; allowed is one line of UTF-8 with an"
                         " action of access(5), as 'dunno' or '451 4.3.5 try again later'") from None  # fmt: skip


def parse_listen(text: str, option: str = '--listen') -> Address:
    """Return the address that an option gives to listen on. Raises UsageError."""
    allowed = 'allowed is <IPv4>:<port>, [<IPv6>]:<port> or unix:/path'
    try:
        address, rest = parse_address(text)
    except UsageError as error:
        raise UsageError(f"{option} '{text}': {error}; {allowed}") from None
    if rest or address.family == socket.AF_UNSPEC:
        raise UsageError(f"{option} '{text}': a name, or more than an address; {allowed}")
    return address


def parse_services(texts: Sequence[str]) -> list[Service]:
    """Return the services of all -s options. Raises UsageError."""
    services = [parse_service(text) for text in texts]
    if not services:
        raise UsageError('no --service given: at least one -s <name>=<address>:<port> is needed')
    names = [service.name for service in services]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--service '{twice[0]}' is given twice: each name is allowed once")
    return services


class Options:
    """The command line, checked: what docopt found by the options' names."""

    def __init__(self, given: dict[str, Any]) -> None:
        """Raises UsageError."""
        self.services = parse_services(given['--service'])
        self.default = parse_action(given['--default'], '--default')
        failed = given['--failed']
        self.failed = self.default if failed is None else parse_action(failed, '--failed')
        self.logging: bool = given['--logging']
        self.verbose: bool = given['--verbose']
        self.stdout: bool = given['--stdout']
        self.reuse_port: bool = given['--reuse-port']
        self.check_services: bool = given['--check-services']
        self.listen = [parse_listen(text) for text in given['--listen']]
        status = given['--status']
        self.status = None if status is None else parse_listen(status, '--status')
        if self.status in self.listen:
            raise UsageError(f"--status '{status}' is the address of a --listen: it needs one of its own")
        if not re.fullmatch(r'0?[0-7]{3}', given['--socket-mode']):
            raise UsageError(f"--socket-mode '{given['--socket-mode']}' is not an octal number from 000 to 777")
        self.socket_mode = int(given['--socket-mode'], 8)
        clients = given['--max-clients']
        self.max_clients = None if clients is None else parse_number(clients, '--max-clients', 1, 10**6)
        self.deadline = parse_seconds(given['--deadline'], '--deadline')
        if self.deadline < MIN_DEADLINE:
            raise UsageError(f"--deadline '{given['--deadline']}' is too short to ask a service: allowed is"
                             f' {MIN_DEADLINE:g} s or more')  # fmt: skip
        self.grace = parse_seconds(given['--grace'], '--grace')
        never = re.fullmatch(r'0+(\.0*)?', given['--summary'])
        self.summary = 0.0 if never else parse_seconds(given['--summary'], '--summary')
        fall, stall = parse_number(given['--fall'], '--fall', 1, 1000), parse_seconds(given['--stall'], '--stall')
        for service in self.services:
            service.fall, service.stall = fall, stall


def parse_command_line(argv: Sequence[str]) -> Options:
    """Return the options. Raises UsageError; SystemExit after --help and --version."""
    try:
        given: dict[str, Any] = docopt(__doc__, list(argv), version=f'hapolicy {__version__}')
    except DocoptExit as error:
        told = str(error).partition('\n')[0]  # or, where docopt does not tell, how all is used
        raise UsageError(f'{misused(argv) if told.startswith("Usage:") else told}; see hapolicy --help') from None
    return Options(given)


def misused(argv: Sequence[str]) -> str:
    """Return which word of a command line docopt could not place."""
    known = re.findall(r'(?<![\w-])--?[A-Za-z][a-z-]*', __doc__)
    for word in argv:
        name = word.partition('=')[0] if word.startswith('--') else word[:2]
        if name.startswith('-') and not any(option.startswith(name) for option in known):
            return f"unknown option '{word}'"
    return f"cannot use '{' '.join(argv)}': a word is no option, or one is given twice (quote values with blanks)"


def is_client(fd: int) -> bool:
    """Tell whether a descriptor is the client's socket, as stdin is under spawn(8)."""
    return stat.S_ISSOCK(os.fstat(0).st_mode) and os.path.samestat(os.fstat(0), os.fstat(fd))


def complain(text: str) -> None:
    """Tell the user what ends the start: one line on stderr, or in syslog where stderr is the client."""
    text = printable(os.fsencode(text))
    if is_client(2):
        SyslogSink(None).write([(WARNING, text)])
    else:
        os.write(2, f'hapolicy: {text}\n'.encode('utf-8', 'backslashreplace'))


def make_log(options: Options, server: bool) -> Log:
    """Return the log as asked for, with our errors; stdout and stderr are not used where they are the client."""
    sink: StreamSink | SyslogSink
    if options.stdout and (server or not is_client(1)):
        sink = StreamSink(1)
    else:
        sink = SyslogSink(StreamSink(2) if server or os.isatty(2) else None)
    log = Log(sink, options.logging, options.verbose)
    report_errors(log)
    return log


def report_errors(log: Log) -> None:
    """Send to the log what gevent would print on stderr: an accept() that failed, or an error of ours."""
    told = [0.0]

    def report(context: object, kind: Any, value: Any, trace: Any) -> None:
        if hasattr(context, 'do_read') and isinstance(value, OSError):  # a StreamServer
            if time.monotonic() > told[0]:  # waiting clients are tried ten times a second
                told[0] = time.monotonic() + 1
                log(WARNING, f'Cannot accept a client: {value.strerror or value}; it waits in the backlog')
            return
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f'{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}' if trace is not None else '-'
        log(WARNING, f'Internal error at {where}: {kind.__name__}: {value}')

    hub: Any = gevent.get_hub()
    hub.print_exception = report


def check_service(service: Service) -> tuple[bool, list[str]]:
    """Ask a service our own question; return whether its answer can be used, and a row for the user."""
    row = [service.name, service.where]
    pool = Queue([service], Log(StreamSink(os.open(os.devnull, os.O_WRONLY)))).pools[service]
    connection, began = Connection(pool, time.monotonic()), time.monotonic()
    try:
        with gevent.Timeout(service.timeout, ServiceFailure(LATE, f'no answer within {service.timeout:g}s')):
            connection.open()
            connected = time.monotonic()
            said, action = connection.check()
    except ServiceFailure as failure:
        return False, [*row, 'FAILED', f'{failure.reason}: {failure}']
    if said is SURPLUS:
        return False, [*row, 'FAILED', 'invalid: bytes after the answer: requests could get those of others']
    times = f'connect {(connected - began) * 1000:6.1f} ms, answer {(service.heard_at - connected) * 1000:7.1f} ms'
    once = ', then it hangs up' if said is ENDED else ''
    return True, [*row, 'answered', times, f"{verdict(action)}: '{printable(action)}'{once}"]


def check_services(services: Sequence[Service]) -> int:
    """Ask all services at once; print a line for each as it comes; return the exit status."""
    widths = [max(len(service.name) for service in services), max(len(service.where) for service in services), 8, 0, 0]
    fine = True
    for check in gevent.iwait([gevent.spawn(check_service, service) for service in services]):
        answered, row = check.get()
        fine = fine and answered
        line = '  '.join(map(str.ljust, row, widths)).rstrip()
        try:
            os.write(1, f'{line}\n'.encode('utf-8', 'backslashreplace'))
        except OSError as error:
            complain(f'stdout: {error.strerror}; it is where the answers are told')
            return 1
    return 0 if fine else 1


def open_listeners(options: Options) -> list[socket.socket]:
    """Return the listening sockets of all --listen, and of --status last. Raises ListenError.

    With --reuse-port another process serves there, and goes on if anything fails: all are bound before one listens.
    """
    wanted = [(address, '--listen') for address in options.listen]
    if options.status is not None:
        wanted.append((options.status, '--status'))
    bound: list[socket.socket] = []
    try:
        for address, option in wanted:
            with blaming(address, option):
                bound.append(bind(address, options.socket_mode, options.reuse_port))
        for sock, (address, option) in zip(bound, wanted, strict=True):
            with blaming(address, option):
                sock.listen(BACKLOG)
                if address.family == socket.AF_UNIX:
                    os.rename(sock.getsockname(), address.host)
    except ListenError:
        for sock in bound:
            if sock.family == socket.AF_UNIX:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(sock.getsockname())
        raise
    return bound


@contextlib.contextmanager
def blaming(address: Address, option: str) -> Iterator[None]:
    """Turn an OSError into a ListenError that names the option."""
    try:
        yield
    except OSError as error:
        raise ListenError(f"{option} '{address}': {error.strerror or error}; allowed is an address of this machine"
                          ' and a port or path that is free and may be used') from None  # fmt: skip


def bind(address: Address, mode: int, reuse: bool) -> socket.socket:
    """Return a socket bound to an address, of a path beside it: to be moved there. Raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if address.family == socket.AF_UNIX:
            bind_beside(sock, address.host, mode, reuse)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if address.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address.host, address.port))
    except OSError:
        sock.close()
        raise
    return sock


def bind_beside(sock: socket.socket, path: str, mode: int, reuse: bool) -> None:
    """Bind beside a path at which nothing is, or a socket that nobody serves any more; with `reuse` any.

    Moved there when it listens: nobody meets it missing, with the wrong mode, or not served. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, 'a file that is no socket is there')
    if not reuse:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connect(socket.AF_UNIX, path).close()
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    beside = os.path.join(os.path.dirname(path), f'.{os.getpid()}.{sock.fileno()}')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside)  # of a process that ended in this moment, and had our pid
    sock.bind(beside)
    os.chmod(beside, mode)


def inherited_listeners() -> list[socket.socket]:
    """Return the sockets handed over by systemd's socket activation (sd_listen_fds(3)). Raises ListenError."""
    if os.environ.get('LISTEN_PID') != str(os.getpid()):
        return []
    count = parse_number(os.environ.get('LISTEN_FDS', '0'), 'LISTEN_FDS', 0, 1000)
    return [inherited_listener(fd) for fd in range(3, 3 + count)]


def inherited_listener(fd: int) -> socket.socket:
    """Return the listening socket that a descriptor is. Raises ListenError."""
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=fd)
        if sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return sock
    raise ListenError(f'descriptor {fd}, from systemd, is not listening: allowed is ListenStream= with Accept=no')


def check_loops(services: Sequence[Service], where: Sequence[str]) -> None:
    """Raises UsageError for a service that is where we listen: it would ask itself, until all wait for all."""
    for service in services:
        _, host, port = service.address
        local = '[::]' if host == '::1' else '0.0.0.0' if host.startswith('127.') or host == 'localhost' else '-'
        if service.where in where or f'{local}:{port}' in where:
            raise UsageError(f"--service '{service.name}': {service.where} is where clients are served: it would ask"
                             ' itself; allowed is the address of a policy server')  # fmt: skip


def notify(state: str) -> None:
    """Tell systemd our state, if it asked to be told (sd_notify(3))."""
    path = os.environ.get('NOTIFY_SOCKET', '')
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), '\0' + path[1:] if path.startswith('@') else path)


def client_limit(options: Options, log: Log) -> int:
    """Raise the soft descriptor limit to the hard one; return how many clients to serve at once.

    Every service may need its max of connections: the rest is for clients, and half at least. More
    than that is never allowed: a client that is accepted could not be answered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # the kernel's own limit (fs.nr_open) may be lower
        hard = soft
    reserved = RESERVED_DESCRIPTORS + (STATUS_CONNECTIONS + 1 if options.status is not None else 0)
    room = (hard if hard != resource.RLIM_INFINITY else 10**6) - reserved
    carried = max(1, room - sum(service.max for service in options.services), room // 2)
    asked = options.max_clients
    if asked is not None and asked > carried:
        log(WARNING, f"--max-clients '{asked}' is more than the descriptor limit of {hard} carries: {carried} it is")
    return min(asked or carried, carried)


def limit_timeouts(services: Sequence[Service], deadline: float, log: Log) -> None:
    """Leave each request time for a second service."""
    for service in services if len(services) > 1 else []:
        if service.timeout > deadline / 2:
            log(WARNING, f'The timeout of {service.name}, {service.timeout:g}s, is cut to half of --deadline'
                         f' {deadline:g}s: else a server that hangs would leave no time for another')  # fmt: skip
            service.timeout = deadline / 2


def stop_signal() -> gevent.event.Event:
    """Return what SIGTERM and SIGINT set; the second of them ends the process."""
    asked = gevent.event.Event()

    def ask() -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, ask)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to read anew, and mail in flight to lose
    return asked


def serve_stdin(proxy: Proxy, stop: gevent.event.Event, grace: float) -> bool:
    """Serve the one client on stdin and stdout; return False if its answers could not all be given."""
    served: gevent.Greenlet[..., bool | None]
    if is_client(1):
        served = gevent.spawn(proxy.handle, socket.socket(fileno=os.dup(0)))
    else:
        sock, far = socket.socketpair()
        gevent.spawn(pump_in, far)
        gevent.spawn(proxy.handle, sock)
        served = gevent.spawn(pump_out, far)  # ends after the client has
    gevent.wait([served, stop], count=1)  # type: ignore[type-var]
    give_up = time.monotonic() + grace
    drained = proxy.drain(grace)
    served.join(max(0.0, give_up - time.monotonic()))
    return drained and served.successful() and served.value is not False  # handle() returns nothing


def pump_in(far: socket.socket) -> None:
    """Pass stdin on, whatever it is: a file or a terminal can not be waited for in the loop."""
    os.set_blocking(0, True)
    read = gevent.get_hub().threadpool.apply
    with contextlib.suppress(OSError):  # the client's side has ended first: what it has answered is still passed on
        while data := read(os.read, (0, RECEIVE)):
            far.sendall(data)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_WR)


def pump_out(far: socket.socket) -> bool:
    """Pass the answers on to stdout; return False if nobody reads there."""
    os.set_blocking(1, True)
    with contextlib.suppress(OSError):
        while data := far.recv(RECEIVE):
            write_all(1, data)
        return True
    far.close()  # nobody is to be asked
    return False


def bound_to(listener: socket.socket) -> str:
    """Return where an inherited socket listens, as an option would name it."""
    name = listener.getsockname()
    host, port = (name, 0) if listener.family == socket.AF_UNIX else name[:2]
    return str(Address(listener.family, os.fsdecode(host), port))


def serve_listeners(listeners: Sequence[socket.socket], where: Sequence[str],
                    proxy: Proxy, stop: gevent.event.Event, options: Options, log: Log) -> bool:  # fmt: skip
    """Serve clients until told to stop; return False if some were left at the end of the grace."""
    from gevent.pool import Pool as GreenletPool

    limit = client_limit(options, log)
    greenlets: Any = GreenletPool(limit)  # one for each client
    servers = [start_server(listener, proxy.handle, greenlets) for listener in listeners]
    log(NOTICE, f'hapolicy {__version__} serves up to {limit} clients at {", ".join(where)}')
    if options.summary:
        gevent.spawn(proxy.summarize, options.summary)
    notify('READY=1')
    full = False
    while not stop.wait(1):
        if greenlets.full() and not full:
            log(WARNING, f'{limit} clients are served, the most allowed: more wait in the backlog')
        full = greenlets.full()
    notify('STOPPING=1')
    for server in servers:
        with contextlib.suppress(OSError):
            while not greenlets.full() and (accepted := server.do_read()):
                server.do_handle(*accepted)  # the backlog would be reset
        server.close()
    return proxy.drain(options.grace)


def patch_sockets() -> None:
    """Make the standard library's sockets and resolver those of gevent.

    As gevent.monkey.patch_socket() does, whose look for plug-ins costs 20 to 80 ms of start-up: under
    spawn(8) every smtpd would pay it.
    """
    for name in gevent.socket.__implements__:  # type: ignore[attr-defined]
        setattr(socket, name, getattr(gevent.socket, name))


def protect_client() -> None:
    """See that nothing but answers reaches descriptors 0 to 2, which may be the client."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # one that was closed would become a listener, and then get the log
        pass
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until stop_signal() takes it: a traceback could go to the client


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    protect_client()
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        patch_sockets()
        gevent.config.format_context = 'builtins.repr'  # not used; the hub's default imports pprint and more, for 10 ms
        hub: Any = gevent.get_hub()
        hub.threadpool_size += len(options.services)  # each may hang in the lookup of its host name
        if options.check_services:
            return check_services(options.services)
        listeners = inherited_listeners()
        where = [*map(bound_to, listeners), *map(str, options.listen)]
        check_loops(options.services, where)
        if options.status is not None and not where:
            raise UsageError(f"--status '{options.status}' needs --listen: of many processes on stdin one would get it")
        opened = open_listeners(options)
    except (UsageError, ListenError) as error:
        complain(str(error))
        return 2 if isinstance(error, UsageError) else 1
    status = opened.pop() if options.status is not None else None
    listeners += opened
    stop = stop_signal()
    log = make_log(options, bool(listeners))
    limit_timeouts(options.services, options.deadline, log)
    proxy = Proxy(options.services, options.default, options.failed, options.deadline, log, checked=bool(listeners))
    if status is not None:
        server = start_server(status, Status(proxy, options.default, log).handle, STATUS_CONNECTIONS)
        if options.reuse_port:  # the process that replaces this one is asked from now on, and never this one
            stop.rawlink(lambda _: server.close())
        log(NOTICE, f'The status is served at {options.status}')
    if listeners:
        clean = serve_listeners(listeners, where, proxy, stop, options, log)
        log(NOTICE, f'hapolicy ends, {proxy.statistics}')
    else:
        if stat.S_ISCHR(os.fstat(0).st_mode):  # a terminal, or the /dev/null of a unit without its --listen
            log(NOTICE, 'Without --listen and sockets of systemd one client is served, on stdin')
        clean = serve_stdin(proxy, stop, options.grace)
    log.close()
    return 0 if clean else 1


#: The status page, whole. The browser is told the hashes of its style and script and runs no other; what the
#: proxy says is put in as text, never as markup.
STATUS_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>hapolicy</title>
<link rel="icon" href="data:,">
<style>
:root { --back: #fff; --soft: #f3f5f7; --line: #d5dae0; --text: #1a1f26; --dim: #59636f; --link: #0a55b0;
  --good: #17692f; --warn: #855000; --bad: #b3161b; --bars: #3d78b8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181d; --soft: #1d232a; --line: #38414b; --text: #e6eaef; --dim: #a3adb8; --link: #7db7ff;
    --good: #6fd08c; --warn: #f0b450; --bad: #ff8a85; --bars: #6ea8e4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 88rem; background: var(--back); color: var(--text);
  font: 0.9375rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
header, footer, .bar { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; align-items: center; }
header { justify-content: space-between; color: var(--dim); }
h1 { margin: 0; font-size: 1rem; }
h2 { margin: 1.5rem 0 0.5rem; font-size: 1rem; }
#headline { margin: 0.75rem 0; padding: 0.75rem 1rem; border-left: 0.5rem solid var(--good); background: var(--soft);
  font-size: 1.125rem; font-weight: 600; }
#headline.warning { border-color: var(--warn); }
#headline.bad { border-color: var(--bad); }
#old { margin: 0.75rem 0; padding: 0.75rem 1rem; border: 2px dashed var(--bad); color: var(--bad); font-weight: 600; }
.aged #figures, .aged #headline { opacity: 0.6; }
button { font: inherit; padding: 0.25rem 0.9rem; color: var(--text); background: var(--soft);
  border: 1px solid var(--dim); border-radius: 0.3rem; cursor: pointer; min-width: 6.5rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.5rem; margin: 0; }
dl div { padding: 0.4rem 0.7rem; background: var(--soft); }
dt, small { color: var(--dim); font-size: 0.8125rem; }
dd { margin: 0; white-space: pre-line; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 600; font-size: 0.8125rem; color: var(--dim); }
th, td { padding: 0.5rem 0.6rem 0.5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: pre-line; }
td strong, td small { display: block; }
.state { font-weight: 700; color: var(--good); }
.trial .state, .stalled .state { color: var(--warn); }
.down .state { color: var(--bad); }
tr.down { background: var(--soft); }
svg { display: block; width: 15rem; max-width: 100%; height: 3rem; background: var(--soft); }
.down svg { background: var(--back); }
.answers { fill: var(--bars); }
.failed { fill: var(--bad); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[hidden] { display: none; }
footer { margin-top: 1rem; color: var(--dim); }
@media (max-width: 62rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { margin-bottom: 1rem; padding: 0.5rem 0.75rem; border: 1px solid var(--line); }
  td { display: grid; grid-template-columns: 7rem minmax(0, 1fr); padding: 0.2rem 0; border: 0; }
  td::before { content: attr(data-label); color: var(--dim); font-size: 0.8125rem; }
}
</style>
</head>
<body>
<header>
<h1>hapolicy <span id="program"></span></h1>
<div class="bar"><span id="updated"></span>
<button id="pause" type="button" aria-pressed="false" hidden>Pause</button></div>
</header>
<main>
<p id="headline"></p>
<p id="told" class="hidden" aria-live="polite"></p>
<p id="old" role="alert" hidden></p>
<noscript><p>This page needs JavaScript; status.json, metrics and health, below, do not.</p></noscript>
<div id="figures" hidden>
<h2>Since the start</h2>
<dl id="totals"></dl>
<h2 id="services-title">Services</h2>
<table role="table" aria-labelledby="services-title">
<thead role="rowgroup"><tr role="row" id="columns"></tr></thead>
<tbody role="rowgroup" id="services"></tbody>
</table>
</div>
</main>
<footer><a href="status.json">status.json</a><a href="metrics">metrics</a><a href="health">health</a>
<span id="zone"></span></footer>
<script>
'use strict';
const EVERY = 2000, PATIENCE = 5000;  // ms: between two loads, and for one
const COLUMNS = ['Service', 'State', 'In flight', 'Requests/s', 'Latency', 'Answers', 'Failures', 'Last 10 min'];
const SVG = 'http://www.w3.org/2000/svg';
const $ = id => document.getElementById(id);
let rows = new Map(), tiles = new Map(), order = '', known = '', loaded = '', paused = false, timer = 0, offset = 0;

function put(node, text) {  // only what changed: a selection lives on
  if (node.textContent !== text) node.textContent = text;
}
function add(parent, tag, attributes = {}) {
  const space = parent.namespaceURI === SVG || tag === 'svg' ? SVG : 'http://www.w3.org/1999/xhtml';
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return parent.appendChild(node);
}
function lasting(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
function clock(unix, now) {  // as the server's clock and log have it
  const text = new Date((unix + offset) * 1000).toISOString(), today = new Date((now + offset) * 1000).toISOString();
  return (text.slice(0, 10) === today.slice(0, 10) ? '' : text.slice(0, 10) + ' ') + text.slice(11, 19);
}
function latency(seconds) {
  if (seconds === null) return ' \u2013';
  const text = seconds < 1 ? `${+(seconds * 1000).toPrecision(3)} ms` : `${seconds} s`;
  return seconds < 100 ? ` \u2264 ${text}` : ' 100 s or more';
}
function counts(by) {
  const lines = Object.entries(by).filter(pair => pair[1]).map(([name, count]) => `${name} ${count.toLocaleString()}`);
  return lines.join('\n') || 'none';
}

function make_row(service) {
  const line = add($('services'), 'tr', {role: 'row'}), cells = {line};
  for (const column of COLUMNS) cells[column] = add(line, 'td', {role: 'cell', 'data-label': column});
  for (const column of ['Service', 'State', 'In flight', 'Requests/s']) {
    const box = add(cells[column], 'div');
    cells[column] = [add(box, 'strong', column === 'State' ? {class: 'state'} : {}), add(box, 'small')];
  }
  const last = add(cells['Last 10 min'], 'div');
  const chart = add(last, 'svg', {role: 'img', viewBox: '0 0 120 24', preserveAspectRatio: 'none'});
  cells.chart = chart;
  cells.answers = add(chart, 'path', {class: 'answers'});
  cells.failed = add(chart, 'path', {class: 'failed'});
  cells.caption = add(last, 'small');
  rows.set(service.name, cells);
}
function bars(values, height, from) {
  const first = 120 - values.length;
  return values.map((value, i) => value ? `M${first + i} ${from}h1v${height(value)}h-1z` : '').join('');
}
function draw(cells, history, step) {
  const most = Math.max(1, ...history.answers), failed = history.failed.reduce((sum, count) => sum + count, 0);
  const change = (node, d) => { if (node.getAttribute('d') !== d) node.setAttribute('d', d); };
  change(cells.answers, bars(history.answers, value => -Math.max(0.5, 17 * value / most).toFixed(1), 24));
  change(cells.failed, bars(history.failed, () => 5, 0));
  const top = Math.max(0, ...history.answers) / step;
  const text = `top ${+top.toPrecision(3)} answers/s, ${failed ? failed.toLocaleString() + ' failed' : 'none failed'}`;
  put(cells.caption, text);
  cells.chart.setAttribute('aria-label', `Answers of the last ten minutes: ${text}`);
}
function show_service(service, data) {
  const cells = rows.get(service.name), stalled = service.stalled && service.state === 'up';
  const state = stalled ? 'stalled' : service.state;
  if (cells.line.className !== state) cells.line.className = state;
  put(cells['Service'][0], service.name);
  put(cells['Service'][1], `${service.address}\nprio ${service.prio}, weight ${service.weight}`);
  put(cells['State'][0], state === 'trial' ? 'on trial' : state);
  put(cells['State'][1], `${service.why}\nsince ${clock(service.since, data.time)} (${lasting(service.lasting)})`);
  put(cells['In flight'][0], `${service.in_flight} / ${service.max}`);
  put(cells['In flight'][1], (service.full === null ? '' : `full: serves ${service.full} connections\n`)
    + `${service.waiting} waiting\n${service.idle_connections} idle connections`);
  put(cells['Requests/s'][0], `${service.requests_per_second}`);
  put(cells['Requests/s'][1], service.share === null ? '' : `${(100 * service.share).toFixed(0)} % of answers`);
  put(cells['Latency'], ['p50', 'p95', 'p99'].map(name => name + latency(service[name])).join('\n'));
  put(cells['Answers'], counts(service.verdicts));
  put(cells['Failures'], counts(service.failures));
  draw(cells, service.history, data.step);
}
function show_totals(data) {
  const totals = {
    'Requests': data.requests.toLocaleString(),
    'Default actions': `${counts(data.defaults)}\nit is '${data.default}'`,
    'Clients': `${data.clients_connected} connected\n${data.clients.toLocaleString()} in all`,
    'Refused input': counts(data.refused),
    'Asked again': `next service ${data.redispatches.toLocaleString()}\n`
      + `same service ${data.retries.toLocaleString()}`,
    'Log lines lost': data.log_lines_lost.toLocaleString(),
    'Uptime': lasting(data.uptime),
  };
  for (const [name, text] of Object.entries(totals)) {
    if (!tiles.has(name)) {
      const tile = add($('totals'), 'div');
      put(add(tile, 'dt'), name);
      tiles.set(name, add(tile, 'dd'));
    }
    put(tiles.get(name), text);
  }
}
function show(data) {
  if (data.version !== 1) throw new Error('this page is of another version: load it again');
  offset = data.utc_offset;
  const names = JSON.stringify(data.services.map(service => service.name));
  if (names !== order) {
    $('services').replaceChildren();
    rows = new Map();
    data.services.forEach(make_row);
    order = names;
  }
  data.services.forEach(service => show_service(service, data));
  show_totals(data);
  put($('headline'), data.headline.text);
  if ($('headline').className !== data.headline.level) $('headline').className = data.headline.level;
  const states = JSON.stringify([data.draining, data.services.map(service => [service.state, service.stalled])]);
  if (known && states !== known) put($('told'), data.headline.text);  // said aloud when a state changes, not its age
  known = states;
  const level = {ok: 'OK', warning: 'warning', bad: 'DOWN'}[data.headline.level];
  document.title = `${level} - hapolicy`;
  put($('program'), data.program);
  put($('zone'), `times of the server, UTC${offset < 0 ? '-' : '+'}${Math.abs(offset) / 3600}`);
  $('figures').hidden = $('pause').hidden = false;
  loaded = clock(data.time, data.time);
  put($('updated'), `as of ${loaded}`);
}
function age(why) {
  const past = loaded ? `what stands below is of ${loaded}` : 'nothing was loaded yet';
  put($('old'), `No answer from the proxy: ${past}. (${why})`);
  $('old').hidden = false;
  document.body.className = 'aged';
  document.title = 'no answer - hapolicy';
}
async function load() {
  clearTimeout(timer);
  try {
    const answer = await fetch('status.json', {cache: 'no-store', signal: AbortSignal.timeout(PATIENCE)});
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const data = await answer.json();
    if (!paused) {
      show(data);
      $('old').hidden = true;
      document.body.className = '';
    }
  } catch (error) {
    if (!paused) age(error.message);
  }
  clearTimeout(timer);
  if (!paused) timer = setTimeout(load, EVERY);
}
$('pause').addEventListener('click', () => {
  paused = !paused;
  $('pause').setAttribute('aria-pressed', paused);
  clearTimeout(timer);
  put($('updated'), `${paused ? 'paused; ' : ''}as of ${loaded}`);
  if (!paused) load();
});
for (const column of COLUMNS) put(add($('columns'), 'th', {role: 'columnheader', scope: 'col'}), column);
load();
</script>
</body>
</html>
"""


if __name__ == '__main__':
    sys.exit(main())

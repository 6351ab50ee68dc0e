#!/usr/bin/env python3
"""hapolicy - policy delegation high availability proxy

Usage:
  hapolicy [options]... [--]

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
  --version               show the version, and whether the module is compiled

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
  --sticky=ATTRIBUTES     send mail with the same values to the same service, at
                          every MX: client_address/24/64,sender,recipient
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
  --name=NAME             which of several hapolicys this is: the ident in syslog,
                          the title of the status page [default: hapolicy]
  --check-services        ask each service once, print what it answered, and end

Signals:
  SIGTERM, SIGINT         stop accepting, answer what is in flight, close each
                          client between requests, end; a second one ends at once

Exit status:
  0  ended by the client, or every answer was given after a signal
  1  could not listen, or ended before every answer was given
  2  the command line cannot be used; one line on stderr says why
  With --check-services: 0 if every service answered, 1 if not
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import itertools
import math
import os
import re
import select
import signal
import socket
import stat
import sys
import time
import traceback
import warnings
import zlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import add, sub
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import gevent
import gevent.socket
from gevent.event import Event
from greenlet import getcurrent, greenlet

__version__ = '2.1.0'

# --- Constants; docs/operations.md says more of each limit -----------------------------------------------------------

MAX_MESSAGE = 65536  #: bytes of one request or answer, at most; Postfix sends under 20 kB
RECEIVE = 8192  #: bytes asked from one recv(): a usual request has 600, and 64 kB would be allocated each time

DEFAULT_PRIO, DEFAULT_WEIGHT = 10, 1
DEFAULT_TIMEOUT = 30.0  #: seconds; the ancestor's, above the 20 s that SPF servers allow themselves
DEFAULT_MAX = 100  #: requests in flight per service: Postfix's default_process_limit
CONNECT_TIMEOUT = 5.0  #: seconds to connect, of a service's timeout: two lost SYNs (1 s + 2 s) and some room

QUIET = 0.05  #: seconds of silence behind an answer that prove that no second one follows
REST_AFTER = 20  #: a connection that was used for so many times the silence that it needs, without one, rests
CHECK_AFTER = 10  #: mails sent since a service answered last, after which a check is to say whether it hangs
HOLD = 1.0  #: seconds for which a message holds the connection that answered it
SPARE_IDLE = 2.0  #: seconds an idle connection is kept while another one is open: a server may have few workers
ONCE = 60.0  #: seconds for which each connection carries one request, after a server sent more than an answer
MAX_AGE = 1000.0  #: seconds a server connection is used at most: Postfix's own smtpd_policy_service_max_ttl
GIVE_UP = 1.5  #: seconds between connections that are given up: others may wait for one of the server's few children
LOOKUP = 1.0  #: seconds that a new connection waits for the lookup of a host name; then the last address is taken

TICK = 0.1  #: seconds from one look at the running checks to the next
UNANSWERED = 1.0  #: a service is full if it answers what was sent so many seconds after a check that has no answer
UNHEARD = 30.0  #: seconds without any answer after which a service is checked, and its last idle connection closed
#: Seconds between checks of a service that is down: the first pause, the longest, the one in its first moments.
BACKOFF_FIRST, BACKOFF_MAX, SOON = 1.0, 30.0, 0.1
JITTER = 0.8 + 0.4 * os.urandom(1)[0] / 255  #: a factor of them: proxies must not check all at once
#: Mails at once at a service on trial, while no service is up; seconds that other mail waits for one of their answers.
TRIALS, TRIAL_PATIENCE = 5, 0.5
MAX_INSTANCES = 40000  #: messages whose service is remembered, and those of one second: ten minutes of a very busy site
MAX_INSTANCE = 128  #: bytes of an instance that is remembered; Postfix's have about 30

LINGER = 1.0  #: seconds without a request after which a drain closes a client at once: else the next may be under way
RESERVED, MIN_DEADLINE = 0.005, 0.1  #: seconds of --deadline reserved for the default action; the shortest --deadline
ANSWER_PART = 0.2  #: the part of --deadline in which a request no longer waits for a connection, at most
#: Seconds that a request waits for a new connection, before it takes one that another message holds; for the service
#: it was balanced to, before it may go to another one; the same with --sticky, where another greylist would defer it;
#: and before it may go to a service that a slow message has stalled.
GROWTH_PATIENCE, PATIENCE, STICKY_PATIENCE, STALLED_PATIENCE = PATIENCES = 0.08, 0.1, 1.0, 1.0
MAX_VALUE, MAX_VALUES = 320, 4096  #: bytes of an attribute that are logged and compared; values cached for --sticky

MAX_LOG_LINES, MAX_LOG_LINE = 10000, 8000  #: lines that wait for the log daemon; characters: rsyslog cuts at 8 kB, too
LOG_AGAIN = 600.0  #: seconds until it is logged again that no further clients are served

CR, SPACE = b'\r '  # numbers: `CR in data` takes a fourth of `b'\r' in data`, which tries a number first
SWITCH_TO, THROW_INTO = greenlet.switch, greenlet.throw  # called with the greenlet as first argument
READ = 1  # libev's EV_READ, as gevent's loop.io() takes it

# --- Errors ----------------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """The user's fault: the command line cannot be used. The text names option, value and what is allowed."""


class InvalidAnswer(Exception):
    """An answer that Postfix would misread, or none: the service's fault. Or such an action in an option."""


#: Why a client's connection is closed.
TOO_LONG, TOO_SLOW, CUT_OFF, NOT_TAKEN, RESET = CLIENT_FAULTS = (
    'request too long', 'request too slow', 'left in mid-request', 'answer not taken', 'reset by the client',
)


class ClientFault(Exception):
    """The client's fault: its connection is closed. Its arguments: one of CLIENT_FAULTS, and a text that says more."""


class ServiceFailure(Exception):
    """A query got no usable answer; `reason` is one of FAILURES."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        #: When the mail failed or, if it was late, was sent (monotonic seconds); -inf if it does not count (any more).
        self.at = -math.inf


class Ended(ServiceFailure):
    """Nobody's fault: a connection that had answered something ended before the end of an answer."""


class NotSent(Ended):
    """Nobody's fault: a connection that had answered something ended, or was not silent, before a request was sent."""


# --- Protocol: bytes in, requests and actions out. Grammar: Postfix's SMTPD_POLICY_README, attr_scan_plain.c ---------


EMPTY_LINE = re.compile(rb'\n\r?\n').search
#: An answer as nearly all are: one line of printable ASCII, whose action begins with no digit and no blank.
PLAIN_ANSWER = re.compile(rb'action=[!-/:-~][ -~]*\n\n').fullmatch
LINE_ENDS = b'\r\n'
CONTROLS = bytes(range(SPACE + 1)) + b'\x7f'  # and the blank
#: Control characters become '?', but for a tab.
VISIBLE = bytes(code if code in b'\t' or (code >= SPACE and code != 127) else ord('?') for code in range(256))


def end_of_message(data: bytes, start: int = 0) -> int:
    """Return the offset behind the first empty line, 0 while there is none; `start` skips what was seen before."""
    data = b'\n' + data  # an empty line may be the first. Each offset is one more now
    if CR not in data:  # nearly always: find() takes a tenth of the time
        return data.find(b'\n\n', start) + 1
    found = EMPTY_LINE(data, start)
    return found.end() - 1 if found else 0


def first_request(data: bytes) -> tuple[bytes, bytes]:
    """Return the first request, b'' while it is incomplete, and the bytes that are left over. Raises ClientFault."""
    data = data.lstrip(LINE_ENDS)  # empty lines before a request are skipped
    end = end_of_message(data)
    if (end or len(data)) > MAX_MESSAGE:
        raise ClientFault(TOO_LONG, f'no end of a request within {MAX_MESSAGE} bytes')
    return data[:end], data[end:].lstrip(LINE_ENDS)


def attribute(request: bytes, name: bytes) -> bytes:
    """Return the first value of an attribute, b'' if it is absent: 0.5 us against 7 us for a dict of all."""
    return (b'\n' + request).partition(b'\n' + name + b'=')[2].partition(b'\n')[0].removesuffix(b'\r')


def instance_of(request: bytes) -> bytes | None:
    """Return the instance of a policy request, b'' without one or one too long to remember; None of another request."""
    if request[:28] == b'request=smtpd_access_policy\n':  # as Postfix sends it: a third of the cost of what follows
        instance = request.partition(b'\ninstance=')[2].partition(b'\n')[0]
    elif attribute(request, b'request') == b'smtpd_access_policy':
        instance = attribute(request, b'instance')
    else:
        return None
    return instance if len(instance) <= MAX_INSTANCE else b''


def clean_action(action: bytes) -> bytes:
    """Return the action as Postfix is to get it: no surrounding blanks, and '?' for what is not printable UTF-8.

    Raises InvalidAnswer for an empty action and a bare number: Postfix would permit the mail (smtpd_check.c,
    check_table_result). Bytes that are not UTF-8 would make Postfix use its own default action. A control character
    that ends the first word becomes a blank: '?' would make another word of it, and Postfix reads up to a NUL only.
    """
    action = re.sub(rb'^([^\0- \x7f]+)[\0-\x08\n-\x1f\x7f]', rb'\1 ', action.strip(CONTROLS))
    if not action:
        raise InvalidAnswer('an empty action')
    if action.isdigit():
        raise InvalidAnswer(f'the bare number {action[:40].decode()} as action')
    return action.translate(VISIBLE).decode('utf-8', 'replace').replace('\ufffd', '?').encode()


def parse_answer(data: bytes, closed: bool = False, start: int = 0) -> tuple[bytes, bool] | None:
    """Return the action of an answer and whether more than an answer came, or None while it is incomplete.

    Read as Postfix reads it: other lines are skipped, the first `action` counts. LF or CRLF. Empty lines behind an
    answer do not count. `closed`: nothing will follow; `start` skips what was seen before. Raises InvalidAnswer.
    """
    if len(data) > MAX_MESSAGE:
        raise InvalidAnswer(f'an answer over {MAX_MESSAGE} bytes')
    end = end_of_message(data, start)
    if not end and not closed:
        return None
    for line in data[: end or data.rfind(b'\n') + 1].split(b'\n'):
        if line.startswith(b'action='):
            return clean_action(line[7:]), end > 0 and data[end:].strip(LINE_ENDS) != b''
        if line == b'action':
            raise InvalidAnswer('an action without a value')
    if end:
        raise InvalidAnswer('an answer without an action')
    return None


# --- Services and balancing: no I/O, `now` (monotonic seconds) is an argument ----------------------------------------

#: Why a query failed. JUDGED are faults of the service; the others say nothing of it.
REFUSED, UNREACHABLE, LATE, INVALID, DROPPED = JUDGED = ('refused', 'unreachable', 'timeout', 'invalid', 'dropped')
DEADLINE, DESCRIPTORS, INTERNAL = 'deadline', 'descriptors', 'internal'
FAILURES = (*JUDGED, DEADLINE, DESCRIPTORS, INTERNAL)

UP, TRIAL, DOWN = 'up', 'trial', 'down'


class Address(NamedTuple):
    """Where to connect or listen: a unix socket's path (port 0), or a host and a port."""

    family: int  # AF_UNSPEC: a name, to be resolved
    host: str
    port: int

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return f'unix:{self.host}'
        return f'[{self.host}]:{self.port}' if self.family == socket.AF_INET6 else f'{self.host}:{self.port}'


@contextlib.contextmanager
def blaming(what: str, allowed: str = '') -> Iterator[None]:
    """Put the option or the descriptor at fault before the text of an error. Raises UsageError, OSError."""
    try:
        yield
    except (UsageError, InvalidAnswer) as error:
        raise UsageError(f'{what}: {error}; allowed is {allowed}') from None
    except OSError as fault:  # not `error` again: mypyc gives a name in a generator one type
        # create_server() names the address again
        raise OSError(f'{what}: {(fault.strerror or str(fault)).partition(" (while")[0]}') from None


def parse_number(text: str, what: str, low: int, high: int) -> int:
    """Return a whole number of ASCII digits in low..high. Raises UsageError."""
    if not (text.isascii() and text.isdigit() and len(text) < 11 and low <= int(text) <= high):
        raise UsageError(f"{what} '{text}' is not a whole number from {low} to {high}")
    return int(text)


def parse_seconds(text: str, what: str, low: float = 0.001) -> float:
    """Return a time in seconds, a day at most. Raises UsageError."""
    if not (text.isascii() and text.replace('.', '', 1).isdigit() and low <= float(text) <= 86400):
        raise UsageError(f"{what} '{text}' is not a number of seconds from {low:g} to 86400")
    return float(text)


def parse_host(host: str) -> tuple[int, str]:
    """Return the family of a host as it is written, and the host without brackets. Raises UsageError."""
    in_brackets = re.fullmatch(r'\[([^%]*)(%[A-Za-z0-9._-]+)?\]', host)
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(socket.AF_INET6 if in_brackets else socket.AF_INET, in_brackets[1] if in_brackets else host)
        return (socket.AF_INET6, host[1:-1]) if in_brackets else (socket.AF_INET, host)
    if re.fullmatch(r'(?![0-9.]*$)(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?', host) and len(host) < 254:
        return socket.AF_UNSPEC, host
    raise UsageError(f"address '{host}' is not of an allowed form")


def parse_address(text: str) -> tuple[Address, list[str]]:
    """Return the address at the head of `text`, and the fields behind it. Raises UsageError."""
    separator = ':' if text.startswith('unix:') else r':(?![^[]*\])'  # no colon in brackets
    host, port, *fields = [*re.split(separator, text), '']
    if host == 'unix':
        if not port.startswith('/') or len(os.fsencode(port)) > 107 or '\0' in port:
            raise UsageError(f"unix socket '{port}' is not an absolute path of at most 107 bytes")
        return Address(socket.AF_UNIX, port, 0), fields
    return Address(*parse_host(host), parse_number(port, 'port', 1, 65535)), fields


class Settings:
    """What the options say of one policy server, and the counters of its queries."""

    def __init__(self, name: str, address: Address, prio: int = DEFAULT_PRIO, weight: int = DEFAULT_WEIGHT,
                 timeout: float = DEFAULT_TIMEOUT, maximum: int = DEFAULT_MAX) -> None:  # fmt: skip
        self.name, self.address, self.prio, self.weight = name, address, prio, weight
        self.timeout = timeout  # seconds for a whole query
        self.max = maximum  # connections and checks at once
        self.fall = 2  # failed mails in a row that take it down while another service is up
        self.stall = 5.0  # seconds without an answer to mail in flight, after which it is stalled
        self.queries = 0
        self.failures = dict.fromkeys(FAILURES, 0)
        self.tally = Tally()

    def __str__(self) -> str:
        return f'[{self.name}] ({self.address})'  # as each line of the log names it

    @property
    def answers(self) -> int:
        """Queries that were answered."""
        return sum(self.tally.verdicts.values())

    @property
    def failed(self) -> int:
        """Queries that got no usable answer."""
        return sum(self.failures.values())


class Service(Settings):
    """One policy server: its settings, its counters, and whether it is up.

    UP takes mail; DOWN takes none until a check passes; TRIAL takes a few mails at a time until one is answered.
    """

    state = UP
    why = 'never down'
    blamed = False  #: mail took it down, or put it on trial: only an answered mail makes it up again
    in_a_row = 0  #: failed mails that count, none answered between them
    full_logged = 0  #: how many connections it served when it was found full, the greatest number that was logged
    # monotonic seconds
    since = 0.0  #: when it came up, or ceased to be up
    answered_at = 0.0  #: when mail was answered last
    checked_at = 0.0  #: when a check was answered last
    failed_at = 0.0  #: when mail failed last
    late_at = 0.0  #: when a check had no answer in time while it was down
    closed_at = 0.0  #: when a connection that had answered something was closed last
    newest = 0.0  #: when the youngest answered request was sent, a mail or a check

    #: Is called with the service, a text for the log and `now` when the state changes.
    changed: Callable[[Service, str, float], None] = staticmethod(lambda service, text, now: None)

    @property
    def heard_at(self) -> float:
        """When it answered last (monotonic seconds)."""
        return max(self.answered_at, self.checked_at)

    def check_answered(self, since: float, now: float) -> None:
        """Record an answer to a check that began at `since`."""
        self.checked_at, self.newest = now, max(self.newest, since)

    def check_passed(self, now: float) -> None:
        """Record that a check passed: a service that was down is up, or on trial if mail took it down."""
        if self.state is DOWN:
            self.turn(TRIAL if self.blamed else UP, 'its check passed', now)

    def answered(self, action: bytes, since: float, current: bool, now: float) -> None:
        """Count an answer to a mail that was sent at `since`; if not `current`, the service went down meanwhile."""
        tally, seconds = self.tally, now - since
        tally.answered[bisect_left(BOUNDS, seconds)] += 1
        tally.verdicts[verdict(action.partition(b' ')[0])] += 1
        tally.sum += seconds
        tally.mean = seconds if tally.mean == math.inf else (tally.mean + seconds) / 2
        if current:
            self.answered_at, self.in_a_row = now, 0
            if since > self.newest:
                self.newest = since
            if self.state is not UP:
                self.blamed = False
                self.turn(UP, 'mail was answered', now)

    def blame(self, failure: ServiceFailure, alone: bool, now: float) -> None:
        """Count a mail that was late, or that failed otherwise and was answered elsewhere: else it may be at fault.

        Too many in a row take the service down. If it is the last one that is up, late ones put it on trial.
        """
        reasons = (LATE,) if alone else (LATE, DROPPED, INVALID)  # a check judges refusals
        counts = failure.reason in reasons and failure.at >= max(self.answered_at, self.since)  # else answered since
        if counts and (self.state is UP or (self.state is TRIAL and not alone)):
            failure.at, self.in_a_row = -math.inf, self.in_a_row + 1  # a failure counts once
            if self.in_a_row >= self.fall or self.state is TRIAL:
                self.blamed, state = True, TRIAL if alone else DOWN
                self.turn(state, f'mail failed {self.in_a_row} times in a row, the last: {failure.reason}', now)

    def turn(self, state: str, why: str, now: float) -> None:
        """Change the state, and report it."""
        lasted = f' ({UP if self.state is UP else DOWN} for {now - self.since:.1f}s)' if self.since else ''
        if UP in (state, self.state):  # down, and then on trial, is one outage with one beginning
            self.since = now
        if state is not TRIAL or self.state is UP:  # a trial after an outage keeps the reason of the outage
            self.why = why
        if state is DOWN:
            self.tally.last_failure = now, why
        self.state, self.in_a_row = state, 0
        self.changed(self, f'{self} is {"on " if state is TRIAL else ""}{state}: {why}{lasted}', now)


def parse_service(text: str) -> Service:
    """Return the service of a -s option. Raises UsageError."""
    name, _, rest = text.partition('=')
    allowed = '<name>=<IPv4, [IPv6] or name>:<port>[:<prio>[:<weight>[:<timeout>[:<max>]]]] or <name>=unix:/path[:...]'
    with blaming(f"--service '{text}'", allowed):
        if not name.strip() or not name.isprintable() or len(name) > 64:
            raise UsageError(f"the name '{name}' is not 1 to 64 printable characters")
        address, fields = parse_address(rest)
        if any(fields[4:]):
            raise UsageError(f"'{':'.join(fields[4:]).rstrip(':')}' is one field too many")
        prio, weight, timeout, maximum = (fields + [''] * 4)[:4]
        return Service(name, address,
                       parse_number(prio, 'prio', 1, 10**9) if prio else DEFAULT_PRIO,
                       parse_number(weight, 'weight', 1, 256) if weight else DEFAULT_WEIGHT,  # 256: HAProxy's
                       parse_seconds(timeout, 'timeout') if timeout else DEFAULT_TIMEOUT,
                       parse_number(maximum, 'max', 1, 10**6) if maximum else DEFAULT_MAX)  # fmt: skip


def one_cycle(pools: Sequence[Pool], turns: int) -> Iterator[Pool]:
    """Yield so many turns, to each pool as its service's weight says: smooth weighted round robin (as nginx's)."""
    total = sum(pool.service.weight for pool in pools)
    credit = dict.fromkeys(pools, 0)
    for _ in range(turns):
        for pool in pools:
            credit[pool] += pool.service.weight
        richest = max(pools, key=credit.__getitem__)
        credit[richest] -= total
        yield richest


#: Removes from a sender what postgrey removes, as it differs from mail to mail: a BATV tag, an extension, numbers.
without_tags = functools.partial(re.compile(rb'^prvs=\w{10}=|\+[^@]*|\b\d+\b(?=[^@]*@)').sub, b'')
#: The hash of a key and a name is a product modulo this prime, so that it is in 1 to PRIME - 1 as its factors are.
PRIME = 2**61 - 1


def network(ipv4: int, ipv6: int, address: bytes) -> bytes:
    """Return the network of an address, by the prefix length of its family; or the value if it is no address."""
    family, ignored = (socket.AF_INET6, 128 - ipv6) if b':' in address else (socket.AF_INET, 32 - ipv4)
    try:
        return b'%x ' % (int.from_bytes(socket.inet_pton(family, address.decode('latin-1')), 'big') >> ignored)
    except (OSError, ValueError):
        return address


# the part of each score that does not change: Sticky.order() would work it out anew for each key
@functools.cache
def name_hash(name: str) -> int:
    return (zlib.crc32(name.encode()) + 1) ** 3


class Sticky:
    """Orders the services for each mail, the same way at each proxy: by a key made of some attributes.

    Weighted rendezvous hashing: each service has a score for each key, and the greatest score wins.
    """

    def __init__(self, text: str, attributes: list[tuple[bytes, Callable[[bytes], bytes]]]) -> None:
        """Take the option's text, and of each attribute its name and a function that returns the part that counts."""
        self._text, self._attributes = text, attributes

    def __str__(self) -> str:
        return self._text

    def key(self, request: bytes) -> bytes:
        """Return the key of a mail, which is the same each time the mail is tried; b'' if all attributes are empty."""
        return b''.join([part_of(attribute(request, name)[:MAX_VALUE]) for name, part_of in self._attributes]).lower()

    @staticmethod
    def order(key: bytes, pools: Iterable[Pool]) -> list[Pool]:
        """Return the pools in the order of a key, the best first: by the key, the names and the weights alone."""
        number = (zlib.crc32(key) + 1) ** 2  # CRC-32 is linear: without a power similar keys have similar scores

        def score(pool: Pool) -> float:
            return math.log(number * name_hash(pool.service.name) % PRIME / PRIME) / pool.service.weight

        return sorted(pools, key=score, reverse=True)


class Balancer:
    """Chooses a service for each request: affinity by instance, then prio, then weight.

    Each change of a state makes the cycles anew: shares are exact over a cycle, and a service returns without a burst.
    """

    def __init__(self, pools: Iterable[Pool]) -> None:
        self.pools = sorted(pools, key=lambda pool: pool.service.prio)
        self.up = 0  # services that are up
        self.sticky: Sticky | None = None  #: makes the key of each request, if there is one
        #: For each prio: returns the turns of one cycle, from where it stopped last; and the pools for Sticky.order().
        self._rounds: list[tuple[Callable[[], Iterator[Pool]], list[Pool]]] = []
        #: By instance, the pool that the other requests of a message go to, too; the longest known message first.
        self.bound: dict[bytes, Pool] = {}
        self.update()

    def update(self) -> None:
        """Work out how many mails each service may have at once, and the cycles: a service changed its state.

        A service on trial may have one mail, or TRIALS while no service is up. While no service is up, this also holds
        for a service that hung up on its check, or answered it wrongly: perhaps it answers mail, but no checks.
        """
        self.up = sum(pool.service.state is UP for pool in self.pools)
        for pool in self.pools:
            service = pool.service
            pool.places = service.max if service.state is UP else min(1 if self.up else TRIALS, service.max)
            if service.state is DOWN and (self.up or pool.checker.reason not in (DROPPED, INVALID)):
                pool.places = 0
        self._rounds = []
        for prio in sorted({pool.service.prio for pool in self.pools if pool.places}):
            pools = [pool for pool in self.pools if pool.places and pool.service.prio == prio]
            weights = [pool.service.weight for pool in pools]
            number = sum(weights) // math.gcd(*weights)
            turns = itertools.cycle(one_cycle(pools, number))  # as they come: all of 100 services would take 0.3 s
            self._rounds.append((functools.partial(itertools.islice, turns, number), pools))

    def alone(self, service: Service) -> bool:
        """Return whether no other service is up."""
        return self.up == (service.state is UP)

    def choose(self, instance: bytes, tried: Collection[Pool], now: float, key: bytes = b'') -> Pool | None:
        """Return the pool that a request is to have a connection of; None if it may wait for any.

        With a key: the first pool in its order that is ready. If none is ready, the first one: a connection that
        becomes free at another service first is of no use.
        """
        bound = None if key else self.bound.get(instance)  # an empty instance is not in the table
        if bound is not None and bound.places and bound not in tried and not bound.stalled(now):
            return bound
        for turns, pools in self._rounds:
            first_up: Pool | None = None
            looked = {*tried}  # a cycle may have many turns
            for pool in Sticky.order(key, pools) if key else turns():
                # a mail that failed elsewhere is no trial: a second one that fails would take the rest of its time
                if pool in looked or (tried and self.up and pool.service.state is TRIAL):
                    continue
                # the first condition saves the call, nearly always under load; so it does in the next line
                if now - pool.service.answered_at <= QUIET or not pool.stalled(now, key):
                    if (pool.idle and len(pool.busy) < pool.places) or pool.ready(now, key):
                        return pool
                    first_up = first_up or (pool if pool.service.state is UP else None)
                looked.add(pool)
            if first_up is not None:  # the next prio is for requests that have waited
                return first_up if key else None
        return None

    def candidates(self, first: Pool | None, tried: Collection[Pool], waited: float, now: float,
                   key: bytes = b'') -> list[Pool]:  # fmt: skip
        """Return the pools that a request may wait for, the best first, after it has waited for so many seconds.

        For PATIENCE it waits for `first`, which was chosen for it, so that shares hold, else for all of the best prio;
        with a key for one pool, for STICKY_PATIENCE. Then it may wait for all pools, after STALLED_PATIENCE for stalled
        ones, too. If none admits it, it may wait for a check that has just begun, or begins now: one may be back.
        """
        pools = sorted(Sticky.order(key, self.pools) if key else self.pools, key=lambda pool: pool.service.prio)
        left = [pool for pool in pools if pool not in tried]
        if tried and any(pool.service.state is UP for pool in left):
            left = [pool for pool in left if pool.service.state is not TRIAL]  # as choose() says
        admitting = [pool for pool in left if pool.admits(waited, now)]
        if not admitting and (self.up or any(pool.checker.restarts(now) for pool in pools)):
            admitting = [pool for pool in left if 0 <= now - asked_first(pool.checker.running) < TRIAL_PATIENCE
                         or (pool.service.state is DOWN and pool.checker.growing(now, 0))]  # fmt: skip
        active = [pool for pool in admitting if waited >= STALLED_PATIENCE or not pool.stalled(now, key)] or admitting
        if waited >= (STICKY_PATIENCE if key else PATIENCE):
            return active
        if first in active:
            return [first]
        return active[:1] if key else [pool for pool in active if pool.service.prio == active[0].service.prio]

    def forget(self) -> None:
        """Forget the older half of the messages, once there are too many."""
        if len(self.bound) >= MAX_INSTANCES:
            self.bound = dict(itertools.islice(self.bound.items(), len(self.bound) - MAX_INSTANCES // 2, None))


# --- Statistics and log lines ----------------------------------------------------------------------------------------

COUNTERS = ('requests', 'answers', 'redispatches', 'retries', 'clients')  #: the proxy's, as log and status name them
#: Why a default action was given.
NO_SERVICE, ALL_FAILED, OUT_OF_TIME, NOT_POLICY = 'no service is up', 'all services failed', 'deadline', 'not a request'

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6
LEVELS = {ERROR: 'error', WARNING: 'warning', NOTICE: 'notice', INFO: 'info'}
#: The beginning of a line on stdout or stderr, to be formatted with the line's level: systemd reads it (sd-daemon(3)).
MARK = '<{}>' if 'JOURNAL_STREAM' in os.environ else ''
SILENT = 1.0  #: seconds without an answer to mail in flight, after which log and status call a service silent
Line: TypeAlias = 'tuple[int, str]'  #: severity and text of a line for the log
#: What a request got: the action, the service that was asked last, how many services were asked, and why.
Decision: TypeAlias = 'tuple[bytes, Service | None, int, str]'

#: What an action does to a mail, for counting; and by the words of access(5), but for reply codes and restrictions.
OK, REJECT, DEFER, PREPEND, OTHER = VERDICTS = ('ok', 'reject', 'defer', 'prepend', 'other')
VERDICT_OF = {b'dunno': OK, b'ok': OK, b'permit': OK, b'reject': REJECT, b'defer': DEFER, b'defer_if_permit': DEFER,
              b'defer_if_reject': DEFER, b'prepend': PREPEND,
              **dict.fromkeys(b'bcc discard filter hold info redirect relay warn'.split(), OTHER)}  # fmt: skip


@functools.lru_cache(100)
def verdict(action: bytes) -> str:
    """Return which of VERDICTS an action is; a reply code counts as its class (access(5))."""
    word = action.split(None, 1)[0].lower()
    if re.match(rb'[45][0-9][0-9](\.|$)', word):
        return DEFER if word.startswith(b'4') else REJECT
    return VERDICT_OF.get(word, OTHER)


STEPS = (1, 1.25, 1.6, 2, 2.5, 3.15, 4, 5, 6.3, 8)  # ISO 3's R10, with 1-2-5 among them
#: Upper bounds of the steps of a histogram in seconds, 0.1 ms to 100 s and for ever.
BOUNDS = (*(step * 10.0**power for power in range(-4, 2) for step in STEPS), 100.0, math.inf)


class Tally:
    """What became of a service's queries: how long they took, as histograms, and what its answers do to the mail."""

    def __init__(self) -> None:
        self.answered, self.failed = [0] * len(BOUNDS), [0] * len(BOUNDS)  # queries with and without an answer, by step
        self.verdicts = dict.fromkeys(VERDICTS, 0)
        self.sum = 0.0  # seconds of all answers
        self.mean = math.inf  # seconds of an answer lately: each new one counts as much as all before it
        self.last_failure: tuple[float, str] | None = None  # when the service failed (monotonic seconds), and why


def quantiles(counts: Iterable[int], pool: Pool, now: float) -> dict[str, float | None]:
    """Return p50, p95 and p99 in seconds, each one of BOUNDS (100 s for longer times, too); None for no query.

    Of `counts`, queries by step, and of the queries in flight, with their time so far.
    """
    counts = [*counts]
    for query in pool.busy:
        counts[bisect_left(BOUNDS, now - query.since)] += 1
    seen, bounds = [*itertools.accumulate(counts)], (*BOUNDS[:-1], 100.0)
    return {f'p{part}': bounds[bisect_left(seen, part / 100 * seen[-1])] if seen[-1] else None for part in (50, 95, 99)}


class Statistics:
    """The proxy's counters: a number for each of COUNTERS, and two counters by reason."""

    def __init__(self, services: Iterable[Service]) -> None:
        self._services = services
        self.requests = self.redispatches = self.retries = self.clients = 0
        self.defaults = dict.fromkeys((NO_SERVICE, ALL_FAILED, OUT_OF_TIME, NOT_POLICY), 0)
        self.refused = dict.fromkeys(CLIENT_FAULTS, 0)

    @property
    def answers(self) -> int:
        """Requests that a service answered."""
        return sum(service.answers for service in self._services)

    def __str__(self) -> str:
        counted = [f'{name}: {getattr(self, name)}' for name in COUNTERS]
        return ', '.join([*counted, f'defaults: {sum(self.defaults.values())}'])


#: Counters at one time. Under None: monotonic seconds, requests, answers, default actions. Under each service: answers,
#: failures, and both by step of the histogram.
Counts: TypeAlias = 'dict[Service | None, list[Any]]'


def sample(proxy: Proxy) -> Counts:
    """Return the counters as they are now."""
    counted = proxy.statistics
    counts: Counts = {None: [time.monotonic(), counted.requests, counted.answers, sum(counted.defaults.values())]}
    for service in proxy.pools:
        counts[service] = [service.answers, service.failed, *map(add, service.tally.answered, service.tally.failed)]
    return counts


def difference(new: Counts, old: Counts) -> Counts:
    """Return what was counted between two samples."""
    return {key: [*map(sub, counted, old[key])] for key, counted in new.items()}


def summary(proxy: Proxy, since: Counts) -> str:
    """Return a log line about the counters `since` then and the requests that wait now; '' if there are none."""
    now, slowest = time.monotonic(), []
    for service, pool in proxy.pools.items():
        p99, silent = quantiles(since[service][2:], pool, now)['p99'], proxy.silence(pool, now)
        silence = f' (silent for {duration(silent)})' if silent >= SILENT else ''
        slowest.append(f'{service.name} {duration(p99)}{silence}')
    (seconds, requests, answers, given), waits = since[None], proxy.waits(now)
    return (f'summary of {seconds:.0f}s, requests: {requests}, answers: {answers}, defaults: {given}, '
            f'failures: {sum(since[service][1] for service in proxy.pools)}, in flight: {len(waits)}, '
            f'oldest: {duration(max(waits, default=None))}, p99: {", ".join(slowest)}'
            if requests or waits else '')  # fmt: skip


def duration(seconds: float | None) -> str:
    """Return a time as a person says it: '6.3 ms', '12.3 s', '3 min', '26 h', '4 d'; '-' for none."""
    if seconds is None:
        return '-'
    for size, unit in (86400, 'd'), (3600, 'h'), (60, 'min'):
        if seconds >= 2 * size:
            return f'{seconds // size:.0f} {unit}'
    return f'{seconds:.3g} s' if seconds >= 1 else f'{seconds * 1000:.3g} ms'


def printable(value: object) -> str:
    """Return a value as one line of text without control characters, whatever bytes it holds."""
    text = value.decode('utf-8', 'backslashreplace') if isinstance(value, bytes) else str(value)
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


#: The attributes of a request that -l logs, in the ancestor's order.
LOGGED = b'client_name client_address helo_name sender recipient instance'.split()


def request_line(decision: Decision, request: bytes, delay: float) -> str:
    """Return the line of -l: the ancestor's fields, then ours. Blanks in values are escaped: none forges a field."""
    action, service, tries, why = decision
    asked = (('[-] (-)', '-', '-', '-', '-', '-') if service is None else
             (service, service.prio, service.weight, service.queries, service.answers, service.failed))  # fmt: skip
    head = '%s, prio: %s, weight: %s, queries: %s, answers: %s, failed: %s' % asked
    *values, instance = [attribute(request, name).replace(b' ', rb'\x20')[:MAX_VALUE] for name in LOGGED]
    tail = b"client: %b[%b], helo: <%b>, from: <%b>, to: <%b>, action: '%b', instance: %b" % (*values, action, instance)
    return f'{head}, delay: {delay:.3f}s, {printable(tail)}, tries: {tries}, why: {why}'


class Log:
    """A bounded queue of lines and the greenlet that writes them: logging never delays an answer.

    Lines go to syslog as syslog(3) sends them: facility mail, ident[pid]. Lines that it refuses go to a descriptor.
    """

    PATH = '/dev/log'

    def __init__(self, ident: str = '', fd: int = -1, requests: bool = False, verbose: bool = False) -> None:
        self.requests, self.verbose = requests or verbose, verbose
        self.lost = 0
        self._ident, self._fd = ident, fd  # '' and -1: nothing goes there
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._lines: list[Line] = []
        self._more = Event()
        gevent.spawn(self._write)

    def __call__(self, level: int, text: str) -> None:
        """Queue a line, or drop and count it."""
        if len(self._lines) < MAX_LOG_LINES:
            self._lines.append((level, text if len(text) <= MAX_LOG_LINE else text[:MAX_LOG_LINE] + '...'))
            self._more.set()
        else:
            self.lost += 1

    def _write(self) -> None:
        reported = 0
        while self._more.wait():
            lines, self._lines = self._lines, []
            with contextlib.suppress(Exception):  # it cannot be written, or no thread be started: the log goes on
                if self._ident:
                    lines = self.to_syslog(lines)
                if self._fd >= 0:
                    self._to_descriptor(lines)
                    lines = []
            self.lost += len(lines)
            if not lines and self.lost > reported:
                self._lines.append((WARNING, f'{self.lost - reported} log lines were lost'))
                reported = self.lost
            if not self._lines:
                self._more.clear()

    def to_syslog(self, lines: list[Line]) -> list[Line]:
        """Send lines; return those that syslog does not take."""
        head = f'>{time.strftime("%b %e %H:%M:%S")} {self._ident}[{os.getpid()}]: '
        return [(level, text) for level, text in lines
                if not self._send(f'<{2 << 3 | level}{head}{text}'.encode('utf-8', 'backslashreplace'))]  # fmt: skip

    def _send(self, line: bytes) -> bool:
        for kind in None, socket.SOCK_DGRAM, socket.SOCK_STREAM:  # the daemon may have restarted, or read a stream
            try:
                if kind:
                    self._socket = connect(socket.AF_UNIX, self.PATH, 1, kind)
                    self._socket.settimeout(1)
                self._socket.sendall(line + b'\0' if self._socket.type == socket.SOCK_STREAM else line)
                return True
            except OSError as error:
                if isinstance(error, (TimeoutError, FileNotFoundError)):  # it hangs, and a second has gone; or is none
                    break
        return False

    def _to_descriptor(self, lines: list[Line]) -> None:
        texts = [f'{MARK.format(level)}[LOG {LEVELS[level]}]: {text}\n' for level, text in lines]
        data = ''.join(texts).encode('utf-8', 'backslashreplace')
        while data:  # in a thread, as the reader may stop reading
            data = data[gevent.get_hub().threadpool.apply(os.write, (self._fd, data)) :]

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        with contextlib.suppress(TimeoutError), gevent.Timeout(1, TimeoutError()):
            while self._more.is_set():
                gevent.sleep(0.005)


# --- Connections, checks and the queue -------------------------------------------------------------------------------


class Wire:
    """A stream socket that waits first and then receives.

    A recv() before data is there costs a failed system call, an exception and two changes of the epoll set. With a read
    watcher that stays registered, receiving takes a third of the time. Data that nobody waits for calls unexpected().
    """

    __slots__ = ('_hub', '_recv', '_send', '_waits', '_watcher', 'socket', 'user')

    _recv: Callable[..., bytes]

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that died sends no end
        self.socket = sock
        # the methods of the plain socket inside gevent's, which never wait, save 0.3 us a call
        plain: Any = getattr(sock, '_sock', sock)
        self._recv, self._send = plain.recv, plain.send
        self._hub = gevent.get_hub()
        self.user = getcurrent()  #: the greenlet that receives: to ask for it at each receive() would cost 0.1 us
        self._waits = False
        self._watcher: Any = self._hub.loop.io(sock.fileno(), READ)
        self.watch()

    def _readable(self) -> None:
        if self._waits:
            SWITCH_TO(self.user)
        else:
            self.unexpected()

    def unexpected(self) -> None:
        """Called in the hub when there is something to receive and nobody waits for it: must not block."""
        raise NotImplementedError

    def pause(self) -> None:
        """Leave what comes in the kernel, the peer's end, too; call watch() before the next receive()."""
        self._watcher.stop()

    def watch(self) -> None:
        """End a pause."""
        self._watcher.start(self._readable)

    def receive(self) -> bytes | None:
        """Sleep until there is something to receive; return it, None at the end or a reset, b'' if woken early."""
        self._waits = True
        try:
            SWITCH_TO(self._hub)
        finally:
            self._waits = False
        recv = self._recv  # faster than self._recv(), which is looked up as a method first
        try:
            return recv(RECEIVE) or None
        except BlockingIOError:
            return b''
        except OSError:
            return None

    def send(self, data: bytes) -> bytes:
        """Send what the kernel takes now; return the rest. Raises OSError."""
        send = self._send
        try:
            return data[send(data) :]
        except BlockingIOError:
            return data

    def close(self) -> None:
        """Close the socket and free its watcher; to call it again does no harm."""
        self._watcher.close()
        self.socket.close()


def connect(family: int, where: Any, seconds: float = CONNECT_TIMEOUT, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket connected to a path or a numeric address, within so many seconds. Raises OSError."""
    sock = socket.socket(family, kind)
    sock.settimeout(0 if family == socket.AF_UNIX else None)
    try:
        with gevent.Timeout(seconds, TimeoutError('timed out')):
            while True:
                try:
                    sock.connect(where)
                    return sock
                except BlockingIOError:  # a unix socket's backlog is full, and no event says when it has room
                    gevent.sleep(0.01)
    except BaseException:
        sock.close()
        raise


def connect_failure(error: OSError, family: int) -> ServiceFailure:
    """Return the failure that an error in connecting stands for: the one place where errno is judged."""
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
        return ServiceFailure(REFUSED, str(error.strerror).lower())
    if isinstance(error, TimeoutError):
        return ServiceFailure(LATE, 'no connection in time')
    if isinstance(error, ConnectionError):
        return ServiceFailure(DROPPED, 'it hung up at once')
    no_port = error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET  # of IPv6: this host has none
    if no_port or error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return ServiceFailure(DESCRIPTORS, error.strerror or str(error))
    return ServiceFailure(UNREACHABLE, error.strerror or str(error))


class Connector:
    """Connects to a service's address. If a host name has several, the address that failed last is tried last.

    A name is looked up for each new connection. While the lookup fails, the last known addresses are used. One lookup
    runs at a time: a name server that hangs keeps one of gevent's threads busy for each name, not all.
    """

    def __init__(self, address: Address, seconds: float, report: Callable[[str], None]) -> None:
        family, host, port = address
        self._address, self._seconds, self._report = address, seconds, report
        self._named = family == socket.AF_UNSPEC or (family == socket.AF_INET6 and '%' in host)
        where: Any = host if family == socket.AF_UNIX else (host, port)
        #: Families and socket addresses, the next to try first.
        self._known: list[tuple[int, Any]] = [] if self._named else [(family, where)]
        self._trouble = ''  # why the last lookup failed
        self._lookup: Any = None
        self._began = self._changed = 0.0  # when the lookup began, and when the first address was changed last

    def _look_up(self) -> None:
        trouble = ''
        try:
            found = socket.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
            known = [(family, where) for family, _, _, _, where in found]
            self._known = sorted(known, key=lambda each: self._known.index(each) if each in self._known else -1)
        except (OSError, UnicodeError) as error:  # UnicodeError: from the idna codec
            trouble = getattr(error, 'strerror', None) or str(error)
        if trouble != self._trouble and self._known:
            self._report(f'host name: {trouble}; asking where it was last' if trouble else 'host name: found again')
        self._trouble = trouble

    def connect(self) -> socket.socket:
        """Return a socket connected to the first address that takes it. Raises ServiceFailure."""
        now = time.monotonic()
        if self._named:
            if self._lookup is None or self._lookup.ready():
                self._lookup, self._began = gevent.spawn(self._look_up), now
            self._lookup.join(max(0.0, self._began + LOOKUP - now))
        failure = OSError(errno.EHOSTUNREACH, self._trouble or 'it is not looked up in time')
        for address in list(self._known):
            try:
                return connect(*address, self._seconds / len(self._known))
            except (OSError, gevent.Timeout, gevent.GreenletExit) as error:
                if self._known[:1] == [address]:
                    self.rotate(math.inf)
                if not isinstance(error, OSError):  # the query has timed out, or the check was stopped
                    raise
                # a timeout is reported rather than a refusal: that address may be well, and only slow
                failure = failure if isinstance(failure, TimeoutError) else error
        raise connect_failure(failure, self._address.family)

    def rotate(self, since: float) -> None:
        """Make the next address the first: what began at `since` failed at the first one, if that did not change."""
        if since > self._changed:
            self._known, self._changed = self._known[1:] + self._known[:1], time.monotonic()


#: What Postfix asks in smtpd_client_restrictions, with all attributes of Postfix 3.12. Without sender and recipient a
#: server has nothing to remember or to count; 127.0.0.1 is an address that no server looks up.
CHECK = (b'request=smtpd_access_policy\nprotocol_state=CONNECT\nprotocol_name=SMTP\nclient_address=127.0.0.1\n'
         b'client_name=localhost\nclient_port=0\nreverse_client_name=localhost\nserver_address=127.0.0.1\n'
         b'server_port=25\nhelo_name=\nsender=\nrecipient=\nrecipient_count=0\nqueue_id=\ninstance=\nsize=0\n'
         b'etrn_domain=\nstress=\nsasl_method=\nsasl_username=\nsasl_sender=\nccert_subject=\nccert_issuer=\n'
         b'ccert_fingerprint=\nccert_pubkey_fingerprint=\nencryption_protocol=\nencryption_cipher=\n'
         b'encryption_keysize=0\ntls_sni=\npolicy_context=\ncompatibility_level=3.6\nmail_version=3.12\n\n')
#: What may come behind an answer: the end of the connection, or more bytes.
ENDED, SURPLUS = 'ended', 'surplus'
#: How connections are used. CHECKED: again and again, after a check. SINGLE_USE: for one request, without a check, as
#: the server ends them after an answer, or sends more. UNCHECKED, under spawn(8) or if the service answers mail but no
#: checks: again and again, without a check.
CHECKED, SINGLE_USE, UNCHECKED = 'checked', 'single use', 'unchecked'


class Connection(Wire):
    """A connection to a server: it decides what is an answer. One request at a time."""

    __slots__ = ('_data', 'expires', 'idle_since', 'poll', 'pool', 'quiet', 'silent_at', 'since', 'spent', 'timer',
                 'used')  # fmt: skip

    def __init__(self, pool: Pool, now: float) -> None:
        """Make a connection that is not open yet: the first ask() opens it."""
        self.pool = pool
        self.begin(now)

    def begin(self, now: float) -> None:
        """Set the state of a connection that has carried nothing."""
        self.since = self.idle_since = now  # when its last request was sent, and when that was answered
        self.expires = now + self.pool.queue.max_age
        self.quiet = QUIET / 2  # seconds of silence that it needs behind its last answer: at most twice those before
        self.silent_at = -math.inf  # when it was last seen to be silent for long enough
        self.used = 0  # how many answers it gave, the one to its check included
        self.spent = ''  # why it must not be used again: ENDED or SURPLUS
        #: poll(0) asks the kernel whether there is something to receive, for 0.6 us: the loop may not have polled since
        #: the last answer. None while the connection is not open.
        self.poll: Callable[[int], list[tuple[int, int]]] | None = None
        self._data = b''  # the answer, as far as it has come
        self.timer = QueryTimeout(self.pool.service.timeout)

    def open(self) -> None:
        """Connect. Raises ServiceFailure."""
        pool = self.pool
        pool.trace('Opening socket to')
        sock = pool.connector.connect()
        super().__init__(sock)
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
        self.poll = poller.poll
        pool.trace('Connection established to')
        if pool.checker.heard_more and (said := self.listen(QUIET)):
            raise ServiceFailure(DROPPED if said is ENDED else INVALID, 'it hung up, or spoke, before it was asked')

    def ask(self, request: bytes, left: float = math.inf) -> bytes:
        """Send a request at `since`, which is now, and return the action of its answer. Raises ServiceFailure.

        Within the service's timeout, or the seconds that are left if that is less; `user` is the greenlet that asks.
        """
        if self.used:
            if self.since - self.silent_at > REST_AFTER * self.quiet:
                self._see_silence(left)
                left -= time.monotonic() - self.since
            elif self.since - self.idle_since >= self.quiet:
                self.silent_at = self.since
        timer = self.timer if left >= self.timer.seconds else QueryTimeout(max(0.001, left))
        again, stop, sent = timer.again, timer.stop, False
        again(THROW_INTO, self.user, timer)
        try:
            if self.poll is None:
                self.open()
            sent = True
            if rest := self.send(request):
                self.socket.sendall(rest)
                self.watch()  # what came meanwhile has paused it: see unexpected()
            while (chunk := self.receive()) is not None:
                if PLAIN_ANSWER(chunk) and not self._data:  # nearly always
                    self.used += 1
                    return chunk[7:].rstrip()
                if (answer := self._take_in(chunk)) is not None:
                    return answer
        except OSError:
            pass  # a reset is an end, too
        except gevent.Timeout as error:
            if error is not timer:
                raise
            return self._after_timeout(timer, sent)
        finally:
            stop()
        self.spent = ENDED
        if (answer := self._take_in(b'', closed=True)) is not None:
            return answer
        how = 'in mid-answer' if self._data else 'without an answer'
        raise (Ended if self.used else ServiceFailure)(DROPPED, f'it hung up {how}')

    def needs_rest(self, now: float) -> bool:
        """Return whether its next request would have to wait, as it was used for too long without enough silence."""
        return now - self.idle_since < self.quiet < (now - self.silent_at) / REST_AFTER

    def _see_silence(self, left: float) -> None:
        """Rest: wait until it has been silent for long enough, half the seconds left at most. Raises NotSent if not."""
        if said := self.listen(min(self.idle_since + self.quiet - self.since, left / 2)):
            self.pool.drop(self, said)
            raise NotSent(DROPPED, 'it was not silent before its use')
        self.silent_at = self.since

    def _after_timeout(self, timer: QueryTimeout, sent: bool) -> bytes:
        """Return the action if a whole answer has come while we did not run. Raises ServiceFailure."""
        timer.__traceback__ = None  # it would keep the request in memory until the next timeout
        with contextlib.suppress(OSError):
            while sent and (chunk := self._recv(RECEIVE)):
                if (action := self._take_in(chunk)) is not None:
                    return action
        reason = LATE if timer.seconds > self.pool.service.timeout / 2 else DEADLINE
        raise ServiceFailure(reason, f'no answer within {timer.seconds:.3g}s') from None

    def _take_in(self, chunk: bytes, closed: bool = False) -> bytes | None:
        """Return the action if the answer is whole, or ends here. Raises ServiceFailure."""
        seen = len(self._data)
        # an empty line too many behind the last answer may come only now
        self._data = self._data + chunk if seen or not self.used else chunk.lstrip(LINE_ENDS)
        try:
            answer = parse_answer(self._data, closed, max(0, seen - 2))
        except InvalidAnswer as error:
            raise ServiceFailure(DROPPED if closed else INVALID, str(error)) from None
        if answer is None:
            return None
        action, more = answer
        self._data = b''
        self.used += 1
        self.spent = SURPLUS if more else self.spent
        return action

    def check(self, deadline: float = math.inf) -> tuple[str, bytes]:
        """Ask our own question; return what came behind the answer, as look() does, and the action.

        If the server hangs up or answers wrongly it is asked once more: once proves nothing. Raises ServiceFailure.
        """
        try:
            action = self.ask(CHECK, deadline - self.since)
        except ServiceFailure as failure:
            # a mail that asks this check goes elsewhere once the service is down
            in_vain = self.pool.service.state is DOWN and self not in self.pool.checker.running
            if failure.reason not in (DROPPED, INVALID) or in_vain:
                raise
            self.pool.connector.rotate(self.since)
            self.reopen()
            action = self.ask(CHECK, deadline - self.since)
        self.pool.service.check_answered(self.since, time.monotonic())
        said = self.spent or self.listen(QUIET)
        self.idle_since = self.silent_at = time.monotonic()
        self.quiet = QUIET
        return said, action

    def reopen(self) -> None:
        """Close the connection; the next ask() opens it anew."""
        self.close()
        self.begin(time.monotonic())

    def look(self, flags: int = 0) -> str:
        """Receive what nobody asked for; return ENDED, SURPLUS, or '' for nothing or empty lines. MSG_PEEK keeps it."""
        try:
            for _ in range(2):
                if not (data := self._recv(RECEIVE, flags)):
                    return ENDED
                if data.strip(LINE_ENDS):
                    return SURPLUS
            return SURPLUS  # empty lines without end
        except OSError as error:
            return '' if isinstance(error, BlockingIOError) else ENDED

    def listen(self, seconds: float) -> str:
        """Wait for so many seconds; return what came, as look() does."""
        gevent.sleep(seconds)
        self.watch()
        return self.look()

    def unexpected(self) -> None:
        if self not in self.pool.idle and self not in self.pool.held:
            self.pause()  # it is busy: what comes is for receive()
            self.silent_at = -math.inf
        elif said := self.look():
            self.pool.drop(self, said)

    def close(self) -> None:
        if self.poll is not None:
            super().close()
            self.timer.close()
            if self.used:
                self.pool.service.closed_at = time.monotonic()


def asked_first(connections: dict[Connection, Any]) -> float:
    """Return when the first of these connections was asked (monotonic seconds), infinity if there is none."""
    return next(iter(connections)).since if connections else math.inf


class QueryTimeout(gevent.Timeout):
    """A Timeout that may be started again and again: 0.4 us each time, against 1.6 us for a new one.

    gevent's own start() goes on with the rest of the last run, which libev's ev_timer_stop() keeps. `again` is libev's
    ev_timer_again() and starts with the whole time; `stop` ends it.
    """

    __slots__ = ('again', 'stop')

    seconds: float

    def __init__(self, seconds: float) -> None:
        super().__init__(None)
        self.seconds = seconds
        self.timer: Any = gevent.get_hub().loop.timer(seconds, repeat=seconds)
        self.again, self.stop = self.timer.again, self.timer.stop


class Checker:
    """Decides by checks whether one more connection to a service may be opened: grow() alone starts checks.

    No mail waits on an unanswered check, so many may run at once. A service is *full* when it serves some connections
    and lets a further check wait, or hangs up on it: then one check at a time is made, and more after each that passes.
    """

    def __init__(self, pool: Pool, enabled: bool) -> None:
        self.pool, self.enabled = pool, enabled  # under spawn(8) enabled by the first failed mail
        self.running: dict[Connection, Any] = {}  # each check and its greenlet, the eldest first
        #: Checks at once, or mails at once at a single-use service: few after one that was not served. At a full
        #: service at least as many checks as connections that have ended.
        self.at_once = float(pool.service.max)
        self.full = 0  # how many connections the service served when it was found full; 0: it is not full
        self.heard_more = False  # more than an answer came to the last check: the server may speak before it is asked
        self.reason = ''  # why the last check failed; LATE also where it was hung up on late
        #: Seconds of the fastest check that passed since the service was down, and of the slowest. A check counts as
        #: the fastest if a connection was closed meanwhile, as it may have waited for that child. 0: none passed.
        self.fastest = self.slowest = 0.0
        #: When the last check began, or a connection was given up after that; when the last failed check began.
        self.began = self._failed_at = -math.inf
        self._closed_until = -math.inf  # until when the server may have to answer checks that we closed

    def spawn(self, check: Connection) -> Any:
        """Run a check in a greenlet of its own, and return that."""
        return gevent.spawn(self._run, check)

    def growing(self, now: float, patience: float) -> bool:
        """Return whether a request with so many seconds of patience may expect a new connection."""
        if self.running:
            return not self.full and now - asked_first(self.running) <= patience
        return self.pool.room > 0 and not self._too_early(now)

    def restarts(self, now: float) -> bool:
        """Return whether a service that is down went down so lately that it may just be restarting."""
        return now - self.pool.service.since < 2 * BACKOFF_FIRST

    def _too_early(self, now: float) -> bool:
        """Return whether it is too early for a check: one failed, and the service is down, or may be full."""
        service, seconds = self.pool.service, BACKOFF_FIRST if self.pool.open else SOON if self.full else 0.0
        if service.state is DOWN:
            seconds = SOON if self.restarts(now) else BACKOFF_FIRST
            if any(each.state is UP and each.heard_at >= each.failed_at for each in self.pool.queue.pools):
                # each failed check doubles it, but for late ones: a check is to wait at a server until that goes on
                outage = max(0.0, self._failed_at - max(service.since, service.checked_at, service.late_at))
                seconds = min(BACKOFF_MAX, BACKOFF_FIRST + outage) * JITTER
        return now < self._failed_at + seconds

    @property
    def slow(self) -> float:
        """Seconds after which a check is late: hardly any answer takes so long, nor the first one of a connection."""
        return max(UNANSWERED, min(2 * self.slowest, self.slowest + CONNECT_TIMEOUT))

    def due(self, now: float) -> bool:
        """Return whether a check is due that no request waits for."""
        pool, service, ago = self.pool, self.pool.service, now - self.began
        return (service.failed_at > self.began  # a mail failed, and a check decides what that means
                or (ago > BACKOFF_FIRST and now < service.answered_at + UNHEARD  # the last connection ended
                    and pool.use is CHECKED and not pool.open)
                or (ago > UNHEARD and (now - service.heard_at > UNHEARD or pool.use is not CHECKED))
                or (ago > service.stall and pool.stalled(now))
                or (not self.running and pool.overdue(now)))  # fmt: skip

    def grow(self, now: float, more: bool = False) -> None:
        """Start checks: one for each request that waits; one more if `more`, or if a check is due; one if down.

        Also one more if the running ones are late, and requests wait, no service is up, or it is stalled: they may have
        met workers that hang. Not at a full server that serves us: it would still serve each check that we give up.
        """
        pool, running = self.pool, len(self.running)
        if not self.enabled or self._too_early(now):
            return
        late = running > 0 and now - self.began > self.slow + CONNECT_TIMEOUT * (self.full > 0) and not self.passing
        # at a stalled service one second check, soon: a server of few workers would have each further one to answer
        needed = bool(pool.waiting) or not pool.queue.balancer.up or (running < 2 and pool.stalled(now))
        stuck = late and needed and not (self.full and pool.open)
        down = pool.service.state is DOWN
        places = 1 if pool.use is SINGLE_USE else pool.service.max - len(pool.busy)
        one_more = more or stuck or down or self.due(now)
        wanted = max(min(len(pool.waiting), places), running + one_more)
        number = min(wanted, (1 if down else max(int(self.at_once), self.full - pool.open)) + stuck)
        if stuck:
            pool.connector.rotate(self.began)
            pool._close(*pool.idle, *pool.held)  # they may lead to the address that hangs
            if running > 1 and (running >= number or not pool.room):
                self.stop(*[*self.running][:-1])  # the youngest: the elder ones go on, as the server may only be slow
        for _ in range(min(number - len(self.running), pool.room)):
            self.began = now
            check = Connection(pool, now)
            check.user = self.running[check] = self.spawn(check)

    def _run(self, check: Connection) -> None:
        kept = check  # in compiled code an argument is not held, and stop() drops the last reference
        try:
            said, _ = kept.check()
            self.passed(check, said, time.monotonic())
        except Exception as error:  # a fault of ours says nothing of the service
            failure = error if isinstance(error, ServiceFailure) else ServiceFailure(INTERNAL, repr(error))
            self.failed(check, failure, time.monotonic())
        finally:
            if kept not in self.pool.idle and kept not in self.pool.busy:
                kept.close()

    def stop(self, *but: Connection) -> None:
        """Stop the running checks except these: what comes of them says nothing of the service any more."""
        for check in [check for check in self.running if check not in but]:
            self.running.pop(check).kill(block=False)
            if check.poll is not None and not check.used and check.since < self.pool.service.heard_at:  # in the backlog
                self._closed_until = max(self._closed_until, time.monotonic()) + self.fastest

    def passed(self, check: Connection, said: str, now: float) -> None:
        """Take in a connection whose check was answered; what it said behind the answer decides how it is used."""
        if self.running.pop(check, None) is None:
            return
        pool = self.pool
        self._failed_at, self.reason, self.heard_more = -math.inf, '', said is SURPLUS
        seconds = now - check.since
        self.fastest = min(self.fastest or seconds, seconds)
        self.slowest = max(self.slowest, seconds if check.since > pool.service.closed_at else self.fastest)
        if said is SURPLUS:
            pool.said_more('more after the answer to its check', now)
        single = said != '' or now < pool.once_until
        if single and pool.use is not SINGLE_USE:
            self.began = now - UNHEARD + BACKOFF_FIRST  # once proves little: the next check is due soon
            pool.use = CHECKED
            pool.use_once()
        elif pool.open >= (int(self.at_once) if single else self.full):  # one more than before is served
            self.at_once = max(self.at_once, min(2 * self.at_once, pool.open + 1))
            # mail that meets the limit of a single-use server costs a retry: there it is full until it has shown more
            self.full = self.full if (single or pool.waiting) and self.at_once < pool.service.max else 0
        # what began long before this check and is not answered may have met a worker that hangs
        self.stop(*[other for other in self.running if check.since - other.since <= self.slow or other.used])
        pool.passed = True
        pool.service.check_passed(now)
        if not single:
            pool.use = CHECKED
            pool.idle.append(check)
        pool.queue.hand_over(pool, now)

    def failed(self, check: Connection, failure: ServiceFailure, now: float) -> None:
        """Judge a service by a check that failed."""
        if self.running.pop(check, None) is None:
            return
        pool, service, reason = self.pool, self.pool.service, failure.reason
        # hung up on late: mail that tries such a service would wait as long
        why = LATE if reason in (DROPPED, INVALID) and now - check.since > UNANSWERED else reason
        self._failed_at = check.since
        pool.connector.rotate(check.since)
        if reason not in JUDGED:  # a fault of ours
            self.lower()  # else a line for each request that waits
            pool.report(f'cannot be checked: {failure}')
        elif service.state is DOWN:
            self.reason = why
            if why is LATE:
                service.late_at = now
            pool.queue.balancer.update()
            for client in pool.waiting:  # each waited for this check, and chooses again
                client.woken.set()
        elif pool.use is UNCHECKED and reason in (DROPPED, INVALID):
            service.check_answered(check.since, now)  # the service answers mail and no checks: it is alive
        elif reason is not UNREACHABLE and self._serves(check, reason):
            self._closed_until += self.fastest if reason is LATE else 0.0  # the server has this one to answer, too
            self.found_full(f'{reason}, {failure}')
            pool.queue.hand_over(pool, now)
        elif (reason is not LATE  # a check that began before this one may still pass: the server may serve no more
              and any(0 <= check.since - other.since <= CONNECT_TIMEOUT for other in self.running)):  # fmt: skip
            self.lower()
        else:
            self.reason = why
            service.turn(DOWN, f'its check: {reason}, {failure}', now)

    def _serves(self, check: Connection, reason: str) -> bool:
        """Return whether the service serves other connections, though a check failed."""
        heard, busy = self.pool.service.heard_at - check.since, self.pool.busy
        if reason is LATE:  # it may wait behind those that we closed; or for a connection, while mail fills the backlog
            return heard > 0 or (check.since < self._closed_until if check.poll else any(mail.poll for mail in busy))
        # its connections may be closed by now, and others may have taken their places for a moment
        moment = GIVE_UP if self.full or reason is DROPPED else 0.0
        limited = self.pool.use is SINGLE_USE or (self.full > 0 and reason is DROPPED)
        return (limited and heard > -moment) or self.pool.look() > 0 or self.passing > 0

    @property
    def passing(self) -> int:
        """How many checks are answered, and are to pass after QUIET."""
        return sum(check.used > 0 for check in self.running)

    def reset(self, now: float) -> None:
        """Start anew, as the service went down: a check that began before says nothing of it."""
        self.stop()
        self.at_once, self.full, self._failed_at = float(self.pool.service.max), 0, now
        self.fastest = self.slowest = 0.0

    def lower(self) -> None:
        """Allow fewer at once, as one more was not served: mails if the service is single use, else checks."""
        if self.pool.use is not SINGLE_USE:
            self.at_once = 1.0
        elif self.pool.busy:  # without other mail no limit can have been met
            self.at_once = max(1.0, min(len(self.pool.busy), self.at_once) - 1)

    def found_full(self, why: str) -> None:
        """Record that the service serves no more connections than it does now."""
        self.lower()
        if self.passing:
            return  # these are served, too: they are counted next time
        pool, service = self.pool, self.pool.service
        self.full = max(1, pool.look())
        if service.full_logged < self.full < service.max:
            service.full_logged = self.full
            pool.report(f'is full: it serves {self.full} connections, and a further one had: {why}. If that lasts,'
                        f' set its max to {self.full}, or give it more workers')  # fmt: skip

    def watch(self, now: float) -> None:
        """Find the service full if later requests are answered before a check, and start the checks that are due."""
        began = asked_first(self.running)
        hung = not self.passing and self.pool.service.newest - began > self.slow  # passing, it stops the elder
        if hung and (not self.full or len(self.running) > 2):
            self.found_full(f'no answer for {now - began:.1f}s')
            self.stop(*[*self.running][:1])  # all but the first; found_full() may have stopped all
        self.grow(now)


class Pool:
    """The connections to one service: it decides which one a request gets.

    A connection is busy with one query, held, idle, or closed; one on which a query was abandoned is closed. It is held
    by the message that it answered, which may ask more: a server may remember messages by connection. The idle
    connection that was used last is taken first, so that the others can end.
    """

    def __init__(self, service: Service, queue: Queue, checked: bool) -> None:
        self.service, self.queue = service, queue
        self.use = CHECKED if checked else UNCHECKED
        self.places = service.max  # mails at once
        self.waiting: list[Client] = []  # those whose requests wait for a connection of this pool, first come first
        self.idle: list[Connection] = []  # the most recently used last; after a retry the least used last
        self.held: dict[Connection, Client] = {}  # each with the client whose message holds it; the longest idle first
        self.busy: dict[Connection, None] = {}  # the longest busy first
        self.passed = False  # whether a check has passed since a connection was given up
        self.once_until = 0.0  # until then each connection carries one mail, as the server sent more than an answer
        self.connector = Connector(service.address, min(CONNECT_TIMEOUT, service.timeout), self.report)
        self.checker = Checker(self, checked)

    @property
    def open(self) -> int:
        """How many connections are open, or about to be opened by a mail; running checks are not among them."""
        return len(self.idle) + len(self.held) + len(self.busy)

    @property
    def room(self) -> int:
        """How many connections may be opened now."""
        return self.service.max - self.open - len(self.checker.running)

    @property
    def may_open(self) -> bool:
        """Whether a mail may open a connection without a check; if the service is down, Balancer.update() says why."""
        most = self.checker.at_once if self.use is SINGLE_USE else math.inf
        return len(self.busy) + 1 <= most and self.room > 0 and (self.use is not CHECKED or self.service.state is DOWN)

    def look(self) -> int:
        """Close the idle connections that have ended; return how many are open and connected."""
        for connection in [*self.held, *self.idle]:
            if connection.poll is not None and connection.poll(0) and (said := connection.look()):
                self.drop(connection, said)
        served = [each for each in self.busy if each.poll is not None and (each.used or self.use is not CHECKED)]
        return len(self.idle) + len(self.held) + sum(each.look(socket.MSG_PEEK) is not ENDED for each in served)

    def admits(self, waited: float, now: float) -> bool:
        """Return whether a request that has waited for so many seconds may go on waiting for this service.

        On trial: if a place is free, or while the answer may soon come that ends the trial.
        """
        if self.service.state is UP or len(self.busy) + len(self.waiting) < self.places:
            return True
        asked = min(asked_first(self.busy), asked_first(self.checker.running))
        return self.places > 0 and now - asked < TRIAL_PATIENCE - waited

    def ready(self, now: float, key: bytes = b'') -> bool:
        """Return whether it has a connection for a request, or may have one within the request's patience."""
        if len(self.busy) >= self.places:
            return False
        has = bool(self.idle or self.held) or self.may_open
        return has or (self.use is CHECKED and self.checker.growing(now, STICKY_PATIENCE if key else PATIENCE))

    def silence(self, now: float) -> float:
        """Return for how many seconds mail is in flight and none was answered; below 0 if there is none."""
        return now - max(self.service.answered_at, asked_first(self.busy))

    def overdue(self, now: float) -> bool:
        """Return whether much mail was sent since the service answered last, and an answer should have come by now."""
        heard_at, last = self.service.heard_at, next(itertools.islice(reversed(self.busy), CHECK_AFTER - 1, None), None)
        return last is not None and last.since > heard_at and now - heard_at > max(QUIET, 5 * self.service.tally.mean)

    def stalled(self, now: float, key: bytes = b'') -> bool:
        """Return whether mail is in flight and none was answered for `stall` seconds.

        Sooner, if much was sent, and a check had no answer within a moment, too (unless full), or has no room.
        """
        # mail with a key waits while this may be a pause: another greylist would defer it
        unchecked = self.room > 0 and now - asked_first(self.checker.running) < (STICKY_PATIENCE if key else QUIET)
        return self.silence(now) > self.service.stall or (not unchecked and not self.checker.full and self.overdue(now))

    def _grows_first(self, client: Client, now: float) -> bool:
        """Return whether a request had better wait for a new connection: messages that may ask more hold the others."""
        # a check may start a process; where another service is up, the request may go there after PATIENCE
        slow = min(HOLD, 2 * self.checker.slowest) if self.queue.balancer.alone(self.service) else 0.0
        longest = max(GROWTH_PATIENCE, slow)
        wait = now - client.asked < longest and now - next(iter(self.held)).idle_since < HOLD
        return wait and self.checker.growing(now, longest)

    def take(self, client: Client, now: float) -> Connection | None:
        """Return a silent connection, busy from now on; None if there is none.

        That which answered the client's message last; else the most recently used one that no message holds; else the
        longest idle one that a message holds, unless a new one may soon be there. Those that need a rest come last.
        """
        while len(self.busy) < self.places:
            own = client.connection
            if own is not None and self.held.get(own) is client:
                del self.held[own]
                connection = own
            elif self.idle and now - self.idle[-1].silent_at <= REST_AFTER * QUIET:  # nearly always: it needs no rest
                connection = self.idle.pop()
            elif self.idle or (self.held and not self._grows_first(client, now)):
                unused = itertools.chain(reversed(self.idle), self.held)
                longest_idle = next(iter(self.idle or self.held))
                connection = next((each for each in unused if not each.needs_rest(now)), longest_idle)
                if now >= connection.expires:  # given up: it would be handed on from message to message for ever
                    self._close(connection)
                    continue
                if self.held.pop(connection, None) is None:
                    self.idle.remove(connection)
            elif self.may_open:
                connection = Connection(self, now)
            else:
                return None
            poll = connection.poll
            if poll is not None and poll(0) and (said := connection.look()):
                self.drop(connection, said)
                continue
            connection.since = now
            self.busy[connection] = None
            if now - self.service.answered_at > QUIET and self.checker.due(now):
                self.checker.grow(now)
            return connection
        return None

    def answered(self, connection: Connection, action: bytes, keep: bool, now: float, client: Client | None) -> None:
        """Take back a connection whose mail was answered: its message holds it. Close it if it is not to be reused."""
        current = self.busy.pop(connection, self) is None  # else the service went down after the mail was sent
        self.service.answered(action, connection.since, current, now)
        # it is to be silent for QUIET and what the answer took; twice as long as before at most, as a slow answer may
        # have waited for a child of the server
        quiet, most = QUIET + now - connection.since, 2 * connection.quiet
        connection.idle_since, connection.quiet = now, quiet if quiet < most else most
        keep = keep and current and not connection.spent
        if self.use is not CHECKED or self.checker.full:
            keep = keep and self.use is not SINGLE_USE and now > self.once_until and not self._unread(now)
            if not self.checker.full and self.use is SINGLE_USE:  # if it is full, one more for each passed check
                self.checker.at_once = min(self.checker.at_once + 1 / self.checker.at_once, self.service.max)
        if connection.spent is SURPLUS and current:
            self.said_more('more than one answer to a request', now)
        if not keep or client is None or not client.instance:
            return self._release(connection, keep, now)
        self.held[connection] = client
        if self.waiting:
            self.queue.hand_over(self, now)

    def _unread(self, now: float) -> bool:
        """Return whether a mail on a new connection is late: no worker may be free for it, and each close frees one."""
        return any(not each.used and now - each.since > self.checker.slow for each in self.busy)

    def failed(self, connection: Connection, failure: ServiceFailure, now: float) -> None:
        """Close a connection whose mail was not answered, and start a check."""
        service = self.service
        service.failures[failure.reason] += 1
        service.tally.failed[bisect_left(BOUNDS, now - connection.since)] += 1
        service.tally.last_failure = now, f'{failure.reason}, {failure}'
        if self.busy.pop(connection, self) is None:  # else the service went down after the mail was sent
            failure.at, service.failed_at = connection.since if failure.reason is LATE else now, now
            alone = self.queue.balancer.alone(service)
            # strangers' slow messages may hold all places that others wait for, but good mail behind them is answered
            unanswered = now - max(service.answered_at, service.since) >= 2 * service.timeout
            # while some service answers other mail, this mail may be at fault; decide() counts it once it is answered
            counts = failure.reason is LATE and failure.at > max(each.answered_at for each in self.queue.pools)
            if counts and (unanswered or not (alone and self.waiting)):
                service.blame(failure, alone, now)
            elif failure.reason in (REFUSED, UNREACHABLE) and not self.checker.enabled:
                service.turn(DOWN, failure.reason, now)  # so that this mail gets --default, not --failed
            self.checker.enabled = True  # under spawn(8), too
            self.checker.grow(now)
        self._release(connection, False, now)

    def give_back(self, connection: Connection, unused: bool) -> None:
        """Take back a connection whose request was abandoned; close it, unless the request was not sent."""
        self._release(connection, self.busy.pop(connection, self) is None and unused, time.monotonic())

    def _release(self, connection: Connection, keep: bool, now: float) -> None:
        if keep and now < connection.expires:
            self.idle.append(connection)
        else:
            connection.close()
        if self.waiting:
            self.queue.hand_over(self, now)

    def let_go(self, connection: Connection, client: Client, now: float) -> None:
        """End the hold of a message on a connection: the client asks about another message, or left."""
        if self.held.get(connection) is client:
            del self.held[connection]
            self._release(connection, True, now)

    def drop(self, connection: Connection, said: str) -> None:
        """Close an idle connection that ended, or sent what nobody asked for."""
        self._close(connection)
        if said is SURPLUS:
            self.said_more('what nobody asked for', time.monotonic())

    def _close(self, *connections: Connection) -> None:
        for connection in connections:
            if self.held.pop(connection, None) is None and connection in self.idle:
                self.idle.remove(connection)
            connection.close()

    def reset(self) -> None:
        """Close the idle connections, and forget the busy ones: the service went down."""
        self._close(*self.idle, *self.held)
        self.busy.clear()
        self.use = CHECKED

    def said_more(self, what: str, now: float) -> None:
        """Use each connection for one mail, for ONCE: the server sent more than an answer."""
        if now >= self.once_until:
            self.report(f'sent {what}: for {ONCE:.0f}s each of its connections is used once')
        self.once_until = now + ONCE
        self.use_once()

    def use_once(self) -> None:
        """Use each connection for one mail, until a later check decides anew; as many at once as are served now."""
        if self.use is CHECKED:
            self.use, self.checker.at_once = SINGLE_USE, max(1.0, self.open + self.checker.passing)
            self.checker.stop()
        self._close(*self.idle, *self.held)

    def share(self, now: float) -> None:
        """Give up the longest open connection, an idle one first: others may wait for one of the server's few children.

        The more connections there are, the more often: those who share a full server get equal parts. The last one only
        after a check has passed since: others may not give back what they have. A turn costs the server two checks, and
        all take a tenth of its time at most. A slow server has no turns: a check that waits would be late all the same.
        """
        connections = [each for each in (*self.idle, *self.held, *self.busy) if now < each.expires]
        number, full = len(connections), self.checker.full > 0
        keep = not (self.waiting or full or self.room <= 0)  # without room no check can find it full
        if self.use is not CHECKED or number <= (keep or not self.passed):
            return
        # a check may have waited for a child to be free; a mail did not
        seconds = 20 * min(self.checker.slowest, self.service.tally.mean)
        # others' checks are to have their turn before they are late
        pace = max(min(GIVE_UP, self.service.timeout / 4) / math.sqrt(number if full else 1), seconds / number)
        if now - max(self.checker.began, self.service.checked_at) >= pace and pace < self.service.timeout / 3:
            self.passed, self.checker.began = False, now
            min(connections, key=lambda each: (each not in self.idle, each.expires)).expires = now
            if full:
                self.checker.stop()  # a check in the server's backlog would take the child before others can

    def prune(self, now: float) -> None:
        """Close what is idle soon, as others may need a worker; the last one that answered mail later."""
        if not self.waiting and self.service.state is UP:  # a mail may wait for a child behind checks that nobody needs
            running = [*self.checker.running]
            self.checker.stop(*running[:1], *[each for each in running if now - each.since <= self.checker.slow])
            if not self.checker.running and self.open < self.checker.full / 2:
                self.checker.full = 0  # nothing has met the limit lately
        unread = self._unread(now)
        for connection in [*self.idle, *self.held]:
            # given up: its message may go on for a moment. Used once: by its check, nearly always
            spare = self.open > 1 or self.checker.full or connection.used < 2 or now >= connection.expires
            if now - connection.idle_since >= (SPARE_IDLE if spare else UNHEARD) or unread:
                self._close(connection)

    def report(self, text: str) -> None:
        """Log a warning about this service."""
        self.queue.log(WARNING, f'{self.service} {text}')

    def trace(self, what: str) -> None:
        """Log a step of a connection (-v)."""
        if self.queue.log.verbose:
            self.queue.log(INFO, f"{what} '{self.service.name}' ({self.service.address})")


class Queue:
    """The requests that wait for a connection: first come, first served. It ties services, pools and balancer."""

    def __init__(self, services: Sequence[Service], log: Log, checked: bool = True) -> None:
        self.log = log
        #: Seconds that a connection is used at most. Under spawn(8) each process has one connection to give up, and
        #: another process may wait for the server's few children.
        self.max_age = MAX_AGE if checked else GIVE_UP
        self.pools = {service: Pool(service, self, checked) for service in services}
        self.balancer = Balancer(self.pools.values())
        for service in services:
            service.changed, service.since = self.changed, time.monotonic()

    def wait(self, client: Client, first: Pool | None, tried: Collection[Pool], deadline: float,
             since: float) -> Connection | None:  # fmt: skip
        """Return a connection of a pool that was not tried, of `first` if that has one soon; None if there is none."""
        now = since
        try:
            while now < deadline and (pools := self.balancer.candidates(first, tried, now - since, now, client.key)):
                client.woken = Event()
                for pool in pools:
                    if pool not in client.waits_for:
                        client.join(pool)
                    self.hand_over(pool, now)
                    if client.given is not None:
                        break
                else:
                    # half a second for a check of a service that is down, however long it has waited
                    ends = [*(since + each for each in PATIENCES), (since if pools[0].places else now) + TRIAL_PATIENCE]
                    client.woken.wait(min([end for end in ends if end > now] + [deadline]) - now)
                if client.given is not None:
                    if client.given in client.given.pool.busy:
                        return client.given
                    client.given.close()  # its service went down before we ran
                    client.given = None
                now = time.monotonic()
            return None
        except BaseException:  # the client left
            if client.given is not None:  # it was handed over in the same moment
                client.given.pool.give_back(client.given, unused=client.given.poll is not None)
            raise
        finally:
            client.given = None
            client.leave()

    def hand_over(self, pool: Pool, now: float) -> None:
        """Give the pool's connections to the requests that wait for them, and start checks for the rest."""
        if pool.use is SINGLE_USE and pool.checker.due(now):  # before mail takes all places
            pool.checker.grow(now)
        while pool.waiting:
            client = pool.waiting[0]
            client.given = pool.take(client, now)
            if client.given is None:
                return pool.checker.grow(now)
            client.leave()
            client.woken.set()

    def changed(self, service: Service, text: str, now: float) -> None:
        """Do what follows from a change of a service's state: the requests that it concerns choose again."""
        self.log(WARNING, text)
        pool = self.pools[service]
        self.balancer.update()
        concerned = {client for each in self.pools.values() for client in each.waiting}
        if service.state is DOWN:
            pool.reset()
            pool.checker.reset(now)
            concerned = {*pool.waiting}
            pool.waiting.clear()
            for client in concerned:
                client.waits_for = tuple(each for each in client.waits_for if each is not pool)
            if not self.balancer.up:
                self.log(WARNING, 'No service is up: requests get the default action')
        elif service.state is UP and pool.checker.reason:
            pool.use = UNCHECKED
            pool.report(f'fails its checks ({pool.checker.reason}), but answers mail: it is used without checks')
        for client in concerned:
            client.woken.set()


# --- Proxy -----------------------------------------------------------------------------------------------------------


class Client(Wire):
    """A Postfix connection: requests in, answers out, in order."""

    __slots__ = ('_data', '_leaving', 'asked', 'closing', 'connection', 'ended', 'given', 'instance', 'key', 'unsent',
                 'waits_for', 'woken')  # fmt: skip

    woken: Event  #: what wakes its greenlet while it waits for a connection

    def __init__(self, sock: socket.socket) -> None:
        self._data = b''  # received, and no part of a request that was returned
        self.ended = False  # it will send nothing more, or we have sent our end
        self.closing = False  # its next answer is its last
        self._leaving = False  # it is closed now, unless a request has begun
        self.asked = time.monotonic()  # when its last request came
        self.key = b''  # the key of that request, by which Sticky orders the services
        self.instance = b''  # the message that it asks about
        self.connection: Connection | None = None  # the connection that answered this message last
        self.waits_for: tuple[Pool, ...] = ()  # the pools in whose lines that request stands
        self.given: Connection | None = None  # the connection that it got there
        self.unsent = b''  # the rest of an answer
        super().__init__(sock)

    def unexpected(self) -> None:
        # while a request is served: the next request, the end of what it sends, or a reset
        try:
            self._take_in(self._recv(RECEIVE) or None)
        except BlockingIOError:
            pass
        except OSError:
            self.pause()
            self.user.throw(ClientFault(RESET))  # wherever its greenlet waits: for a service, most likely
        if self.ended or len(self._data) > MAX_MESSAGE:
            self.pause()
        for pool in self.leave() if self.ended else ():  # it was killed, nearly always: others have their turns first
            self.join(pool)

    def _take_in(self, data: bytes | None) -> None:
        self.ended = self.ended or data is None
        self._data = (self._data + (data or b'')).lstrip(LINE_ENDS)

    def request(self, seconds: float) -> bytes | None:
        """Return the next request, None at the client's end. Raises ClientFault.

        A client may be idle as long as it likes; a request that has begun has to be complete within so many seconds.
        """
        if self._data:
            gevent.sleep(0)  # a client that sent several requests lets the others have their turn
        while not (self._data or self.ended or self._leaving):
            data = self.receive()
            if data and data[0] not in LINE_ENDS and end_of_message(data) == len(data):
                return data  # one request and no more, as nearly always
            self._take_in(data)
        if not self._data:
            return None
        with gevent.Timeout(seconds, ClientFault(TOO_SLOW, f'no end within {seconds:.3g}s')):
            while True:
                request, self._data = first_request(self._data)
                if len(self._data) <= MAX_MESSAGE:
                    self.watch()  # a full buffer has paused it: see unexpected()
                if request:
                    return request
                if self.ended:
                    raise ClientFault(CUT_OFF, f'{len(self._data)} bytes')
                self._take_in(self.receive())

    def join(self, pool: Pool) -> None:
        """Wait for a connection of a pool: in the order of the requests, behind all others if the client has ended."""
        self.waits_for += (pool,)
        insort(pool.waiting, self, key=lambda each: (each.ended, each.asked))

    def leave(self) -> tuple[Pool, ...]:
        """Wait for a connection no more; return the pools where it has waited."""
        pools, self.waits_for = self.waits_for, ()
        for pool in pools:
            pool.waiting.remove(self)
        return pools

    def answer(self, action: bytes) -> None:
        """Send what the kernel takes of an answer now; finish_answer() sends the rest, and meets the errors."""
        answer = b'action=' + action + b'\n\n'
        try:
            self.unsent = answer if self.closing else self.send(answer)
        except OSError:
            self.unsent = answer

    def finish_answer(self, seconds: float) -> None:
        """Send the rest of an answer, within so many seconds, and our end behind the last answer.

        By TCP both are in one segment: Postfix looks for an end before it sends a request, and so never sends one into
        a closed connection. Raises ClientFault, OSError.
        """
        last = self.closing and not self._data and not self.ended
        if last and self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        with gevent.Timeout(seconds, ClientFault(NOT_TAKEN, f'{len(self.unsent)} bytes')):
            self.socket.sendall(self.send(self.unsent))
        self.unsent = b''
        if last and self.socket.family == socket.AF_UNIX:
            self.unexpected()  # the answer arrived before our end will: a request sent meanwhile is answered
            last = not self._data and not self.ended
        if last:
            self.ended = True
            self.socket.shutdown(socket.SHUT_WR)

    def drain(self, now: float) -> None:
        """Close the connection with its next answer; now if it is idle, and no request is expected soon."""
        self.closing = True
        if self._waits and not self._data and now - self.asked > LINGER:
            self._leaving = True
            self._hub.loop.run_callback(self._readable)


class Proxy:
    """Decides requests and serves clients: `handle` is what StreamServer calls for each connection."""

    def __init__(self, services: Sequence[Service], default: bytes, failed: bytes, deadline: float, log: Log,
                 checked: bool = True) -> None:  # fmt: skip
        """`checked`: check services from the start, as there are many clients; else only once mail has failed there."""
        self.statistics = Statistics(services)
        self.queue = Queue(services, log, checked)
        self.pools, self._balancer = self.queue.pools, self.queue.balancer
        self.clients: set[Client] = set()
        self.draining = False
        self._default, self._failed, self._log = default, failed, log
        self._deadline = deadline - RESERVED  # seconds, for a request
        #: Reasons whose default actions are logged by number, every ten seconds; how many of each are logged.
        self._logged = {NO_SERVICE: 0, NOT_POLICY: 0}
        self.stalled: dict[Service, float] = {}  # since when each stalled service has not answered (monotonic seconds)
        gevent.spawn(self._housekeeping, TICK if checked else 1.0)

    # -- deciding

    def decide(self, request: bytes, client: Client, now: float) -> Decision:
        """Answer a request that came `now`, always, and before the deadline. Raises nothing but ClientFault."""
        self.statistics.requests += 1
        instance = instance_of(request)
        if instance is None:
            return self._give_default(client, NOT_POLICY, {})
        key = b'' if self._balancer.sticky is None else self._balancer.sticky.key(request)
        last = client.connection  # the message holds it while its instance and its key stay the same
        if last is not None and (instance != client.instance or key != client.key):
            last.pool.let_go(last, client, now)
        client.instance, client.key = instance, key
        deadline = now + self._deadline
        failures: dict[Pool, ServiceFailure] = {}  # of those that were asked
        while now < deadline:
            pool = self._balancer.choose(instance, failures, now, key)
            connection = pool.take(client, now) if pool is not None else None
            if connection is None:
                connection = self.queue.wait(client, pool, failures, deadline - self._answer_time, now)
            if connection is None:
                break
            if instance and not key:
                self._balancer.bound[instance] = connection.pool
            try:
                action = self._query(connection, request, client, deadline, failures)
            except ServiceFailure as failure:
                # its frames, which hold the request, would stay until the next collection
                failures[connection.pool], now = failure.with_traceback(None), time.monotonic()
                continue
            if not failures:
                return action, connection.pool.service, 1, 'answered'
            self.statistics.redispatches += 1
            self._blame(failures, JUDGED)
            *_, last_failure = failures.values()
            return action, connection.pool.service, len(failures) + 1, f'answered after {last_failure.reason}'
        if any(pool.service.state is UP and pool not in failures for pool in self.pools.values()):
            self._blame(failures, (LATE,))  # they left no time for a service that is up
        late = time.monotonic() >= deadline - (0 if failures else self._answer_time)
        reason = OUT_OF_TIME if late else ALL_FAILED if failures else NO_SERVICE
        return self._give_default(client, reason, failures)

    def _blame(self, failures: dict[Pool, ServiceFailure], reasons: Collection[str]) -> None:
        for pool, failure in failures.items():
            if failure.reason in reasons:
                pool.service.blame(failure, self._balancer.alone(pool.service), time.monotonic())

    @property
    def _answer_time(self) -> float:
        """Seconds before its deadline in which a request waits for no connection any more: the answer takes time."""
        return min(ANSWER_PART * self._deadline, 2 * min(pool.service.tally.mean for pool in self.pools.values()))

    def _query(self, connection: Connection, request: bytes, client: Client, deadline: float,
               tried: Collection[Pool]) -> bytes:  # fmt: skip
        """Pass on the answer of one service; return its action. Raises ServiceFailure, ClientFault."""
        pool, retried, used = connection.pool, False, 0
        try:
            pool.service.queries += 1
            while True:
                connection.user = client.user
                try:
                    action = connection.ask(request, deadline - connection.since)
                    break
                except ServiceFailure as fault:
                    sent = not isinstance(fault, NotSent)
                    single = pool.use is SINGLE_USE and fault.reason in (DROPPED, REFUSED)
                    once_more = not sent or (not retried and (single or isinstance(fault, Ended)))
                    if not once_more or connection not in pool.busy:
                        raise  # not busy: the service went down meanwhile
                    retried, used = retried or sent, connection.used
                    self.statistics.retries += 1
                    connection = self._retry(connection, client, deadline, tried)
        except ClientFault:
            pool.give_back(connection, unused=False)
            raise
        except Exception as error:  # a fault of ours costs a redispatch, not the mail
            failure = error if isinstance(error, ServiceFailure) else ServiceFailure(INTERNAL, repr(error))
            pool.report(f'failed: {failure.reason}, {failure}, instance: {printable(client.instance)}')
            pool.failed(connection, failure, time.monotonic())
            raise failure from None
        now = time.monotonic()
        client.answer(action)  # before all else, which would be a tenth of the latency that we add
        client.connection = connection
        # the connection that ended had answered nothing but its check, and no open one has answered more
        if (used == 1 and connection in pool.busy
                and all(each.used < 2 for each in (*pool.idle, *pool.held, *pool.busy))):  # fmt: skip
            pool.use_once()
        # a client that has ended, and asks no more, may have abandoned this request: its connection is not used again
        pool.answered(connection, action, not client.ended or client._data != b'', now, client)
        return action

    def _retry(self, connection: Connection, client: Client, deadline: float, tried: Collection[Pool]) -> Connection:
        """Return a connection that carries a request to the same service, in place of one that ended.

        A new connection in the same place. If the service is full it is checked first: another client may have taken
        the child that served the old one. But the idle connection that has given the fewest answers, if these are
        fewer: the server may end each after so many. And a connection that comes free, where no new one is served.
        These two have to be silent before they are asked. Raises ServiceFailure.
        """
        pool, now = connection.pool, time.monotonic()
        others = [other for other in self.pools.values() if other is not pool]
        if any(other.service.state is UP and other not in tried for other in others):
            deadline = min(deadline, now + STALLED_PATIENCE)  # the next service may answer
        pool.idle.sort(key=lambda each: each.used, reverse=True)  # take() takes the last one, unless that needs a rest
        least = pool.idle[-1] if pool.idle else connection
        if connection.used and (least.used >= connection.used or least.needs_rest(now)):
            connection.reopen()
            if not pool.checker.full:
                return connection
            # a check that has its answer holds a child already; another one would be served before this connection
            pool.checker.stop(*[check for check in pool.checker.running if check.used])
            with contextlib.suppress(ServiceFailure):
                if connection.check(deadline)[0] == '':
                    connection.since = time.monotonic()
                    return connection
        pool.busy.pop(connection, None)
        if not connection.used:  # a new one was not served: the server may have a limit, and a check finds out
            pool.checker.lower()
            pool.checker.grow(time.monotonic(), more=True)
        pool.give_back(connection, unused=False)
        if (found := self.queue.wait(client, pool, others, deadline, time.monotonic())) is None:
            raise Ended(DROPPED, 'it ended without an answer, and no other connection came free')
        found.silent_at = -math.inf  # it has to be silent first
        return found

    def _give_default(self, client: Client, reason: str, failures: dict[Pool, ServiceFailure]) -> Decision:
        any_up = any(pool.service.state is not DOWN for pool in self.pools.values())
        action, asked = self._failed if failures and any_up else self._default, [*failures]
        client.answer(action)
        self.statistics.defaults[reason] += 1
        why = f'default, {reason}' + (f', last: {failures[asked[-1]].reason}' if failures else '')
        if reason not in self._logged:
            self._log(WARNING, f"Default action '{printable(action)}' given: {why}")
        return action, asked[-1].service if asked else None, len(asked), why

    # -- serving

    def handle(self, sock: socket.socket, address: tuple[Any, ...] | str = '') -> None:
        """Serve one client until it leaves or breaks the protocol, or we drain."""
        client = Client(sock)
        client.closing = self.draining
        self.clients.add(client)
        self.statistics.clients += 1
        try:
            self._serve(client)
        except (ClientFault, OSError) as error:
            why = error.args if isinstance(error, ClientFault) else (RESET,)
            self.statistics.refused[why[0]] += 1
            where = f' from {address[0]}:{address[1]}' if isinstance(address, tuple) else ''  # '': a unix socket
            self._log(WARNING if why[0] is TOO_LONG else NOTICE, f'Client connection closed{where}: {", ".join(why)}')
        finally:
            self.clients.discard(client)
            if client.connection is not None:
                client.connection.pool.let_go(client.connection, client, time.monotonic())
            client.close()

    def _serve(self, client: Client) -> None:
        log = self._log
        while (request := client.request(self._deadline)) is not None:
            started = client.asked = time.monotonic()
            if log.verbose:
                for line in request.splitlines()[:-1]:
                    log(INFO, f'Attribute: {printable(line[:MAX_LOG_LINE])}')
            decision = self.decide(request, client, started)
            if client.unsent:
                client.finish_answer(self._deadline)
            if log.requests:
                self._log_request(decision, request, time.monotonic() - started)

    def _log_request(self, decision: Decision, request: bytes, delay: float) -> None:
        action, service, _, why = decision
        if self._log.verbose:
            if service is not None and why.startswith('answered'):
                self._log(INFO, f"Answer from '{service.name}' -> '{printable(action)}'")
            self._log(INFO, f'Action: {printable(action)}')
        self._log(INFO, request_line(decision, request, delay))

    def drain(self, seconds: float) -> bool:
        """Close every client between two requests; return False if some were left after so many seconds."""
        self.draining = True
        give_up = time.monotonic() + seconds
        gevent.sleep(0.001)  # the greenlets of clients that were accepted a moment ago begin
        while self.clients and (now := time.monotonic()) < give_up:
            for client in self.clients:
                client.drain(now)
            gevent.sleep(0.01)
        self._log_defaults()
        if self.clients:
            self._log(WARNING, f'{len(self.clients)} clients are cut off at the end of --grace')
        return not self.clients

    # -- housekeeping

    def _housekeeping(self, pause: float) -> None:
        second = 0.0
        while True:
            gevent.sleep(pause)
            try:
                now = time.monotonic()
                for pool in self.pools.values():
                    pool.checker.watch(now)
                    pool.share(now)
                if now - second >= 1:
                    second = now
                    self._each_second(now)
            except Exception:  # after a fault of ours the next round goes on
                gevent.get_hub().handle_error(self, *sys.exc_info())

    def _each_second(self, now: float) -> None:
        self._balancer.forget()
        for service, pool in self.pools.items():
            pool.prune(now)
            if pool.waiting:
                self.queue.hand_over(pool, now)
            since, heard = self.stalled.get(service, math.inf), service.answered_at if pool.busy else service.heard_at
            if (silent := pool.silence(now)) > service.stall:
                if service not in self.stalled:
                    self.stalled[service] = now - silent
                    pool.report(f'is stalled: {len(pool.busy)} requests in flight, no answer for {service.stall:g}s')
            elif heard > since + service.stall:
                del self.stalled[service]
                pool.report('is no longer stalled')
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
        """Log a summary every so many seconds, and within a second after a service has stalled, for ever."""
        while True:
            before, known, end = sample(self), {*self.stalled}, time.monotonic() + seconds
            while known.issuperset(self.stalled) and (left := end - time.monotonic()) > 0:
                gevent.sleep(min(1.0, left))
            if line := summary(self, difference(sample(self), before)):
                self._log(NOTICE, line)

    # -- for log and status

    def waits(self, now: float) -> list[float]:
        """Return for how many seconds each request has waited that is not answered yet."""
        return [now - client.asked for client in self.clients if not client._waits]  # else for its next request

    def silence(self, pool: Pool, now: float) -> float:
        """Return for how many seconds a service has not answered mail in flight, or a check (unless full); else 0."""
        check = math.inf if pool.checker.full else asked_first(pool.checker.running)
        stalled = self.stalled.get(pool.service, now)  # until it answers, though its queries have failed
        return max(pool.silence(now), now - max(pool.service.heard_at, check), now - stalled)


# --- Status endpoint. What only it needs is imported when it starts: under spawn(8) nobody pays for it. --------------

#: HTTP connections served at once, the seconds each may last, and bytes of a request's head.
STATUS_CONNECTIONS, STATUS_SECONDS, STATUS_HEAD = 20, 5.0, 8192
#: Seconds between two samples of the counters, and how many are kept: ten minutes. How many make a minute.
SAMPLE_SECONDS, SAMPLES, MINUTE = 5.0, 121, 13

#: Options that the status does not show as settings ('' is --); each service has a row of its own.
NO_SETTINGS = ('', 'service', 'check_services', 'help', 'socket_mode', 'version')

#: Method and path; a proxy sends a URL in place of the path. The Host header is not looked at: there is nothing to
#: change and no secret. Who reaches the address may read it.
HTTP_REQUEST = rb'([!-~]+) (?:http://[^/ ]*)?(/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n'
#: Headers of every answer. The page may use its own style and script, and what comes from us.
HTTP_HEADERS = """\
Content-Security-Policy: default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; \
connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'
X-Content-Type-Options: nosniff
Cross-Origin-Resource-Policy: same-origin
Cache-Control: no-store
Allow: GET, HEAD
Connection: close
"""


class Status:
    """What the proxy reports of itself by HTTP: it only reads counters."""

    def __init__(self, proxy: Proxy, options: SimpleNamespace, log: Log) -> None:
        import base64
        import hashlib
        import json

        self._proxy, self._options, self._log, self._started = proxy, options, log, time.monotonic()
        self._samples = deque([sample(proxy)], maxlen=SAMPLES)
        self._open: dict[socket.socket, None] = {}  # the eldest first
        install = f'install python3-prometheus-client, or run {sys.executable} -m pip install prometheus-client'
        #: By path: returns the status code, the type and the content of an answer.
        self._pages: dict[bytes, Callable[[], tuple[str, str, str]]] = {
            b'/': lambda: ('200 OK', 'text/html', STATUS_PAGE),
            b'/status.json': lambda: ('200 OK', 'application/json', json.dumps(self.data(), default=printable)),
            b'/metrics': lambda: ('501 Not Implemented', 'text/plain', f'{install}, then restart hapolicy\n'),
            b'/health': self._health,
        }
        with contextlib.suppress(ImportError):  # imported now: in the first scrape it would hold up mail for 0.1 s
            from prometheus_client import generate_latest

            self._pages[b'/metrics'] = lambda: ('200 OK', 'text/plain; version=0.0.4', generate_latest(self).decode())
        self._built = functools.lru_cache(len(self._pages))(lambda build, _: build())
        style, script = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                         for text in re.findall(r'<(?:style|script)>(.*?)</', STATUS_PAGE, re.DOTALL)]  # fmt: skip
        self._headers = HTTP_HEADERS.format(style=style, script=script).replace('\n', '\r\n')
        self._timer: Any = gevent.get_hub().loop.timer(SAMPLE_SECONDS, repeat=SAMPLE_SECONDS)
        self._timer.start(lambda: self._samples.append(sample(proxy)))

    def _health(self) -> tuple[str, str, str]:
        """Return the answer to /health: whether new clients should be sent here, and why not."""
        headline = self.data()['headline']
        code = '503 Service Unavailable' if headline['level'] == 'bad' or self._proxy.draining else '200 OK'
        text = 'ok' if headline['level'] == 'ok' else headline['text']
        return code, 'text/plain', f'{text}\n'

    # -- HTTP

    def handle(self, sock: socket.socket, _address: object = None) -> None:
        """Answer one request and end; end the eldest of too many connections: silent ones must not hold up /health."""
        if len(self._open) >= STATUS_CONNECTIONS:
            with contextlib.suppress(OSError):
                next(iter(self._open)).shutdown(socket.SHUT_RDWR)
        self._open[sock] = None
        try:
            with sock, contextlib.suppress(OSError), gevent.Timeout(STATUS_SECONDS, TimeoutError()):
                head = b''
                while not end_of_message(head) and (data := sock.recv(STATUS_HEAD - len(head))):
                    head += data
                sock.sendall(self._respond(head[: end_of_message(head)]))
        finally:
            del self._open[sock]

    def _respond(self, request: bytes) -> bytes:
        """Return the answer to the head of a request (RFC 9112)."""
        asked = re.match(HTTP_REQUEST, request)
        method, path = asked.groups() if asked else (b'', b'')
        code, kind, body = '404 Not Found', 'text/plain', 'there are /, /status.json, /metrics and /health\n'
        if not method:
            code, body = '400 Bad Request', 'not understood\n'
        elif method not in (b'GET', b'HEAD'):
            code, body = '405 Method Not Allowed', 'only GET and HEAD are answered\n'
        elif path in self._pages:
            often = min(4, 40 / len(self._proxy.pools))  # pages a second, at most: mail waits while one is built
            code, kind, body = self._built(self._pages[path], int(time.monotonic() * often))
        head = f'HTTP/1.1 {code}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body.encode())}\r\n'
        return f'{head}{self._headers}\r\n{"" if method == b"HEAD" else body}'.encode()

    # -- status.json

    def data(self) -> dict[str, Any]:
        """Return the content of /status.json; docs/operations.md has its fields."""
        now, proxy = time.monotonic(), self._proxy
        waits, minute = proxy.waits(now), difference(sample(proxy), self._samples[-min(MINUTE, len(self._samples))])
        services = [self._service(pool, minute, now) for pool in proxy.queue.balancer.pools]
        return {
            'version': 1, 'program': __version__, 'host': socket.gethostname(), 'pid': os.getpid(),
            'headline': self._headline(services, minute, waits), 'time': unix(now), 'started': unix(self._started),
            'draining': proxy.draining, 'log_lines_lost': self._log.lost,
            'options': {name: value for name, value in sorted(vars(self._options).items()) if name not in NO_SETTINGS},
            **{name: getattr(proxy.statistics, name) for name in (*COUNTERS, 'defaults', 'refused')},
            'in_flight': len(waits), 'oldest': round(max(waits, default=0.0), 3),
            'clients_connected': len(proxy.clients), 'step': SAMPLE_SECONDS, 'services': services,
        }  # fmt: skip

    def _service(self, pool: Pool, minute: Counts, now: float) -> dict[str, Any]:
        service, stalled, silent = pool.service, pool.service in self._proxy.stalled, self._proxy.silence(pool, now)
        (seconds, _, total, _), (answered, failed, *counts) = minute[None], minute[service]
        times, samples = quantiles(counts, pool, now), [counted[service] for counted in self._samples]
        text, failure = f'since {ago(service.since)}: {service.why}', service.tally.last_failure
        if service.state is UP and (stalled or silent >= SILENT):
            text = f'without an answer since {ago(now - silent)}, {len(pool.busy)} requests in flight'
        return {
            **{name: getattr(service, name) for name in ('name', 'prio', 'weight', 'timeout', 'max', 'state', 'why',
                                                         'queries', 'answers', 'failed', 'failures')},
            'address': str(service.address), 'text': text, 'since': unix(service.since), 'use': pool.use,
            # on trial only if a mail may try it now, and none waits for that
            'up': service.state is UP or (service.state is TRIAL and not pool.waiting and pool.admits(0, now)),
            'stalled': stalled, 'silent': round(silent, 3), 'verdicts': service.tally.verdicts,
            'full': pool.checker.full or None, 'last_failure': f'{ago(failure[0])}: {failure[1]}' if failure else None,
            'in_flight': len(pool.busy), 'idle_connections': len(pool.idle) + len(pool.held),
            'waiting': len(pool.waiting), 'checks': len(pool.checker.running),
            'requests_per_second': round((answered + failed) / max(1.0, seconds), 2),  # the first second counts whole
            'share': round(answered / total, 4) if total else None,
            **times, 'latency': [f'{name} {duration(bound)}' for name, bound in times.items()],
            'history': {name: [new[i] - old[i] for old, new in itertools.pairwise(samples)]
                        for i, name in enumerate(('answers', 'failed'))},
        }  # fmt: skip

    def _headline(self, services: list[dict[str, Any]], minute: Counts, waits: list[float]) -> dict[str, str]:
        """Return how bad it is (ok, warning, bad), and in words which service, since when, why and what it cost."""
        names = {UP: 'stalled', TRIAL: 'on trial', DOWN: 'down'}
        trouble = [f'{row["name"]} is {names[row["state"]]} {row["text"]}.'
                   for row in services if row['state'] is not UP or row['stalled']]  # fmt: skip
        failing = [f'{service.name} failed {counts[1]} of {sum(counts[:2])} queries in the last minute.'
                   for service, counts in minute.items() if service and counts[1]]  # fmt: skip
        up = sum(row['state'] is UP for row in services)  # with the stalled ones, which the next sentences name
        said = [f'{up} of {len(services)} services are up.', *trouble[:3], *failing[:3]]
        if self._proxy.draining:
            said.insert(0, f'Draining: no new client is accepted, {len(self._proxy.clients)} are connected.')
        if len(self._proxy.clients) >= (self._options.max_clients or math.inf):
            said.append(f'{len(self._proxy.clients)} clients are served, the most allowed: more wait.')
        given, level = minute[None][3], 'ok'
        if len(said) > 1 or given:
            level = 'warning' if any(row['up'] for row in services) else 'bad'
            actions = dict.fromkeys((self._options.default, self._options.failed))  # one, if they are equal
            words = "' or '".join(map(printable, actions))
            said.append(f"{given} requests got the default action '{words}' in the last minute.")
        if max(waits, default=0.0) >= SILENT:
            said.append(f'{len(waits)} requests are in flight, the oldest for {duration(max(waits))}.')
        return {'level': level, 'text': ' '.join(said)}

    # -- metrics

    def collect(self) -> Iterable[Any]:
        """Yield the metric families, as prometheus_client asks a collector to."""
        from prometheus_client import core

        data = self.data()
        built = {'name': data['options']['name'], 'version': data['program']}
        yield core.InfoMetricFamily('hapolicy_build', 'name and program in /status.json', built)
        for kind, name, field, labels in METRICS:
            family = getattr(core, f'{kind}MetricFamily')(f'hapolicy_{name}', f'{field} in /status.json', labels=labels)
            for row in data['services'] if 'service' in labels else [data]:
                values = row[field] if isinstance(row[field], dict) else {'': row[field]}
                for label, value in values.items():
                    family.add_metric([*filter(None, (row.get('name'), label))], value or 0)
            yield family
        seconds = core.HistogramMetricFamily('hapolicy_query_seconds', 'time to each answer', labels=['service'])
        for service in self._proxy.pools:
            seconds.add_metric([service.name], buckets(service.tally), service.tally.sum)
        yield seconds


#: Of each metric but the histogram: kind, name, field of status.json, labels; docs/operations.md says what it counts.
METRICS: Sequence[tuple[str, str, str, list[str]]] = (
    *(('Counter', name, name, []) for name in ('requests', 'redispatches', 'retries', 'clients', 'log_lines_lost')),
    *(('Counter', name, name, ['reason']) for name in ('defaults', 'refused')),
    ('Counter', 'answers', 'verdicts', ['service', 'verdict']),
    ('Counter', 'failures', 'failures', ['service', 'reason']),
    *(('Gauge', f'service_{name}', name.removesuffix('_seconds'), ['service'])
      for name in ('up', 'stalled', 'full', 'max', 'in_flight', 'idle_connections', 'silent_seconds', 'p50_seconds',
                   'p95_seconds', 'p99_seconds')),
    *(('Gauge', name, field, []) for name, field in (('in_flight', 'in_flight'), ('oldest_request_seconds', 'oldest'),
      ('clients', 'clients_connected'), ('start_time_seconds', 'started'))),
)  # fmt: skip


def unix(then: float) -> float:
    """Return the unix seconds of monotonic seconds."""
    return round(time.time() - time.monotonic() + then, 3)


def ago(then: float) -> str:
    """Return monotonic seconds as the log's date and time, and how long ago that was."""
    return time.strftime(f'%b %e %H:%M:%S ({duration(time.monotonic() - then)} ago)', time.localtime(unix(then)))


def buckets(tally: Tally) -> list[tuple[str, int]]:
    """Return a histogram in Prometheus's form, with the 1-2-5 bounds alone."""
    names = [*(f'{bound:g}' for bound in BOUNDS[:-1]), '+Inf']
    counted = zip(names, itertools.accumulate(tally.answered), strict=True)
    return [(bound, count) for bound, count in counted if bound.strip('0.') in ('1', '2', '5', '+Inf')]


# --- Command line ----------------------------------------------------------------------------------------------------


def parse_action(text: str, option: str) -> bytes:
    """Return the action that an option gives, as bytes. Raises UsageError for one that Postfix would misread."""
    action = os.fsencode(text.strip(' '))
    allowed = "one line of UTF-8 with an action of access(5), as 'dunno' or '451 4.3.5 try again later'"
    with blaming(f"{option} '{text}'", allowed):
        if clean_action(action) != action or action.lower().startswith(b'action='):
            raise UsageError("'action=', a line break, a control character, or bytes that are not UTF-8")
        return action


def parse_listen(text: str, option: str) -> Address:
    """Return the address that an option gives to listen on. Raises UsageError."""
    with blaming(f"{option} '{text}'", '<IPv4>:<port>, [<IPv6>]:<port> or unix:/path'):
        address, _ = parse_address(text)
        if len(os.fsencode(os.path.dirname(address.host))) > 97:  # it first listens at another name there, of 9 bytes
            raise UsageError('a directory of over 97 bytes')
        if address.family == socket.AF_UNSPEC or str(address) != text:
            raise UsageError('a name, or more than an address')
        return address


def parse_word(text: str, option: str, pattern: str, allowed: str) -> str:
    """Return a word that has this form. Raises UsageError."""
    if not re.fullmatch(pattern, text):
        raise UsageError(f"{option} '{text}' is not {allowed}")
    return text


def parse_sticky(text: str, option: str) -> Sticky:
    """Return the Sticky of the attributes that an option names. Raises UsageError."""
    attributes: list[tuple[bytes, Callable[[bytes], bytes]]] = []
    with blaming(f"{option} '{text}'", 'attributes of policy requests, as client_address/24/64,sender,recipient'):
        for word in text.split(','):
            found = re.fullmatch(r'(\w+)(?:(?<=_address)/([^/]*)/([^/]*))?', word)
            if found is None or found[1] not in re.findall(r'(?m)^(\w+)=', CHECK.decode()):
                raise UsageError(f"'{word}' is no attribute, nor an address with two prefix lengths, IPv4 and IPv6")
            part_of: Callable[[bytes], bytes] = without_tags if found[1] == 'sender' else bytes
            if found[2] is not None:
                ipv4 = parse_number(found[2], 'IPv4 prefix length', 1, 32)
                part_of = functools.partial(network, ipv4, parse_number(found[3], 'IPv6 prefix length', 1, 128))
            attributes.append((found[1].encode(), functools.lru_cache(MAX_VALUES)(part_of)))
    return Sticky(text, attributes)


#: What reads the value of each option. All values of -s and --listen count, of each other option the last one.
PARSERS: dict[str, Callable[[str, str], Any]] = {
    '--service': lambda text, _: parse_service(text),
    '--listen': parse_listen,
    '--status': parse_listen,
    '--default': parse_action,
    '--failed': parse_action,
    '--socket-mode': lambda text, option: parse_word(text, option, '0?[0-7]{3}', 'an octal number from 000 to 777'),
    '--name': lambda text, option: parse_word(text, option, '[A-Za-z0-9_.-]{1,32}', '1 to 32 letters, digits, -, _, .'),
    '--max-clients': lambda text, option: parse_number(text, option, 1, 10**6),
    '--sticky': parse_sticky,
    '--fall': lambda text, option: parse_number(text, option, 1, 1000),
    '--stall': parse_seconds,
    '--deadline': lambda text, option: parse_seconds(text, option, MIN_DEADLINE),
    '--grace': parse_seconds,
    '--summary': lambda text, option: parse_seconds(text, option, 0),
}


def parse_command_line(argv: Sequence[str]) -> SimpleNamespace:
    """Return the options' values by name. Raises UsageError; SystemExit after --help and --version."""
    from docopt import DocoptExit, docopt

    version = f'hapolicy {__version__} ({"compiled" if __file__.endswith(".so") else "not compiled"})'
    try:
        with blaming('stdout'):  # where it prints the help and the version
            given: dict[str, Any] = docopt(__doc__, list(argv), version=version)
    except DocoptExit as error:
        reason = str(error).partition('\n')[0]
        if reason == 'Usage:':  # docopt names no reason
            unknown = [word for word in argv if (name := re.match('--[^=]+|-.', word)) and f' {name[0]}' not in __doc__]
            reason = (f"unknown option '{unknown[0]}'" if unknown else f"cannot use '{' '.join(argv)}': a word is no "
                      'option (quote values with blanks, and give each option its value)')  # fmt: skip
        raise UsageError(f'{reason}; see hapolicy --help') from None
    for option, parse in PARSERS.items():
        values = [parse(text, option) for text in given[option]]
        given[option] = values if option in ('--service', '--listen') else (values or [None])[-1]
    options = SimpleNamespace(**{name.lstrip('-').replace('-', '_'): value for name, value in given.items()})
    names = [service.name for service in options.service]
    if not names:
        raise UsageError('no --service given: at least one -s <name>=<address>:<port> is needed')
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--service '{twice[0]}' is given twice: each name is allowed once")
    for service in options.service:
        service.fall, service.stall = options.fall, options.stall
    options.failed = options.failed or options.default
    return options


def is_client(fd: int) -> bool:
    """Return whether a descriptor is the client's socket, as stdin is under spawn(8)."""
    return stat.S_ISSOCK(os.fstat(0).st_mode) and os.path.sameopenfile(0, fd)


def complain(text: str) -> None:
    """Report why the start has failed: one line on stderr, or in syslog where stderr is the client."""
    if is_client(2):
        Log('hapolicy').to_syslog([(WARNING, printable(text))])
    else:
        os.write(2, f'{MARK.format(ERROR)}hapolicy: {printable(text)}\n'.encode())


def make_log(options: SimpleNamespace, server: bool) -> Log:
    """Return the log that the options ask for; stdout and stderr are not used where they are the client."""
    ident, fd = options.name, 2 if (server and not is_client(2)) or os.isatty(2) else -1
    if options.stdout and (server or not is_client(1)):
        ident, fd = '', 1
    return Log(ident, fd, requests=options.logging > 0, verbose=options.verbose > 0)


def report_error(log: Log, context: object, kind: Any, value: Any, trace: Any) -> None:
    """Log what gevent would print on stderr: an accept() that failed, or an error of ours."""
    if hasattr(context, 'do_read') and isinstance(value, OSError):  # context is a StreamServer
        log(WARNING, f'Cannot accept a client: {value.strerror or value}; it waits in the backlog')
    elif not isinstance(context, tuple):  # of a thread: it is raised where that is waited for; the log's own has no end
        log(WARNING, printable('Internal error: ' + ''.join(traceback.format_exception(kind, value, trace))))


def check_service(service: Service, log: Log) -> tuple[Service, str, str]:
    """Ask a service our own question; return it, 'answered' or 'FAILED', and in words what came."""
    connection = Connection(Queue([service], log).pools[service], began := time.monotonic())
    try:
        connection.open()
        connected = time.monotonic()
        said, action = connection.check()
        if said is SURPLUS:
            raise ServiceFailure(INVALID, 'bytes after the answer: requests could get those of others')
    except ServiceFailure as failure:
        return service, 'FAILED', f'{failure.reason}: {failure}'
    times = f'connect {(connected - began) * 1000:6.1f} ms, answer {(service.heard_at - connected) * 1000:7.1f} ms'
    once = ', then it hangs up' if said is ENDED else ''
    return service, 'answered', f"{times}  {verdict(action)}: '{printable(action)}'{once}"


def check_services(services: Sequence[Service]) -> int:
    """Ask all services at once; print a line for each as it comes; return the exit status. Raises OSError."""
    names, addresses = max(len(each.name) for each in services), max(len(str(each.address)) for each in services)
    log, status = Log(), 0
    for check in gevent.iwait([gevent.spawn(check_service, service, log) for service in services]):
        service, result, text = check.get()
        line = f'{service.name:{names}}  {service.address!s:{addresses}}  {result:8}  {text}\n'
        with blaming('stdout'):
            os.write(1, line.encode('utf-8', 'backslashreplace'))
        status |= result == 'FAILED'
    return status


def compare_addresses(options: SimpleNamespace, ours: list[Address]) -> None:
    """Refuse a service, or a status, at an address where clients are served. Raises UsageError."""
    local = [each._replace(host={'0.0.0.0': '127.0.0.1', '::': '::1'}.get(each.host, each.host)) for each in ours]
    if own := [service for service in options.service if service.address in ours + local]:  # it would ask itself
        raise UsageError(f"--service '{own[0].name}': {own[0].address} is where hapolicy itself listens")
    if options.status and (not ours or options.status in ours):
        raise UsageError(f"--status '{options.status}' needs {'an address of its own' if ours else '--listen'}")


def open_listeners(options: SimpleNamespace) -> dict[Address, socket.socket]:
    """Return the listening sockets of --status and of all --listen. Raises OSError.

    If one fails, a process that --reuse-port is to replace goes on: sockets are moved to their paths last.
    """
    wanted = dict.fromkeys(options.listen, '--listen') | ({options.status: '--status'} if options.status else {})
    opened: dict[Address, socket.socket] = {}
    with contextlib.ExitStack() as undo:
        for address in sorted(wanted, key=lambda address: address.family != socket.AF_UNIX):
            with blaming(f"{wanted[address]} '{address}'"):
                opened[address] = sock = open_listener(address, int(options.socket_mode, 8), options.reuse_port > 0)
            if address.family == socket.AF_UNIX:
                undo.callback(os.unlink, sock.getsockname())
        undo.pop_all()
    for address, sock in opened.items():
        if address.family == socket.AF_UNIX:
            os.rename(sock.getsockname(), address.host)
    return opened


def open_listener(address: Address, mode: int, reuse: bool) -> socket.socket:
    """Return a socket that listens at a port, or beside a path. Raises OSError, also for a served path without `reuse`.

    It is moved to its path later, so that no client meets it missing, with the wrong mode, or not listening.
    """
    backlog = 1024  # a `postfix reload` brings all clients at once
    if address.family != socket.AF_UNIX:
        [(*_, where)] = socket.getaddrinfo(*address[1:], address.family, socket.SOCK_STREAM)  # the %scope as a number
        return socket.create_server(where, family=address.family, backlog=backlog, reuse_port=reuse)
    if os.path.exists(address.host) and not stat.S_ISSOCK(os.stat(address.host).st_mode):
        raise FileExistsError('a file that is no socket is there')
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        if not reuse:
            connect(socket.AF_UNIX, address.host).close()
            raise OSError('Address already in use')
    beside = os.path.join(os.path.dirname(address.host), f'.{os.urandom(4).hex()}')
    sock = socket.create_server(beside, family=socket.AF_UNIX, backlog=backlog)
    os.chmod(beside, mode)
    return sock


def inherited_listeners() -> dict[Address, socket.socket]:
    """Return the sockets handed over by systemd (sd_listen_fds(3)). Raises UsageError, OSError."""
    count = os.environ.get('LISTEN_FDS', '0') if os.environ.get('LISTEN_PID') == str(os.getpid()) else '0'
    listeners = {}
    for fd in range(3, 3 + parse_number(count, 'LISTEN_FDS', 0, 1000)):
        with blaming(f'descriptor {fd}, from systemd: allowed is ListenStream= with Accept=no'):
            sock = socket.socket(fileno=fd)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError('it is not listening')
            host, port = (sock.getsockname(), 0) if sock.family == socket.AF_UNIX else sock.getsockname()[:2]
            listeners[Address(sock.family, os.fsdecode(host), port)] = sock
    return listeners


def notify(state: str) -> None:
    """Send our state to systemd, if it asked for that (sd_notify(3))."""
    path = re.sub('^@', '\0', os.environ.get('NOTIFY_SOCKET', ''))
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), path)


def client_limit(options: SimpleNamespace, log: Log) -> int:
    """Raise the soft descriptor limit to the hard one; return how many clients to serve at once.

    Each service may need `max` connections; the rest is for clients, and half at least: more could get no answer.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # the kernel's own limit (fs.nr_open) may be lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # 16 for listeners, log, epoll, checks and lookups
    room = limit - 16 - (STATUS_CONNECTIONS + 1 if options.status is not None else 0)
    carried: int = max(1, room - sum(service.max for service in options.service), room // 2)
    if (asked := options.max_clients or carried) > carried:
        log(WARNING, f"--max-clients '{asked}' is more than the descriptor limit of {limit} carries: {carried} it is")
    return min(asked, carried)


def review(options: SimpleNamespace, log: Log) -> None:
    """Warn of options that are allowed, but hardly meant; cut timeouts so that a request has time for two services."""
    if os.geteuid() == 0:
        log(WARNING, 'Started as root: run it as a user without privileges')
    for action, option in {options.failed: '--failed', options.default: '--default'}.items():  # one, if they are equal
        if action.split()[0].lower() not in VERDICT_OF and verdict(action) is OTHER:
            log(WARNING, f"{option} '{printable(action)}' is no action of access(5), unless it names a restriction")
    longest = options.deadline / min(2, len(options.service))
    for service in options.service:
        if service.timeout > longest:
            log(WARNING, f'The timeout of {service.name}, {service.timeout:g}s, is cut to {longest:g}s by --deadline')
            service.timeout = longest


def stop_signal() -> Event:
    """Return what SIGTERM and SIGINT set; the second of them ends the process."""
    asked = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, lambda: os._exit(1) if asked.is_set() else asked.set())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is no configuration to read again, and mail is in flight
    return asked


def serve_stdin(proxy: Proxy, stop: Event, grace: float, log: Log) -> bool:
    """Serve the one client on stdin and stdout; return False if its answers could not all be given."""
    if is_client(1):
        served: Any = gevent.spawn(proxy.handle, socket.socket(fileno=os.dup(0)))
    else:  # the loop cannot wait for files, pipes and terminals: threads copy from and to them
        log(NOTICE, 'Without --listen and sockets of systemd one client is served, on stdin')
        sock, far = socket.socketpair()
        for fd in (0, 1, far.fileno()):
            os.set_blocking(fd, True)
        spawn: Any = gevent.get_hub().threadpool.spawn
        spawn(copy, 0, far.fileno()).rawlink(lambda _: far.shutdown(socket.SHUT_WR))
        gevent.spawn(proxy.handle, sock)
        served = spawn(copy, far.fileno(), 1)
        served.rawlink(lambda _: far.shutdown(socket.SHUT_RDWR))
    gevent.wait([served, stop], count=1)
    give_up = time.monotonic() + grace
    proxy.drain(grace)
    gevent.wait([served], max(0.0, give_up - time.monotonic()))
    return served.successful() and served.value is not False


def copy(source: int, target: int) -> bool:
    """Copy all that can be read, in a thread of its own; return whether all of it was written."""
    with contextlib.suppress(OSError):
        while data := os.read(source, RECEIVE):
            while data:
                data = data[os.write(target, data) :]
        return True
    return False


def start_server(listener: socket.socket, handle: Callable[..., None], greenlets: Any) -> Any:
    """Serve each connection by a greenlet, of this pool if it is one; return the StreamServer."""
    from gevent.server import StreamServer

    server = StreamServer(listener, handle, spawn=greenlets)
    server.delay = server.min_delay = 1  # seconds without accepting after an error, and so between its lines in the log
    server.start()
    return server


def serve_listeners(listeners: dict[Address, socket.socket], proxy: Proxy, stop: Event,
                    options: SimpleNamespace, log: Log) -> bool:  # fmt: skip
    """Serve clients until stopped; return False if some were left at the end of the grace."""
    from gevent.pool import Pool as GreenletPool

    limit = options.max_clients = client_limit(options, log)
    greenlets: Any = GreenletPool(limit)  # one for each client
    servers = [start_server(listener, proxy.handle, greenlets) for listener in listeners.values()]
    log(NOTICE, f'hapolicy {__version__} serves up to {limit} clients at {printable(", ".join(map(str, listeners)))}')
    if options.summary:
        gevent.spawn(proxy.summarize, options.summary)
    notify('READY=1')
    logged = -math.inf  # when it was logged that further clients wait (monotonic seconds)
    while not stop.wait(1):
        if greenlets.full() and time.monotonic() - logged > LOG_AGAIN:
            log(WARNING, f'{limit} clients are served, the most allowed: more wait in the backlog')
            logged = time.monotonic()
    notify('STOPPING=1')
    for server in servers:
        with contextlib.suppress(OSError):
            while not greenlets.full() and (accepted := server.do_read()):
                server.do_handle(*accepted)  # close() would reset the clients that wait in the backlog
        server.close()
    clean = proxy.drain(options.grace)
    log(NOTICE, f'hapolicy ends, {proxy.statistics}')
    return clean


def patch_sockets() -> None:
    """Do what monkey.patch_socket() does, but for its search for plug-ins: it would cost each smtpd 20 to 80 ms."""
    for name in gevent.socket.__implements__:  # type: ignore[attr-defined]
        setattr(socket, name, getattr(gevent.socket, name))


def protect_client() -> None:
    """See that nothing but answers reaches descriptors 0 to 2, which may be the client."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # a closed one would become a listener, and get the lines for stderr
        pass
    warnings.simplefilter('ignore')  # docopt 0.6.2 causes some when a newer Python compiles it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until stop_signal(): its traceback could go to the client


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    protect_client()
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        patch_sockets()
        gc.set_threshold(50000, 20, 100)  # the usual thresholds hold up 15,000 clients for 0.2 s at a time
        gevent.config.format_context = 'builtins.repr'  # not used; the hub's default imports pprint and more, for 10 ms
        hub: Any = gevent.get_hub()
        hub.threadpool_size += len(options.service)  # the lookup of each host name may hang in a thread
        if options.check_services:
            return check_services(options.service)
        listeners = inherited_listeners()
        compare_addresses(options, [*listeners, *options.listen])
        listeners.update(open_listeners(options))
    except (UsageError, OSError) as error:
        complain(str(error))
        return 2 if isinstance(error, UsageError) else 1
    status = listeners.pop(options.status, None)
    stop = stop_signal()
    log = make_log(options, bool(listeners))
    hub.print_exception = functools.partial(report_error, log)
    review(options, log)
    proxy = Proxy(options.service, options.default, options.failed, options.deadline, log, checked=bool(listeners))
    proxy.queue.balancer.sticky = options.sticky
    if status is not None:
        options.listen, options.status = [*map(str, listeners)], str(options.status)
        server = start_server(status, Status(proxy, options, log).handle, 'default')
        if options.reuse_port:  # while we drain, the process that replaces us serves it
            stop.rawlink(lambda _: server.close())
        log(NOTICE, f'The status is served at {options.status}')
    clean = (serve_listeners(listeners, proxy, stop, options, log) if listeners
             else serve_stdin(proxy, stop, options.grace, log))  # fmt: skip
    log.close()
    return 0 if clean else 1


#: The status page, whole. The browser gets the hashes of its style and script and runs no other; what the
#: proxy reports is put in as text, never as markup.
STATUS_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hapolicy</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #fff; --soft: #f3f5f7; --line: #d5dae0; --text: #1a1f26; --dim: #59636f;
  --good: #17692f; --warn: #855000; --bad: #b3161b; --bars: #3d78b8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181d; --soft: #1d232a; --line: #38414b; --text: #e6eaef; --dim: #a3adb8;
    --good: #6fd08c; --warn: #f0b450; --bad: #ff8a85; --bars: #6ea8e4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 88rem; background: var(--back); color: var(--text);
  font: 0.9375rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
header, footer { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.5rem 0; color: var(--dim); }
h1, h2 { margin: 0 auto 0 0; font-size: 1rem; }
h2 { margin: 1.5rem 0 0.5rem; }
#headline, #old { margin: 0.75rem 0; padding: 0.75rem 1rem; font-weight: 600; }
#headline { border-left: 0.5rem solid var(--level); background: var(--soft); font-size: 1.125rem; }
.ok, .up { --level: var(--good); }
.warning, .trial, .stalled { --level: var(--warn); }
.bad, .down { --level: var(--bad); }
#old { border: 2px dashed var(--bad); color: var(--bad); }
.aged #figures, .aged #headline { opacity: 0.6; }
button { font: inherit; padding: 0.25rem 0.9rem; }
:focus-visible { outline: 3px solid; outline-offset: 2px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.5rem; margin: 0; }
dl div { padding: 0.4rem 0.7rem; background: var(--soft); }
dt, th, .two { color: var(--dim); font-size: 0.8125rem; }
dd, td div { margin: 0; white-space: pre-line; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 600; white-space: nowrap; }
th, td { padding: 0.5rem 0.6rem 0.5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { min-width: 10rem; }
td .list { white-space: pre; }
.words { grid-template-columns: 5rem minmax(0, 1fr); gap: 0.25rem; }
.two::first-line { font-size: 0.9375rem; font-weight: 600; color: var(--text); }
.state::first-line { color: var(--level); }
svg { display: block; width: 15rem; max-width: 100%; height: 3rem; background: var(--soft); }
.answers { fill: var(--bars); }
.failed { fill: var(--bad); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 62rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { margin-bottom: 1rem; padding: 0.5rem 0.75rem; border: 1px solid var(--line); }
  td { display: grid; grid-template-columns: 7rem minmax(0, 1fr); padding: 0.2rem 0; border: 0; }
  td::before { content: attr(data-label); color: var(--dim); font-size: 0.8125rem; }
  td > * { grid-column: 2; }
}
</style>
<header>
<h1>hapolicy <span id="program"></span></h1>
<span id="updated"></span>
<button id="pause" type="button" aria-pressed="false">Pause</button>
</header>
<main>
<p id="headline"></p>
<p id="spoken" class="hidden" aria-live="polite"></p>
<p id="old" role="alert" hidden></p>
<noscript><p>This page needs JavaScript; status.json, metrics and health, below, do not.</p></noscript>
<div id="figures" hidden>
<dl id="totals"></dl>
<h2 id="services-title">Services</h2>
<table role="table" aria-labelledby="services-title">
<thead role="rowgroup"><tr role="row" id="columns"></tr></thead>
<tbody role="rowgroup" id="services"></tbody>
</table>
<h2>Options in effect</h2>
<dl id="options"></dl>
</div>
<h2>Words</h2>
<dl class="words">
<dt>check</dt><dd>a request of hapolicy's own, which each new connection has to answer before it carries mail</dd>
<dt>up</dt><dd>the last check passed, or mail was answered: it gets mail</dd>
<dt>down</dt><dd>it gets no mail until a check passes</dd>
<dt>on trial</dt><dd>it answers checks, but mail failed: it gets a few mails at a time until one is answered</dd>
<dt>stalled</dt><dd>mail is in flight and none is answered: new mail goes elsewhere, if another one is up</dd>
<dt>full</dt><dd>it serves so many connections, and one more has to wait or is ended; it stays up</dd>
<dt>single use</dt><dd>the server ends a connection after its answer, so each carries one request</dd>
<dt>p99</dt><dd>what 99 of 100 queries took at most in the last minute; one without an answer counts, too</dd>
</dl>
</main>
<footer><a href="status.json">status.json</a><a href="metrics">metrics</a><a href="health">health</a></footer>
<script>
'use strict';
const SVG = 'http://www.w3.org/2000/svg';
const CLASSES = {'State': 'two state', 'Latency': 'list', 'Answers': 'list', 'Failures': 'list', 'Last 10 min': 'list'};
const $ = id => document.getElementById(id);
const look = service => service.stalled && service.state === 'up' ? 'stalled' : service.state;
let states = '', loaded = '', paused = false, timer = 0;

const COLUMNS = {
  'Service': service => `${service.name}\n${service.address}\nprio ${service.prio}, weight ${service.weight}`,
  'State': service => `${look(service).replace('trial', 'on trial')}\n${service.text.replace('): ', ')\n')}`
    + (service.last_failure && service.state !== 'down' ? `\nlast failure: ${service.last_failure}` : ''),
  'In flight': service => `${service.in_flight} / ${service.max}\n`
    + (service.full === null ? '' : `full: serves ${service.full} connections\n`)
    + `${service.waiting} waiting\n${service.idle_connections} idle connections, ${service.use}`,
  'Requests/s': service => `${service.requests_per_second}\n${(100 * service.share).toFixed(0)} % of answers`,
  'Latency': service => service.latency.join('\n'),
  'Answers': service => counts(service.verdicts),
  'Failures': service => counts(service.failures),
  'Last 10 min': service => `top ${Math.max(0, ...service.history.answers).toLocaleString()} answers in 5 s`,
};
const totals = data => ({
  'Requests': data.requests.toLocaleString(),
  'In flight': data.in_flight.toLocaleString(),
  'Default actions': counts(data.defaults),
  'Clients': `${data.clients_connected} connected\n${data.clients.toLocaleString()} in all`,
  'Refused input': counts(data.refused),
  'Asked again': `next service ${data.redispatches.toLocaleString()}\nsame service ${data.retries.toLocaleString()}`,
  'Log lines lost': data.log_lines_lost.toLocaleString(),
});
const counts = by => Object.entries(by).filter(pair => pair[1])
  .map(([name, count]) => `${name} ${count.toLocaleString()}`).join('\n') || 'none';
// only what changed: a selection lives on
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const set = (node, name, value) => { if (node.getAttribute(name) !== value) node.setAttribute(name, value); };
function add(parent, tag, attributes = {}) {
  const space = parent.namespaceURI === SVG || tag === 'svg' ? SVG : 'http://www.w3.org/1999/xhtml';
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return parent.appendChild(node);
}
function make_row() {
  const row = add($('services'), 'tr', {role: 'row'});
  for (const column of Object.keys(COLUMNS)) {
    const cell = add(row, 'td', {role: 'cell', 'data-label': column});
    if (column === 'Last 10 min') {
      const chart = add(cell, 'svg', {role: 'img', viewBox: '0 0 120 24', preserveAspectRatio: 'none'});
      for (const kind of ['answers', 'failed']) add(chart, 'path', {class: kind});
    }
    add(cell, 'div', {class: CLASSES[column] || 'two'});
  }
  return row;
}
function show_tiles(list, texts) {
  Object.entries(texts).forEach(([name, text], i) => {
    const tile = list.children[i] || add(list, 'div');
    put(tile.children[0] || add(tile, 'dt'), name);
    put(tile.children[1] || add(tile, 'dd'), [text].flat().join('\n'));
  });
}
const bars = (values, from, height) =>
  values.map((n, i) => n ? `M${120 - values.length + i} ${from}h1v${height(n)}h-1z` : '').join('');
function show_service(service, i) {
  const row = $('services').children[i] || make_row(), {answers, failed} = service.history;
  set(row, 'class', look(service));
  Object.values(COLUMNS).forEach((text, column) => put(row.children[column].lastChild, text(service)));
  const most = Math.max(1, ...answers), svg = row.querySelector('svg');
  set(svg.children[0], 'd', bars(answers, 24, n => -Math.max(0.5, 17 * n / most).toFixed(1)));
  set(svg.children[1], 'd', bars(failed, 0, () => 5));
  set(svg, 'aria-label', `Answers of the last ten minutes: ${row.lastChild.textContent}`);
}
function show(data) {
  data.services.forEach(show_service);
  while ($('services').children[data.services.length]) $('services').lastChild.remove();
  show_tiles($('totals'), totals(data));
  show_tiles($('options'), data.options);
  put($('headline'), data.headline.text);
  set($('headline'), 'class', data.headline.level);
  const now = JSON.stringify([data.draining, data.services.map(look)]);
  if (states && now !== states) put($('spoken'), data.headline.text);  // said aloud when a state changes, not its age
  states = now;
  document.title = `${{ok: 'OK', warning: 'warning', bad: 'DOWN'}[data.headline.level]} - ${data.options.name}`;
  put($('program'), `${data.program} on ${data.host}`);
  loaded = new Date().toLocaleTimeString();
  put($('updated'), `as of ${loaded}`);
  $('figures').hidden = false;
}
async function load() {
  let failure = '';
  try {
    const answer = await fetch('status.json', {cache: 'no-store', signal: AbortSignal.timeout(5000)});
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const data = await answer.json();
    if (!paused) show(data);
  } catch (error) {
    failure = error.message;
  }
  if (paused) return;
  put($('old'), `No answer from the proxy: this is of ${loaded || 'no time'}. (${failure})`);
  if (failure) document.title = `no answer - ${document.title.split(' - ').pop()}`;
  $('old').hidden = !failure;
  document.body.className = failure && 'aged';
  clearTimeout(timer);
  timer = setTimeout(load, 2000);
}
$('pause').addEventListener('click', () => {
  paused = !paused;
  set($('pause'), 'aria-pressed', String(paused));
  put($('updated'), `${paused ? 'paused; ' : ''}as of ${loaded}`);
  if (!paused) load();
});
for (const column of Object.keys(COLUMNS)) put(add($('columns'), 'th', {role: 'columnheader', scope: 'col'}), column);
load();
</script>
"""


if __name__ == '__main__':
    sys.exit(main())

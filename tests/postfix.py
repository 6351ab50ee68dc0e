"""A private Postfix, and Debian's policy servers, started as their users start them.

Nothing here touches the system's own Postfix: configuration, queue, data and log stand in a
temporary directory of the instance. All of it wants root, as Postfix does.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import smtplib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.support import SCALE, accepts, free_port, wait_until

#: A file of each of Debian's packages that are needed.
PROGRAMS = {
    '/usr/sbin/postfix': 'postfix',
    '/usr/sbin/postgrey': 'postgrey',
    '/usr/sbin/postfwd': 'postfwd',
    '/usr/lib/python3/dist-packages/gevent/__init__.py': 'python3-gevent',
    '/usr/lib/python3/dist-packages/docopt.py': 'python3-docopt',
}
PYTHON = '/usr/bin/python3'

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log/mail.log
maillog_file_prefixes = {directory}/log
multi_instance_enable = no
myhostname = mx.example.org
mydomain = example.org
mydestination = example.org
mynetworks = 127.0.0.1/32
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
disable_dns_lookups = yes
smtpd_peername_lookup = no
local_transport = discard:
default_transport = error:only example.org is served here
local_recipient_maps =
alias_maps =
alias_database =
smtpd_tls_security_level = none
smtpd_relay_restrictions = reject_unauth_destination
smtpd_recipient_restrictions = {restrictions}
header_checks = regexp:{directory}/etc/header_checks
queue_minfree = 0
smtpd_error_sleep_time = 0s
smtpd_hard_error_limit = 1000
in_flow_delay = 0s
"""

MASTER_CF = """\
127.0.0.1:{port} inet n - {chroot} - - smtpd
pickup    unix  n - n 60   1 pickup
cleanup   unix  n - n -    0 cleanup
qmgr      unix  n - n 300  1 qmgr
rewrite   unix  - - n -    - trivial-rewrite
bounce    unix  - - n -    0 bounce
defer     unix  - - n -    0 bounce
trace     unix  - - n -    0 bounce
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n -    - proxymap
showq     unix  n - n -    - showq
error     unix  - - n -    - error
retry     unix  - - n -    - error
discard   unix  - - n -    - discard
anvil     unix  - - n -    1 anvil
postlog   unix-dgram n - n - 1 postlogd
"""

#: A header that a test looks for is told in the log; the mail itself is discarded.
HEADER_CHECKS = '/^X-/ WARN\n'


def missing_programs() -> str:
    """Return what is not installed of PROGRAMS, as text."""
    return ', '.join(package for program, package in PROGRAMS.items() if not os.path.exists(program))


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def arguments(pid: int) -> list[str]:
    """Return the command line of a process, nothing if it has ended."""
    try:
        return os.fsdecode(Path(f'/proc/{pid}/cmdline').read_bytes()).split('\0')[:-1]
    except OSError:
        return []


def processes(directory: Path) -> list[int]:
    """Return the processes that work in a directory, or were started with its name on their command line."""
    found = []
    for pid in [int(name) for name in os.listdir('/proc') if name.isdigit()]:
        with contextlib.suppress(OSError):
            where = os.readlink(f'/proc/{pid}/cwd')
            if alive(pid) and (where.startswith(str(directory)) or str(directory) in ' '.join(arguments(pid))):
                found.append(pid)
    return found


class Postfix:
    """A Postfix of its own, from `with` to its end: mail for example.org is taken and discarded.

    `restrictions` are its smtpd_recipient_restrictions, `master` further lines of master.cf and
    `settings` further parameters of main.cf. `{directory}` in any of them is the instance's own
    directory, which everybody may enter. With `chroot` smtpd sees its queue directory alone, as Debian has it.
    """

    def __init__(self, restrictions: str = '', master: str = '', settings: Mapping[str, str] | None = None,
                 chroot: bool = False) -> None:  # fmt: skip
        self.port = free_port()
        self._last_log = ''
        self.directory = Path(tempfile.mkdtemp(prefix='hapolicy-postfix-'))
        self.directory.chmod(0o755)  # the users postfix and nobody go through
        for name in ('etc', 'queue', 'data', 'log'):
            (self.directory / name).mkdir(mode=0o755)
        shutil.chown(self.directory / 'data', 'postfix')
        main = MAIN_CF.replace('{restrictions}', restrictions)
        main += ''.join(f'{name} = {value}\n' for name, value in (settings or {}).items())
        for name, text in (('main.cf', main), ('master.cf', MASTER_CF + master), ('header_checks', HEADER_CHECKS)):
            text = text.replace('{directory}', str(self.directory)).replace('{port}', str(self.port))
            text = text.replace('{chroot}', 'y' if chroot else 'n')
            path = self.directory / 'etc' / name
            path.write_text(text)
            os.utime(path, (1e9, 1e9))  # Postfix waits 2 s for a file just written to be complete

    def command(self, name: str) -> None:
        """Run `postfix start`, `stop`, `reload`... on this instance."""
        done = subprocess.run(
            ['/usr/sbin/postfix', '-c', str(self.directory / 'etc'), name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60 * SCALE,
            env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'},
        )  # fmt: skip
        assert done.returncode == 0, f'postfix {name}: {done.stdout.decode()}\n{self.log}'

    @property
    def log(self) -> str:
        """Everything it has logged; also after its end."""
        try:
            return (self.directory / 'log' / 'mail.log').read_text(errors='backslashreplace')
        except FileNotFoundError:
            return self._last_log

    def logged(self, text: str, seconds: float = 20) -> None:
        """Wait until the log holds `text`."""
        wait_until(lambda: text in self.log, seconds, f'{text!r} in the log:\n{self.log[-3000:]}')

    @property
    def delivered(self) -> int:
        """Recipients to whom mail was delivered."""
        return self.log.count('status=sent')

    @property
    def complaints(self) -> list[str]:
        """Warnings and worse of its log, but for those of header_checks, of the clock, and of reloads.

        header_checks was told to give some. A reload ends trivial-rewrite while a cleanup may be asking it.
        """
        lines = re.findall(r'.*: (?:warning|error|fatal|panic): .*', self.log)
        expected = r'warning: (header X-|file system clock|resetting file time|problem talking to service rewrite: )'
        return [line for line in lines if not re.search(expected, line)]

    def headers(self, name: str) -> list[str]:
        """Return the headers of that name that any mail had, as logged."""
        return re.findall(rf'warning: header ({re.escape(name)}: .*?) from ', self.log)

    def client(self) -> smtplib.SMTP:
        """Connect as a mail client."""
        return smtplib.SMTP('127.0.0.1', self.port, 'client.example.net', timeout=60 * SCALE)

    def send(self, sender: str = 'alice@example.net', recipient: str = 'bob@example.org') -> tuple[int, str]:
        """Send one mail in a session of its own; return how RCPT TO or, if that is taken, the mail is replied to."""
        with self.client() as client:
            return send_in(client, sender, recipient)

    @contextlib.contextmanager
    def load(self, mails: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Send so many mails meanwhile, in four sessions at once: each has to be replied to with 250."""
        load = subprocess.Popen(
            ['/usr/sbin/smtp-source', '-s', '4', *options, '-m', str(mails), '-l', '500', '-f', 'alice@example.net',
             '-t', 'bob@example.org', f'127.0.0.1:{self.port}'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield load
            said, _ = load.communicate(timeout=120 * SCALE)
        finally:
            load.kill()
            load.wait()
        assert (load.returncode, said) == (0, b''), 'a mail was not replied to with 250'

    def __enter__(self) -> Postfix:
        try:
            self.command('start')
            wait_until(lambda: accepts(self.port), 20, 'Postfix listens')
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop it and remove its directory; fail if a process of its own stays."""
        try:
            if accepts(self.port):
                self.command('stop')
            wait_until(lambda: not processes(self.directory), 20, 'all that Postfix had started has ended')
        finally:
            self._last_log = self.log
            for pid in processes(self.directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.directory, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.close()


def send_in(client: smtplib.SMTP, sender: str = 'alice@example.net', *recipients: str) -> tuple[int, str]:
    """Send one mail in a session; return the first reply that refuses a recipient, or the one that takes the mail."""
    client.ehlo_or_helo_if_needed()
    code, text = client.mail(sender)
    assert code == 250, text
    for recipient in recipients or ('bob@example.org',):
        code, text = client.rcpt(recipient)
        if code != 250:
            client.rset()
            return code, text.decode()
    code, text = client.data(f'From: {sender}\r\nSubject: test\r\n\r\ntext\r\n')
    return code, text.decode()


class Daemon:
    """A policy server that puts itself in the background, as its init script has it."""

    def __init__(self, port: int, directory: Path) -> None:
        self.port, self.directory = port, directory
        self._command: tuple[str, ...] = ()
        self._leader = 0  # its first process, whose session all its others are in

    @property
    def session(self) -> list[int]:
        """All its processes that run."""
        found = []
        for pid in [int(name) for name in os.listdir('/proc') if name.isdigit()]:
            with contextlib.suppress(ProcessLookupError):
                if self._leader and os.getsid(pid) == self._leader and alive(pid):
                    found.append(pid)
        return sorted(found)

    def start(self, *command: str) -> None:
        """Run the command and wait until it listens."""
        self._command = command
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=60 * SCALE)  # fmt: skip
        assert done.returncode == 0, f'{command} ended with {done.returncode}'
        pidfile = self.directory / 'pid'
        wait_until(lambda: pidfile.exists() and pidfile.read_text().strip(), 20, f'{pidfile} is written')
        self._leader = int(pidfile.read_text())
        wait_until(lambda: accepts(self.port), 20, f'{command[0]} listens')

    def start_again(self) -> None:
        """Start it as before, after it was killed; what it has stored is there."""
        (self.directory / 'pid').unlink(missing_ok=True)
        self.start(*self._command)

    def kill(self) -> None:
        """Kill all its processes with SIGKILL, as the kernel does that is out of memory."""

        def dead() -> bool:
            for pid in self.session:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.session

        wait_until(dead, 20, 'it is dead')

    def close(self) -> None:
        """End it, if a test has not."""
        try:
            self.kill()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def _directory(name: str, user: str) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=f'hapolicy-{name}-'))
    os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
    directory.chmod(0o755)
    return directory


def _closing(daemon: Daemon, start: Callable[[], None]) -> Iterator[Daemon]:
    try:
        start()
        yield daemon
    finally:
        daemon.close()


@contextlib.contextmanager
def postgrey(port: int, delay: int = 2, *options: str) -> Iterator[Daemon]:
    """Run postgrey with an empty database; a mail is to be tried again after `delay` seconds."""
    directory = _directory('postgrey', 'postgrey')
    daemon = Daemon(port, directory)
    yield from _closing(daemon, lambda: daemon.start(
        '/usr/sbin/postgrey', '--daemonize', f'--inet=127.0.0.1:{port}', f'--delay={delay}', f'--dbdir={directory}',
        f'--pidfile={directory}/pid', *options))  # fmt: skip


@contextlib.contextmanager
def postfwd(port: int, rules: str, *options: str) -> Iterator[Daemon]:
    """Run postfwd with these rules, as Debian's unit starts it."""
    directory = _directory('postfwd', 'postfw')
    (directory / 'postfwd.cf').write_text(rules)
    daemon = Daemon(port, directory)
    yield from _closing(daemon, lambda: daemon.start(
        '/usr/sbin/postfwd', '--nodns', f'--cache_socket=unix::{directory}/cache', *options, '--daemon',
        f'--file={directory}/postfwd.cf', '--interface=127.0.0.1', f'--port={port}', '--user=postfw',
        '--group=postfw', f'--pidfile={directory}/pid'))  # fmt: skip

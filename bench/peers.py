"""The proxies that bench/compare.py compares: how each is started, and what it costs the machine.

All of them stand at a port of 127.0.0.1 in front of the same policy servers. What is not installed is left out.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.processes import MODULE, ROOT, PolicyService, Process, Processes, StartError, free_port

PERL = '/usr/sbin/hapolicy'
POSTFIX = '/usr/sbin/postfix'
MASTER = '/usr/lib/postfix/sbin/master'
#: Built with all optimizations, which a Python that was compiled by hand may lack; its gevent is older.
DEBIAN_PYTHON = '/usr/bin/python3'
DEBIAN_GEVENT, DEBIAN_DOCOPT = (f'/usr/lib/python3/dist-packages/{name}' for name in ('gevent', 'docopt.py'))
#: python3 -m venv .venv-compiled && HAPOLICY_USE_MYPYC=1 .venv-compiled/bin/pip install .
COMPILED_VENV = ROOT / '.venv-compiled'
COMPILED_PROGRAM = COMPILED_VENV / 'bin' / 'hapolicy'
NGINX_STREAM = '/usr/lib/nginx/modules/ngx_stream_module.so'
#: Seconds of a clock tick of /proc.
TICK = 1 / os.sysconf('SC_CLK_TCK')

HAPROXY_CFG = """\
global
    nbthread 1
    maxconn 8000
defaults
    mode tcp
    option redispatch
    timeout connect 5s
    timeout client 1100s
    timeout server 1100s
listen policy
    bind 127.0.0.1:{port}
"""

#: What a knowing user adds: a check that asks a policy request, and an end to the connections of what is down.
HAPROXY_RECIPE = """\
    balance leastconn
    option tcp-check
    timeout check 1s
    tcp-check send request=smtpd_access_policy\\nprotocol_state=RCPT\\nclient_address=127.0.0.1\\n\\n
    tcp-check expect string action=
"""

NGINX_CONF = """\
load_module {stream};
daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 10000; }}
stream {{
    upstream policy {{ {servers} }}
    server {{ listen 127.0.0.1:{port}; proxy_pass policy; proxy_timeout 1100s; }}
}}
"""

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log/mail.log
maillog_file_prefixes = {directory}/log
multi_instance_enable = no
myhostname = mx.example.org
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
alias_maps =
alias_database =
"""

# without a log daemon the ancestor warns on stderr, which is the connection to Postfix
MASTER_CF = """\
postlog unix-dgram n - n - 1 postlogd
127.0.0.1:{port} inet n n n - 0 spawn user=nobody argv=/bin/sh -c {{ exec {command} 2>/dev/null }}
"""


class Cpu(NamedTuple):
    """Seconds of processor."""

    user: float
    system: float

    @property
    def sum(self) -> float:
        """Both together."""
        return self.user + self.system

    def per(self, requests: int, since: Cpu) -> Cpu:
        """Return what one request cost since an earlier reading."""
        return Cpu((self.user - since.user) / requests, (self.system - since.system) / requests)


def tree(pid: int) -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat, from the state on, of a process and all its descendants."""
    stats: dict[int, list[str]] = {}
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            stats[int(name)] = Path(f'/proc/{name}/stat').read_text().rsplit(')', 1)[1].split()
        except OSError:
            continue  # it has ended
    found, grown = {pid} & stats.keys(), True
    while grown:
        more = {one for one, fields in stats.items() if int(fields[1]) in found}
        grown = not more <= found
        found |= more
    return {one: stats[one] for one in found}


@dataclass
class Running:
    """A peer that serves."""

    port: int
    pid: int = 0  # 0: no proxy at all
    path: str = ''  # of its unix socket, asked in place of the port

    @property
    def where(self) -> str:
        """The address that clients ask at."""
        return f'unix:{self.path}' if self.path else f'127.0.0.1:{self.port}'

    def cpu(self) -> Cpu:
        """Return what it has used since its start, with all its descendants, also those that have ended."""
        fields = tree(self.pid).values() if self.pid else ()
        return Cpu(sum(int(one[11]) + int(one[13]) for one in fields) * TICK,
                   sum(int(one[12]) + int(one[14]) for one in fields) * TICK)  # fmt: skip

    def memory(self) -> int:
        """Return the bytes it uses alone: without files mapped, and without what the kernel keeps for sockets."""
        total = 0
        for pid in tree(self.pid):
            for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
                if line.startswith('Anonymous:'):
                    total += int(line.split()[1]) * 1024
        return total


@dataclass
class Stage:
    """Where a peer is started: the policy servers behind it, and a directory for its configuration."""

    processes: Processes
    services: Sequence[PolicyService]
    directory: Path

    def write(self, name: str, text: str) -> Path:
        """Write a file of configuration and return its path."""
        path = self.directory / name
        path.parent.mkdir(mode=0o755, exist_ok=True)
        path.write_text(text)
        return path

    def start(self, *command: str) -> Process:
        """Start a process that ends with the stage."""
        return self.processes.start(command)

    def serve(self, port: int, *command: str) -> Running:
        """Start a process and wait until it serves. Raises StartError."""
        process = self.start(*command)
        process.wait_ready(port)
        return Running(port, process.process.pid)


def direct(stage: Stage) -> Running:
    """Return the first policy server itself."""
    return Running(stage.services[0].port)


def ours(
    stage: Stage, *options: str, fields: str = '', program: Sequence[str] = (sys.executable, str(MODULE)),
    known: bool = True,
) -> Running:  # fmt: skip
    """Start this project's proxy; `fields` is prio:weight:timeout:max of each service, if it is to know those."""
    port = free_port()
    command = [*program, f'--listen=127.0.0.1:{port}', '--stdout', *options]
    command += [f'-s{service.service}:{fields}' for service in stage.services if known]
    return stage.serve(port, 'sh', '-c', f'exec {shlex.join(command)} >/dev/null')


def ours_at_unix_sockets(stage: Stage) -> Running:
    """Start it with policy servers like the others, and unix sockets on both sides."""
    services = []
    for service in stage.services:
        path = stage.directory / service.name
        stage.start(sys.executable, '-m', 'bench.policy_service', f'--listen=unix:{path}', f'--name={service.name}')
        services.append(f'--service={service.name}=unix:{path}')
    path = stage.directory / 'policy'
    started = ours(stage, f'--listen=unix:{path}', program=[sys.executable, str(MODULE), *services], known=False)
    return Running(started.port, started.pid, str(path))


def ours_by_debian(stage: Stage) -> Running:
    """Start it as a copied file on a Debian host that has python3-gevent and python3-docopt."""
    return ours(stage, program=[DEBIAN_PYTHON, str(MODULE)])


def ours_compiled(stage: Stage) -> Running:
    """Start it as it is installed with HAPOLICY_USE_MYPYC=1. Raises StartError."""
    installed = [path.read_bytes() for path in COMPILED_VENV.glob('lib/*/site-packages/hapolicy_gevent.py')]
    if installed != [MODULE.read_bytes()] or not list(COMPILED_VENV.glob('lib/*/site-packages/hapolicy_gevent.*.so')):
        raise StartError(f'{COMPILED_VENV} has not this version, compiled: install it again')
    return ours(stage, program=[str(COMPILED_PROGRAM)])


def ours_logging(stage: Stage) -> Running:
    """Start it with a line logged for each request, to nowhere."""
    return ours(stage, '-l')


def haproxy(stage: Stage, more: str = '', server: str = '') -> Running:
    """Start HAProxy with one thread; `more` goes to its configuration, `server` to each server's line."""
    port = free_port()
    text = HAPROXY_CFG.format(port=port) + more
    for service in stage.services:
        text += f'    server {service.name} 127.0.0.1:{service.port} check inter 1s fall 2 rise 2 {server}\n'
    path = stage.write(f'haproxy-{port}.cfg', text)
    return stage.serve(port, 'haproxy', '-db', '-f', str(path))


def haproxy_recipe(stage: Stage) -> Running:
    """Start HAProxy as a knowing user configures it."""
    return haproxy(stage, HAPROXY_RECIPE, 'on-marked-down shutdown-sessions')


def nginx(stage: Stage) -> Running:
    """Start nginx's stream proxy with one worker."""
    port = free_port()
    servers = ' '.join(f'server 127.0.0.1:{service.port};' for service in stage.services)
    path = stage.write('nginx.conf', NGINX_CONF.format(
        stream=NGINX_STREAM, directory=stage.directory, servers=servers, port=port))  # fmt: skip
    return stage.serve(port, 'nginx', '-e', 'stderr', '-c', str(path))


def perl_command(services: Sequence[PolicyService]) -> list[str]:
    """Return the ancestor's command line."""
    return [PERL, *(f'--service={service.service}:10' for service in services)]


def perl(stage: Stage) -> Running:
    """Start a private Postfix that runs the ancestor by spawn(8). Raises StartError."""
    port = free_port()
    stage.directory.chmod(0o755)  # the users postfix and nobody go through
    for name in ('queue', 'data', 'log'):
        (stage.directory / name).mkdir(mode=0o755)
    shutil.chown(stage.directory / 'data', 'postfix')
    for name, text in (('main.cf', MAIN_CF), ('master.cf', MASTER_CF)):
        path = stage.write(f'etc/{name}', text.format(
            directory=stage.directory, port=port, command=' '.join(perl_command(stage.services))))  # fmt: skip
        os.utime(path, (1e9, 1e9))  # Postfix waits 2 s for a file just written to be complete
    etc = str(stage.directory / 'etc')
    subprocess.run([POSTFIX, '-c', etc, 'check'], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
    # `postfix start` would leave it in the background, where the end of the stage could not find it
    return stage.serve(port, MASTER, '-c', etc, '-d')


@dataclass
class Peer:
    """What is compared, and how it is loaded."""

    name: str
    start: Callable[[Stage], Running]
    needs: Sequence[str] = ()  # programs, or files of a package
    warm: int = 1  # seconds until all its processes are there
    crowd: int = 1000  # clients for the measure of memory, 0: left out
    many: int = 3000  # clients for the measure of cost, 0: left out
    request_limit: int = 0  # requests on a connection
    root: bool = False  # it can be started by root alone

    @property
    def missing(self) -> str:
        """What keeps it from being compared here, '' if nothing does."""
        if self.root and os.geteuid():
            return 'only root can start it'
        absent = [name for name in self.needs if not shutil.which(name) and not Path(name).exists()]
        return f'not installed: {", ".join(absent)}' if absent else ''


OURS, HAPROXY, PERL_NAME = 'ours', 'HAProxy tcp', 'Perl hapolicy'
LOGGING, RECIPE, DIRECT = 'ours -l', 'HAProxy recipe', 'no proxy'
BY_DEBIAN, COMPILED = "ours, Debian's python3", 'ours, compiled'
UNIX = 'ours, unix sockets'

PEERS = (
    Peer(DIRECT, direct, crowd=0, many=0),
    Peer(OURS, ours),
    Peer(UNIX, ours_at_unix_sockets, many=0),
    Peer(BY_DEBIAN, ours_by_debian, [DEBIAN_PYTHON, DEBIAN_GEVENT, DEBIAN_DOCOPT], crowd=0, many=0),
    Peer(COMPILED, ours_compiled, [str(COMPILED_PROGRAM)], crowd=0, many=0),
    Peer(LOGGING, ours_logging, crowd=0, many=0),
    Peer(HAPROXY, haproxy, ['haproxy']),
    # Postfix's request_limit=1 is part of the recipe: a connection for each request, so none is ever idle
    Peer(RECIPE, haproxy_recipe, ['haproxy'], crowd=0, many=0, request_limit=1),
    Peer('nginx stream', nginx, ['nginx', NGINX_STREAM]),
    # a process for each client: 1,000 of them would want 10 GB
    Peer(PERL_NAME, perl, [PERL, POSTFIX, MASTER], warm=2, crowd=20, many=0, root=True),
)

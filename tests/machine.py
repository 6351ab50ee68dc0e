"""A Debian 12 of its own, in a container with systemd as process 1: for the units and for the package.

Its root is made once by mmdebstrap, out of Debian's packages alone, and kept in CACHE; each Machine writes into
an overlay that is thrown away. It has no network but its own loopback. All of it wants root.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support import ROOT, SCALE, wait_until

CACHE = Path('/var/cache/hapolicy-tests')
PROGRAMS = {
    'mmdebstrap': 'mmdebstrap',
    'systemd-nspawn': 'systemd-container',
    'dpkg-buildpackage': 'dpkg-dev',
    'dh': 'debhelper',
    'dh_python3': 'dh-python',
    'lintian': 'lintian',
}
#: What it has when it is made, and what can be installed in it later, without a network.
INSTALLED = ('systemd', 'systemd-sysv', 'dbus', 'postfix', 'postgrey')
AVAILABLE = ('python3-gevent', 'python3-docopt', 'hapolicy', 'netcat-openbsd')
#: No network to wait for, and nothing that runs by itself in the middle of a test.
MASKED = ('systemd-networkd.service', 'systemd-networkd.socket', 'systemd-networkd-wait-online.service',
          'apt-daily.timer', 'apt-daily-upgrade.timer', 'dpkg-db-backup.timer', 'e2scrub_all.timer',
          'fstrim.timer')  # fmt: skip
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'


@functools.cache
def missing() -> str:
    """Return why no machine can be started here, as text; nothing if one can. In CI no package may be missing."""
    if os.geteuid() != 0:
        return 'not root'
    lacking = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if lacking:
        assert os.environ.get('CI') != 'true', f'not installed: {lacking}'
        return f'not installed: {", ".join(lacking)}'
    with tempfile.TemporaryDirectory(prefix='hapolicy-overlay-') as name:
        for directory in ('lower', 'upper', 'work', 'merged'):
            (Path(name) / directory).mkdir()
        options = f'lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work'
        mount = f'mount -t overlay overlay -o {options} {name}/merged'
        tried = subprocess.run(['unshare', '--mount', '--pid', '--net', '--uts', '--ipc', '--cgroup', '--fork',
                                'sh', '-c', mount], capture_output=True, text=True)  # fmt: skip
    return '' if tried.returncode == 0 else f'no namespaces or overlays here: {tried.stderr.strip()}'


def base() -> Path:
    """Return the directory of a fresh Debian; it is made by whoever needs it first, and never written again."""
    key = hashlib.sha256(repr((INSTALLED, AVAILABLE, MASKED)).encode()).hexdigest()[:12]
    made = CACHE / f'bookworm-{key}'
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            new = CACHE / f'bookworm-{key}.new'
            shutil.rmtree(new, ignore_errors=True)
            available = f'apt-get install -qq -y --no-install-recommends --download-only {" ".join(AVAILABLE)}'
            done = subprocess.run(
                ['mmdebstrap', '--quiet', '--variant=minbase', f'--include={",".join(INSTALLED)}',
                 '--aptopt=Acquire::Check-Valid-Until "false"', '--dpkgopt=force-unsafe-io', '--skip=cleanup/apt',
                 f'--customize-hook=chroot "$1" {available}',
                 f'--customize-hook=systemctl --quiet --root="$1" mask {" ".join(MASKED)}',
                 '--customize-hook=: >"$1/etc/machine-id"', 'bookworm', new],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=600 * SCALE,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            new.rename(made)
    return made


def build(directory: Path) -> Path:
    """Build the Debian package from what git has of this tree, or would take; without git from all of it."""
    source = directory / 'source'
    if (ROOT / '.git').exists():
        command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
        names = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split('\0')
        for name in names:
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
    else:
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', '*.so'))
    done = subprocess.run(['dpkg-buildpackage', '-us', '-uc', '-tc'], cwd=source, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300 * SCALE)  # fmt: skip
    assert done.returncode == 0, done.stdout
    [package] = directory.glob('*.deb')
    return package


class Machine:
    """A container from `with` to its end. `root` is its root directory, as seen from outside."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix='hapolicy-machine-'))
        self.root = self._directory / 'root'
        for name in ('upper', 'work', 'root'):
            (self._directory / name).mkdir(mode=0o755)
        self._directory.chmod(0o755)
        options = f'lowerdir={base()},upperdir={self._directory}/upper,workdir={self._directory}/work'
        subprocess.run(['mount', '-t', 'overlay', 'overlay', '-o', options, self.root], check=True)
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._lock = (CACHE / 'machine.lock').open('w')

    @property
    def _leader(self) -> int:
        """Its process 1, as seen from outside; 0 if there is none yet."""
        assert self._nspawn is not None
        children = Path(f'/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children').read_text().split()
        return int(children[0]) if children else 0

    def boot(self) -> None:
        """Start it, when no other one runs; return when all its units are there.

        Where process 1 of this host is not systemd, all machines would share one control group.
        """
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with (self._directory / 'console').open('wb') as console:
            self._nspawn = subprocess.Popen(
                ['systemd-nspawn', '--quiet', f'--directory={self.root}', f'--machine=hapolicy-test-{os.getpid()}',
                 '--register=no', '--keep-unit', '--private-network', '--console=pipe', '--boot'],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip

        def booted() -> bool:
            assert self._nspawn and self._nspawn.poll() is None, (self._directory / 'console').read_text()
            return bool(self._leader) and self.run('systemctl is-system-running', check=False) == 'running\n'

        wait_until(booted, 60, 'the machine has booted')

    def run(self, command: str, check: bool = True, seconds: float = 120) -> str:
        """Run a line of shell in it; return what it says."""
        done = subprocess.run(
            ['nsenter', f'--target={self._leader}', '--all', '--', '/usr/bin/env', '-i', f'PATH={PATH}',
             'LC_ALL=C.UTF-8', 'HOME=/root', 'DEBIAN_FRONTEND=noninteractive', '/bin/sh', '-c', command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=seconds * SCALE, cwd='/',
        )  # fmt: skip
        assert not check or done.returncode == 0, f'{command}: {done.stdout}'
        return done.stdout

    def offer(self, package: Path) -> None:
        """Let apt find a package, as a local archive has it; the newest of those offered is installed."""
        archive = self.root / 'srv' / 'archive'
        archive.mkdir(exist_ok=True)
        shutil.copy(package, archive)
        with (archive / 'Packages').open('wb') as index:
            subprocess.run(['dpkg-scanpackages', '--multiversion', '.'], cwd=archive, stdout=index,
                           stderr=subprocess.DEVNULL, check=True)  # fmt: skip
        self.write('/etc/apt/sources.list.d/local.list', 'deb [trusted=yes] file:/srv/archive ./\n')
        self.run('apt-get update -q -o Dir::Etc::sourcelist=sources.list.d/local.list -o Dir::Etc::sourceparts=-'
                 ' -o APT::Get::List-Cleanup=0')  # fmt: skip

    def install(self, *packages: str) -> None:
        """Install packages that are AVAILABLE or offered, with what they depend on."""
        self.run(f'apt-get install -y --no-install-recommends {" ".join(packages)}')

    def write(self, path: str, text: str) -> None:
        """Write a file in it."""
        (self.root / path.lstrip('/')).write_text(text)

    def _halt(self) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(30 * SCALE)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()

    def reboot(self) -> None:
        """Halt it and start it again; what it wrote stays."""
        self._halt()
        self.boot()

    def close(self) -> None:
        """Halt it, and remove what it wrote."""
        try:
            self._halt()
        finally:
            for _ in range(50):
                if subprocess.run(['umount', self.root], capture_output=True).returncode == 0:
                    break
                time.sleep(0.1)
            shutil.rmtree(self._directory, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> Machine:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

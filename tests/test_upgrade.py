"""From the version before this one and back, each a wheel in a venv of its own, under load: nothing is lost."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import ROOT, ProxyProcess, SmtpdLoad, free_port, slow, stubs

#: The version before the units and the package: who has it upgrades from there.
BEFORE = '74a7e26e624432c8c2fe96a2f13455a1d8002cfe'


class Installed:
    """A wheel of a source tree, built and installed without a network: the command in a venv of its own."""

    def __init__(self, source: Path, directory: Path) -> None:
        pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
        self._run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', f'--wheel-dir={directory}', source)
        [wheel] = directory.glob('*.whl')
        self._run(sys.executable, '-m', 'venv', '--without-pip', directory / 'venv')
        self.python = directory / 'venv' / 'bin' / 'python'
        self._run(*pip, f'--python={self.python}', 'install', '--no-deps', '--no-index', wheel)
        [packages] = directory.glob('venv/lib/python*/site-packages')
        (packages / 'needed.pth').write_text(sysconfig.get_path('platlib') + '\n')  # gevent and docopt
        self.module = packages / 'hapolicy_gevent.py'
        self.command = directory / 'venv' / 'bin' / 'hapolicy'

    @staticmethod
    def _run(*command: str | Path) -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def this(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """This tree, installed."""
    source = tmp_path_factory.mktemp('this-source')
    for name in ('hapolicy_gevent.py', 'setup.py', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / 'contrib', source / 'contrib')
    return Installed(source, tmp_path_factory.mktemp('this'))


@pytest.fixture(scope='module')
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The commit BEFORE, installed."""
    archive = subprocess.run(['git', 'archive', BEFORE], cwd=ROOT, capture_output=True) if shutil.which('git') else None
    if archive is None or archive.returncode:
        pytest.skip(f'this is no git checkout that reaches back to {BEFORE}')
    source = tmp_path_factory.mktemp('earlier-source')
    subprocess.run(['tar', 'x'], cwd=source, input=archive.stdout, check=True)
    return Installed(source, tmp_path_factory.mktemp('earlier'))


def test_both_versions_are_what_they_are_taken_for(earlier: Installed, this: Installed) -> None:
    assert this.module.read_bytes() == (ROOT / 'hapolicy_gevent.py').read_bytes() != earlier.module.read_bytes()
    for version, named in ((earlier, False), (this, True)):
        said = subprocess.run([version.command, '--help'], capture_output=True, text=True, timeout=60).stdout
        assert ('--name=NAME' in said) == named


@pytest.mark.parametrize('way', ['reuse-port', 'socket'])
def test_an_upgrade_and_the_way_back_lose_nothing_under_load(
        way: str, earlier: Installed, this: Installed, tmp_path: Path) -> None:  # fmt: skip
    with stubs(slow(0.02), slow(0.02)) as running, contextlib.ExitStack() as after:
        arguments = [f'-s{server.service}' for server in running] + ['--reuse-port']
        held = after.enter_context(socket.socket(socket.AF_UNIX)) if way == 'socket' else None
        where: int | str = free_port()
        if held is not None:
            where = str(tmp_path / 'socket')
            held.bind(where)
            held.listen(1024)

        def start(version: Installed) -> ProxyProcess:
            return after.enter_context(ProxyProcess(
                *arguments, port=where if isinstance(where, int) else 0, inherited=held,
                python=str(version.python), module=version.command))  # fmt: skip

        old, version = start(earlier), earlier
        load = SmtpdLoad(where, 16)
        with load:
            for following in (this, earlier, this, this):
                load.flows()
                new, lost = start(following), len(load.lost)
                assert old.terminate() == 0
                load.flows()
                assert version is earlier or load.lost[lost:] == []
                old, version = new, following

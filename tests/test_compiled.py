"""The module compiled by mypyc does what the file does: the tests of the live proxy, once more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hapolicy_gevent
from tests.support import ROOT

#: The tests that run it as a process, and need no server of Debian's.
LIVE = ('answers', 'check_services')
START = """
import sys
sys.path.insert(0, {!r})
import hapolicy_gevent
assert not hapolicy_gevent.__file__.endswith('.py')
sys.exit(hapolicy_gevent.main())
"""


@pytest.fixture(scope='module')
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the module compiled, as README has it; return a program that runs it."""
    if not shutil.which('gcc'):
        pytest.skip('there is no C compiler')
    source, installed = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('installed')
    for name in ('hapolicy_gevent.py', 'setup.py', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / 'contrib', source / 'contrib')
    compiler = source / 'gcc'  # it optimizes nothing: that takes longer than all else
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--target', installed, '.'],
        cwd=source, env=os.environ | {'HAPOLICY_USE_MYPYC': '1', 'CC': str(compiler)}, check=True, timeout=600,
    )  # fmt: skip
    program = installed / 'hapolicy'
    program.write_text(START.format(str(installed)))
    return program


def test_the_compiled_module_says_so(compiled: Path) -> None:
    done = subprocess.run([sys.executable, compiled, '--version'], capture_output=True, text=True, timeout=60)
    assert done.stdout == f'hapolicy {hapolicy_gevent.__version__} (compiled)\n', done


def test_the_compiled_module_does_what_the_file_does(compiled: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '2', *(f'tests/test_{name}.py' for name in LIVE)],
        cwd=ROOT, env=os.environ | {'HAPOLICY_PROGRAM': str(compiled)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]

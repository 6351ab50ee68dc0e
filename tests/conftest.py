"""What every test shares."""

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from tests import machine

# the same examples each time where a failure would hold up others; new ones on a developer's machine
hypothesis.settings.register_profile('repeatable', derandomize=True)
if os.environ.get('CI') == 'true':
    hypothesis.settings.load_profile('repeatable')


#: The files that `tests/run --fast` runs, without tests that are marked slow or need Debian's servers; a file is slow
#: until it is named here.
FAST = {'balancing', 'check_services', 'cli', 'drain', 'health', 'log', 'manual', 'model', 'protocol', 'requests',
        'services', 'spawn', 'sticky'}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs root or Debian's packages where they are missing; with CI=true that is a failure."""
    longest = ('test_compiled', 'test_package', 'test_units', 'test_model')
    items.sort(key=lambda item: item.path.stem not in longest)  # they begin first
    for item in items:
        if item.path.stem[5:] not in FAST or item.get_closest_marker('needs_root'):
            item.add_marker('slow')
        if 'browser' in getattr(item, 'fixturenames', ()):  # one for all tests: all of them in one process
            item.add_marker(pytest.mark.xdist_group('browser'))
    lacking = [name for name in ('postfix', 'postgrey', 'postfwd', 'hapolicy', 'ip') if not shutil.which(name)]
    if os.geteuid() == 0 and not lacking:
        return
    why = 'not root' if os.geteuid() else f'not installed: {" ".join(lacking)}'
    for item in items:
        if item.get_closest_marker('needs_root'):
            assert os.environ.get('CI') != 'true', f'{item.name} would be left out ({why}), which CI does not allow'
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope='session')
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this tree, beside what else was built with it."""
    return machine.build(tmp_path_factory.mktemp('package'))

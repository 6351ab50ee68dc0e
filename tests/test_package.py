"""The Debian package: built from the tree, clean, tried as autopkgtest does, and put in the place of the Perl one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hapolicy_gevent
from tests import machine
from tests.machine import Machine
from tests.support import ROOT, SCALE, wait_until

pytestmark = [
    pytest.mark.skipif(bool(machine.missing()), reason=machine.missing()),
    pytest.mark.xdist_group('machine'),
]


@pytest.fixture
def host(package: Path) -> Iterator[Machine]:
    """A fresh Debian that can install the package."""
    with Machine() as running:
        running.offer(package)
        yield running


def test_lintian_has_nothing_to_say(package: Path) -> None:
    [changes] = package.parent.glob('*.changes')
    done = subprocess.run(
        ['lintian', '--allow-root', '--fail-on=error,warning', '--display-level=>=warning', changes],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120 * SCALE,
    )  # fmt: skip
    found = re.findall(r'^[EW]: .*', done.stdout, re.MULTILINE)
    assert (done.returncode, found) == (0, []), done.stdout


def test_its_version_is_the_modules(package: Path) -> None:
    assert package.name == f'hapolicy-gevent_{hapolicy_gevent.__version__}_all.deb'


def test_autopkgtest_would_pass(host: Machine) -> None:
    """Its one test runs as autopkgtest runs it: the package is installed from an archive, with what it depends on."""
    control = dict(re.findall(r'^(\S+): (.*)', (ROOT / 'debian' / 'tests' / 'control').read_text(), re.MULTILINE))
    needed = control['Depends'].replace('@', 'hapolicy-gevent').split(', ')
    host.install(*needed)
    shutil.copytree(ROOT / 'debian', host.root / 'srv' / 'source' / 'debian')
    for test in control['Tests'].split():
        said = host.run(f'cd /srv/source && debian/tests/{test}', seconds=300)
        done = re.findall(r'^(\w+): \d+ mails, all taken$', said, re.MULTILINE)
        assert done == ['restart', 'kill', 'upgrade', 'downgrade'], said


SPAWN = """\
127.0.0.1:10060 inet    n       n       n       -       0       spawn
  user=nobody argv=/usr/sbin/hapolicy -l -s GREY1=127.0.0.1:10023:10 -s GREY2=127.0.0.1:10024:20
"""
SEND = """
import smtplib, sys
for sender in sys.argv[1:]:
    with smtplib.SMTP('127.0.0.1', 25, 'client.example.net', timeout=120) as client:
        client.ehlo()
        client.mail(sender)
        print(client.rcpt('bob@example.org'))
"""


def test_it_takes_the_place_of_the_perl_hapolicy(host: Machine) -> None:
    """The line of master.cf stays as it is: a known sender passes and a new one is put off, before and after."""
    host.install('hapolicy', 'python3')
    host.write('/etc/default/postgrey', 'POSTGREY_OPTS="--inet=127.0.0.1:10023 --delay=1"\n')
    host.write('/srv/send.py', SEND)
    host.run('systemctl restart postgrey')
    master = (host.root / 'etc/postfix/master.cf').read_text() + SPAWN
    host.write('/etc/postfix/master.cf', master)
    host.run('postconf -e "smtpd_recipient_restrictions=reject_unauth_destination, check_policy_service'
             ' inet:127.0.0.1:10060" 127.0.0.1:10060_time_limit=3600 mydestination=example.org local_recipient_maps='
             ' local_transport=discard: inet_protocols=ipv4 smtpd_peername_lookup=no &&'
             ' systemctl restart postfix')  # fmt: skip

    def verdicts(stranger: str) -> list[str]:
        said = host.run(f'sleep 2; python3 /srv/send.py alice@example.net {stranger}').splitlines()
        return [re.sub(stranger, '', line) for line in said]

    assert 'Greylisted' in verdicts('bob@example.net')[0]
    before = verdicts('carol@example.net')
    assert '250' in before[0] and 'Greylisted' in before[1]
    assert 'Unknown option: version' in host.run('/usr/sbin/hapolicy --version', check=False)
    host.install('hapolicy-gevent')
    assert host.run('/usr/sbin/hapolicy --version') == f'hapolicy {hapolicy_gevent.__version__} (not compiled)\n'
    assert 'hapolicy' not in re.findall(r'^ii +(\S+)', host.run('dpkg -l "*hapolicy*"'), re.MULTILINE)
    host.run('postfix reload')  # a smtpd keeps the process that it has
    assert verdicts('dave@example.net') == before
    assert (host.root / 'etc/postfix/master.cf').read_text() == master
    line = r"from: <dave@example.net>.*action: 'DEFER_IF_PERMIT 4.2.0 Greylisted.*why: answered"
    wait_until(lambda: re.search(line, host.run('journalctl -t hapolicy --no-pager')), what='its line in the log')

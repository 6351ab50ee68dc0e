"""The documents, the manual page, the units and the examples: what they say is what the program does."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hapolicy_gevent
from tests.postfix import PYTHON, Postfix, missing_programs
from tests.status import StatusProxy
from tests.support import (
    MODULE,
    ROOT,
    SCALE,
    PolicyServerStub,
    ProxyProcess,
    answer,
    free_port,
    request,
    wait_until,
)

CONTRIB = ROOT / 'contrib'
PAGE = CONTRIB / 'hapolicy.1'


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with stdout and stderr in one."""
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=120 * SCALE, env={**os.environ, **environment},
    )  # fmt: skip


def words(text: str) -> str:
    return ' '.join(text.split())


def shown(page: Path) -> str:
    """Return the page as a reader sees it."""
    if not shutil.which('man'):
        pytest.skip('man is not installed')
    done = run('man', '--warnings', '--encoding=UTF-8', '-l', page, LC_ALL='C.UTF-8', MANWIDTH='100')
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_manual_page_is_made_from_the_text_of_help() -> None:
    spec = importlib.util.spec_from_file_location('make_manual', CONTRIB / 'make_manual.py')
    assert spec and spec.loader
    make_manual = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_manual)
    assert PAGE.read_text() == make_manual.manual(MODULE.read_text()), 'run contrib/make_manual.py'


def test_the_manual_page_has_every_option_in_the_words_of_help() -> None:
    page = words(shown(PAGE))
    text = hapolicy_gevent.__doc__ or ''
    options = re.findall(r'^  (-\S.*?)  +(.*\n(?:   .*\n)*)', text, re.MULTILINE)
    assert len(options) == len(re.findall(r'^  -', text, re.MULTILINE)) > 15
    for option, meaning in options:
        assert words(f'{option} {meaning}') in page
    for paragraph in text.split('\n\n')[2:]:
        for line in paragraph.splitlines():
            assert words(line).rstrip(':').lower() in page.lower()


def test_groff_has_nothing_to_warn_of() -> None:
    if not shutil.which('groff'):
        pytest.skip('groff is not installed')
    assert run('groff', '-man', '-Tutf8', '-ww', '-rLL=100n', '-z', PAGE).stdout == ''


@pytest.mark.slow
def test_pip_installs_the_manual_page_from_a_source_package(tmp_path: Path) -> None:
    if run(sys.executable, '-c', 'from setuptools.command import bdist_wheel').returncode:
        pytest.skip('setuptools is older than 70.1, or missing')
    source = tmp_path / 'source'
    (source / 'contrib').mkdir(parents=True)
    for name in ('hapolicy_gevent.py', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'contrib/hapolicy.1'):
        shutil.copy(ROOT / name, source / name)
    done = run(sys.executable, 'setup.py', '-q', 'sdist', cwd=source)
    assert done.returncode == 0, done.stdout
    (package,) = (source / 'dist').iterdir()
    where = tmp_path / 'there'
    done = run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--no-index',
               '--disable-pip-version-check', '--ignore-installed', f'--prefix={where}', package)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (where / 'share/man/man1/hapolicy.1').read_text() == PAGE.read_text()
    assert (where / 'bin/hapolicy').exists()


UNITS = ('hapolicy.service', 'hapolicy.socket', 'hapolicy@.service', 'hapolicy@.socket')


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if not shutil.which('systemd-analyze'):
        pytest.skip('systemd-analyze is not installed')
    program = tmp_path / 'hapolicy'
    program.write_text('#!/bin/sh\n')
    program.chmod(0o755)
    for name in UNITS:
        text = (CONTRIB / name).read_text().replace('/usr/local/bin/hapolicy', str(program))
        (tmp_path / name).write_text(text)
    instances = ('hapolicy.service', 'hapolicy.socket', 'hapolicy@spf.service', 'hapolicy@spf.socket')
    done = run('systemd-analyze', 'verify', '--man=no', *(tmp_path / name for name in instances))
    said = [line for line in done.stdout.splitlines() if not line.startswith('/lib/systemd/')]  # of others' units
    assert (done.returncode, said) == (0, [])
    # 1.5 of 10 with systemd 252; the lower the better
    for unit in (tmp_path / name for name in UNITS if name.endswith('service')):
        done = run('systemd-analyze', 'security', '--offline=yes', '--threshold=20', unit)
        assert done.returncode == 0, done.stdout


def test_an_instance_is_what_the_one_unit_is_but_for_its_names() -> None:
    for kind in ('service', 'socket'):
        one, many = ((CONTRIB / f'hapolicy{at}.{kind}').read_text().partition('[Unit]')[2] for at in ('', '@'))
        for name in ('hapolicy@%i.socket', '/etc/default/hapolicy-%i', '/hapolicy/%i'):
            many = many.replace(name, name.replace('@%i', '').replace('-%i', '').replace('/%i', '/socket'))
        assert many.replace(' --name=%i', '').replace(': %i', '') == one


class Example(Postfix):
    """A private Postfix with the lines of the examples, at ports and a path of its own."""

    def __init__(self, *, spawn: bool) -> None:
        self.proxy_port, self.server_port = free_port(), free_port()
        main = (CONTRIB / 'main.cf.example').read_text()
        master = (CONTRIB / 'master.cf.example').read_text() if spawn else ''
        if spawn:
            main = re.sub(r'^#(.*_time_limit)', r'\1', main, flags=re.MULTILINE)
            [at_port] = re.findall(r'^# At a port.*: (check_policy_service .*)', main, re.MULTILINE)
            main = main.replace('    check_policy_service unix:hapolicy/socket', f'    {at_port}')
        super().__init__(master=self.private(master), chroot=not spawn)
        self.socket = self.directory / 'queue' / 'hapolicy' / 'socket'
        self.socket.parent.mkdir(mode=0o711)
        shutil.copy(MODULE, self.directory / 'hapolicy')
        (self.directory / 'hapolicy').chmod(0o755)
        path = self.directory / 'etc' / 'main.cf'
        names = r'^(smtpd_recipient_restrictions|smtpd_relay_restrictions|mynetworks) .*\n'
        given = re.sub(names, '', path.read_text(), flags=re.MULTILINE)
        # the example alone is to keep strangers out
        path.write_text(given + 'mynetworks =\nsmtpd_relay_restrictions =\n' + self.private(main))
        os.utime(path, (1e9, 1e9))

    def private(self, text: str) -> str:
        text = text.replace('127.0.0.1:10060', f'127.0.0.1:{self.proxy_port}')
        text = re.sub(r'10\.0\.0\.\d:\d+', f'127.0.0.1:{self.server_port}', text)
        return text.replace('/usr/local/bin/hapolicy', '{directory}/hapolicy')


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason='not root, who alone can start a Postfix')
@pytest.mark.skipif(bool(missing_programs()), reason=f'not installed: {missing_programs()}')
@pytest.mark.parametrize('spawn', [False, True], ids=['server', 'spawn'])
def test_postfix_takes_the_examples_and_filters_mail_by_them(spawn: bool) -> None:
    postfix = Example(spawn=spawn)
    etc = str(postfix.directory / 'etc')
    where = f'inet:127.0.0.1:{postfix.proxy_port}' if spawn else 'unix:hapolicy/socket'
    try:
        assert run('/usr/sbin/postfix', '-c', etc, 'check').stdout == ''
        shown = run('/usr/sbin/postconf', '-c', etc, '-n').stdout
        assert 'warning' not in shown and f'check_policy_service {where}' in shown
        assert ('_time_limit = 3600' in shown) is spawn
        assert 'warning' not in run('/usr/sbin/postconf', '-c', etc, '-M').stdout
    except BaseException:
        postfix.close()
        raise
    with contextlib.ExitStack() as stack:
        refuse = answer(b'action=550 5.7.1 filtered\n\n')
        server = stack.enter_context(PolicyServerStub(refuse, port=postfix.server_port))
        stack.enter_context(postfix)
        if not spawn:
            stack.enter_context(ProxyProcess('-s', server.service, f'--listen=unix:{postfix.socket}', python=PYTHON))
        assert postfix.send(recipient='bob@elsewhere.example')[0] == 554
        assert not server.requests, 'no server is asked about mail that is refused anyway'
        code, text = postfix.send()
        assert code == 550 and 'filtered' in text
        assert not postfix.complaints, postfix.complaints


#: The documents for users and for developers.
NAMES = ('README.md', 'docs/operations.md', 'docs/architecture.md', 'bench/README.md', 'CHANGELOG.md')
DOCUMENTS = [ROOT / name for name in NAMES]
OPERATIONS = (ROOT / 'docs' / 'operations.md').read_text()


def section(title: str) -> str:
    return OPERATIONS.partition(f'\n## {title}\n')[2].partition('\n## ')[0]


def places(document: Path) -> set[str]:
    """Return the anchors of the heads of a document."""
    heads = re.findall(r'^##+ (.*)$', document.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_documents_link_to_what_is_there(document: Path) -> None:
    for target in re.findall(r'\]\(([^)]+)\)', document.read_text()):
        if target.startswith('http'):
            continue
        path, _, place = target.partition('#')
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), target
        assert not place or place in places(there), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 250


def test_every_command_line_in_the_documents_is_taken() -> None:
    files = [*DOCUMENTS, *(CONTRIB / name for name in ('hapolicy.default', 'master.cf.example', 'make_manual.py'))]
    text = '\n'.join(file.read_text().replace('\\\n', '') for file in files)
    text = re.sub('^#OPTIONS="(.*)"$', r'hapolicy \1', text, flags=re.MULTILINE)
    before = r'(?:\$ |user=nobody argv=/usr/local/bin/)?'
    lines = re.findall(rf'^ *{before}hapolicy (-.*-s .*)$', text, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        arguments = shlex.split(line)
        options = hapolicy_gevent.parse_command_line(arguments)
        grey = [service.prio for service in options.service if service.name.startswith('GREY')]
        apart = options.sticky or options.check_services or len(set(grey)) == len(grey)
        assert apart, f'all is greylisted twice: {line}'


def logged() -> list[str]:
    """Return the texts of the module's log lines, without what is put in."""
    texts = []
    for node in ast.walk(ast.parse(MODULE.read_text())):
        if isinstance(node, ast.Call) and re.search(r'\b_?(log|report|tell|trace)$', ast.unparse(node.func)):
            inside = [part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            texts.append(' '.join(str(part.value) for part in inside))
    return [text for text in texts if re.search('[a-z]{3}', text)]


def test_each_log_line_is_documented_and_each_documented_phrase_is_logged() -> None:
    first = re.findall(r'^\| (`.*?) \|', section('Log'), re.MULTILINE)
    phrases = {phrase for row in first for phrase in re.findall('`(.*?)`', row)}
    texts = logged()
    assert len(phrases) > 25 and len(texts) > 20
    for text in texts:
        assert any(phrase in text for phrase in phrases), f'not in docs/operations.md: {text}'
    states = {f'is {state}:' for state in ('up', 'on trial', 'down')}
    assert states <= phrases
    for phrase in phrases - states:
        assert phrase in MODULE.read_text(), f'not logged: {phrase}'


def test_the_first_command_shows_the_faults_and_nothing_else() -> None:
    found = re.search(r"^    grep -E '(.*)' /var/log/mail.log$", OPERATIONS, re.MULTILINE)
    assert found
    pattern = re.compile(found[1])
    with PolicyServerStub(answer(b'action=DUNNO\n\n')) as server:
        arguments = ('-s', server.service, '-s', f'B=127.0.0.1:{free_port()}', '--summary=1')
        with ProxyProcess(*arguments) as proxy:
            wait_until(lambda: '[B]' in proxy.log, what='B down')
            with proxy.client() as client:
                client.ask(request(sender='hapolicy[1]: No service is up', helo_name='failed: timeout'))
            wait_until(lambda: 'summary' in proxy.log, what='a summary')
            lines = re.findall(r'^\[LOG (\w+)\]: (.*)$', proxy.log, re.MULTILINE)
    assert {level for level, _ in lines} == {'warning', 'notice', 'info'}
    for level, text in lines:
        assert bool(pattern.search(f'Nov 26 11:09:00 mx hapolicy[123]: {text}')) is (level == 'warning'), text


def test_the_documented_metrics_are_those_that_are_there() -> None:
    pytest.importorskip('prometheus_client')
    documented = set(re.findall(r'hapolicy_[a-z_0-9]+', section('Metrics')))
    with PolicyServerStub(answer(b'action=DUNNO\n\n')) as server, StatusProxy('-s', server.service) as proxy:
        exported = set(re.findall(r'^# TYPE (hapolicy_[a-z_0-9]+)', proxy.fresh('/metrics'), re.MULTILINE))
    assert documented == exported


def test_the_documented_limits_are_those_of_the_module() -> None:
    limits = re.findall(r'`([A-Z_]+) = ([\d.]+)`', section('Limits'))
    assert len(limits) > 25
    for name, value in limits:
        assert getattr(hapolicy_gevent, name) == float(value), name


def test_the_architecture_names_what_is_there() -> None:
    text = (ROOT / 'docs' / 'architecture.md').read_text().partition('## What was tried')[0]
    names = re.findall(r'\b([A-Z][a-z]+\.[a-z]\w*)\(|`([A-Z]\w+(?:\.[a-z]\w*)?)`', text)
    assert len(names) > 30
    for name in {called or quoted for called, quoted in names} - {'StreamServer', 'Timeout', 'GreenletExit'}:
        found: Any = hapolicy_gevent
        for word in name.split('.'):
            found = getattr(found, word, None)
        assert found is not None, name

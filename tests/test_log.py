"""Log lines and where they go: syslog found again, never waited for; control characters escaped."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

import hapolicy_gevent
from hapolicy_gevent import (
    MAX_LOG_LINE,
    Client,
    Log,
    Proxy,
    Service,
    Statistics,
    parse_service,
    printable,
    report_error,
    request_line,
)
from tests.servers import checked
from tests.support import (
    MODULE,
    SCALE,
    PostfixClient,
    ProxyProcess,
    answer,
    echo,
    free_port,
    hang,
    request,
    slow,
    stubs,
    wait_until,
)

LINE = re.compile(
    r"\[A\] \(127\.0\.0\.1:\d+\), prio: 10, weight: 1, queries: \d+, answers: \d+, failed: 0, delay: \d\.\d{3}s, "
    r"client: mail\.example\.net\[192\.0\.2\.7\], helo: <mail\.example\.net>, from: <alice@example\.net>, "
    r"to: <bob@example\.org>, action: 'DUNNO i1 A', instance: i1, tries: 1, why: answered$"
)


def service() -> Service:
    return parse_service('A=127.0.0.1:10031')


def test_a_request_line_has_the_ancestors_fields_in_its_order_and_ours() -> None:
    line = request_line((b'DUNNO i1 A', service(), 1, 'answered'), request(instance='i1'), 0.0031)
    assert LINE.match(line), line
    assert 'delay: 0.003s' in line


def test_a_request_line_without_a_service() -> None:
    line = request_line((b'dunno', None, 0, 'default, no service is up'), request(), 0)
    assert line.startswith('[-] (-), prio: -, weight: -, queries: -, answers: -, failed: -, delay: 0.000s, client: ')
    assert line.endswith("action: 'dunno', instance: , tries: 0, why: default, no service is up")


def test_no_sender_can_make_a_value_look_like_a_field() -> None:
    mail = request(sender="a>, to: <b>, action: 'REJECT'", helo_name='x [1], from: <y')
    line = request_line((b'DUNNO', service(), 1, 'answered'), mail, 0)
    assert r"from: <a>,\x20to:\x20<b>,\x20action:\x20'REJECT'>, to: <bob@" in line
    assert re.findall(r'\w+: <(.*?)>', line) == [
        r'x\x20[1],\x20from:\x20<y', 'a', 'bob@example.org',
    ]  # fmt: skip
    assert line.count('to: ') == line.count('from: ') == line.count('action: ') == 1


def test_no_sender_can_push_the_action_out_of_the_line() -> None:
    for long in (2000 * ' ', 2000 * '\x01', 9000 * 'x'):
        line = request_line((b'REJECT no', service(), 1, 'answered'), request(sender=long, helo_name=long), 0)
        assert len(line) < MAX_LOG_LINE and line.endswith(", action: 'REJECT no', instance: , tries: 1, why: answered")
        assert line.count('to: <bob@example.org>') == 1


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (b'plain', 'plain'),
        ('caf\u00e9'.encode(), 'caf\u00e9'),
        (b'caf\xe9', 'caf\\xe9'),
        (b'a\nb\r\tc\x1b\x7f\0', 'a\\nb\\r\\tc\\x1b\\x7f\\x00'),
        ('\u202e\u2028'.encode(), '\\u202e\\u2028'),
    ],
)
def test_whatever_bytes_come_the_log_is_one_readable_line(value: bytes, text: str) -> None:
    assert printable(value) == text


def test_statistics_read_as_a_line() -> None:
    assert str(Statistics([])) == 'requests: 0, answers: 0, redispatches: 0, retries: 0, clients: 0, defaults: 0'


def test_an_error_of_ours_is_one_line_with_its_traceback() -> None:
    lines: list[tuple[int, str]] = []
    log: Any = lambda level, text: lines.append((level, text))  # noqa: E731
    try:
        parse_service('\n')
    except Exception:
        report_error(log, None, *sys.exc_info())
    [(level, line)] = lines
    assert level == 4 and line.isprintable() and line.startswith('Internal error: Traceback')
    assert 'in parse_service' in line and 'UsageError: ' in line


@contextlib.contextmanager
def daemon(path: str, kind: int = socket.SOCK_DGRAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(path)
        sock.settimeout(5)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@pytest.mark.parametrize('ident', ['hapolicy', 'spf-1'])
def test_syslog_gets_facility_mail_and_our_ident(
    ident: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Log, 'PATH', str(tmp_path / 'log'))
    with daemon(str(tmp_path / 'log')) as log:
        assert Log(ident).to_syslog([(4, 'caf\u00e9')]) == []
        line = log.recv(1000).decode()
        stamp = r'[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d'
        assert re.match(rf'<20>{stamp} {ident}\[{os.getpid()}\]: caf\u00e9$', line), line


def test_a_syslog_daemon_may_read_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As syslog(3) does: a NUL ends each line."""
    monkeypatch.setattr(Log, 'PATH', str(tmp_path / 'log'))
    ours = Log('hapolicy')
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM):  # it may be replaced, too
        with daemon(str(tmp_path / 'log'), kind) as log:
            assert ours.to_syslog([(4, 'one'), (6, 'two')]) == []
            if kind == socket.SOCK_STREAM:
                with log.accept()[0] as stream:
                    lines = stream.recv(1000).split(b'\0')
                assert lines.pop() == b''
            else:
                lines = [log.recv(1000), log.recv(1000)]
            assert [line[:4] + line[-5:] for line in lines] == [b'<20>: one', b'<22>: two']


def test_a_stream_that_nobody_reads_costs_a_second_for_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, 'PATH', str(tmp_path / 'log'))
    with daemon(str(tmp_path / 'log'), socket.SOCK_STREAM):
        ours, lines = Log('hapolicy'), [(6, 'x' * 8000)] * 100
        started = time.monotonic()
        while not ours.to_syslog(lines[:1]):
            assert time.monotonic() - started < 30 * SCALE
        assert time.monotonic() - started < 10 * SCALE


def test_a_syslog_daemon_that_restarts_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, 'PATH', str(tmp_path / 'log'))
    ours = Log('hapolicy')
    with daemon(str(tmp_path / 'log')) as log:
        assert ours.to_syslog([(6, 'one')]) == []
        assert log.recv(1000).endswith(b'one')
    assert ours.to_syslog([(6, 'lost'), (6, 'too')]) == [(6, 'lost'), (6, 'too')]
    with daemon(str(tmp_path / 'log')) as log:
        wait_until(lambda: ours.to_syslog([(6, 'two')]) == [], 5)
        assert log.recv(1000).endswith(b'two')
    with daemon(str(tmp_path / 'log')) as log:  # restarted between two lines: nothing is lost
        assert ours.to_syslog([(6, 'three')]) == []
        assert log.recv(1000).endswith(b'three')


@pytest.fixture
def dev_log() -> Iterator[socket.socket]:
    if os.path.exists('/dev/log'):
        pytest.skip('a syslog daemon runs here')
    with daemon('/dev/log') as sock:
        os.chmod('/dev/log', 0o666)
        yield sock


def serve(*arguments: str, stderr: int | None = None) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    command = [sys.executable, str(MODULE), f'--listen=127.0.0.1:{port}', *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    wait_until(lambda: socket.socket().connect_ex(('127.0.0.1', port)) == 0)
    return process, port


@pytest.mark.needs_root
def test_the_server_logs_to_dev_log_and_a_hung_daemon_delays_nobody(dev_log: socket.socket) -> None:
    with stubs(echo) as (a,):
        process, port = serve('-l', '-s', a.service, '--name=spf')
        try:
            with PostfixClient(port) as client:
                assert client.ask(request(instance='i1')) == 'DUNNO i1 A'
                lines: list[str] = []
                while len(lines) < 3:
                    line = dev_log.recv(10000).decode()
                    if f' spf[{process.pid}]: ' in line:  # another hapolicy of this machine may log there, too
                        lines.append(line)
                assert 'Started as root' in lines[0] and 'serves up to' in lines[1]
                assert LINE.search(lines[2]), lines
                # from here nobody reads: the kernel takes a few, the queue 10,000, the rest is dropped
                started = time.monotonic()
                for _ in range(2000):
                    assert client.ask_own() == 'A'
                assert time.monotonic() - started < 30 * SCALE
            process.terminate()
            assert process.wait(15 * SCALE) == 0
        finally:
            process.kill()
            process.wait()


def test_without_syslog_the_server_logs_to_stderr() -> None:
    if os.path.exists('/dev/log'):
        pytest.skip('a syslog daemon runs here')
    with stubs(echo) as (a,):
        process, port = serve('-l', '-s', a.service, stderr=subprocess.PIPE)
        with PostfixClient(port) as client:
            client.ask(request(instance='i1'))
        process.terminate()
        _, said = process.communicate(timeout=15 * SCALE)
        assert re.search(r'\[LOG info\]: \[A\] \(', said.decode()), said


def test_a_line_that_cannot_be_written_is_lost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    log = Log(fd=write)
    monkeypatch.setattr(gevent.get_hub(), 'print_exception', functools.partial(report_error, log))
    log(4, 'a line')
    gevent.sleep(0.3)
    os.close(write)
    assert log.lost == 1


def test_verbose_looks_at_no_more_of_a_value_than_the_log_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make 64 kB printable would hold up all others for 8 ms."""
    seen: list[int] = []
    monkeypatch.setattr(hapolicy_gevent, 'printable', lambda value: seen.append(len(value)))
    near, far = socket.socketpair()
    with far, contextlib.closing(Client(near)) as client:
        far.sendall(b'request=smtpd_access_policy\nsender=%s\n\n' % (b'\1' * 60000))
        far.shutdown(socket.SHUT_WR)
        Proxy([parse_service('A=unix:/none')], b'dunno', b'dunno', 1, Log(verbose=True))._serve(client)
    assert len(seen) >= 2 and max(seen) <= MAX_LOG_LINE


def test_verbose_tells_the_way_of_a_request() -> None:
    with stubs(echo) as (a,), ProxyProcess('-v', '-s', a.service) as proxy, proxy.client() as client:
        client.ask(request(instance='i1'))
        for text in (
            "Opening socket to 'A'",
            "Connection established to 'A'",
            'Attribute: sender=alice@example.net',
            "Answer from 'A' -> 'DUNNO i1 A'",
            'Action: DUNNO i1 A',
        ):
            proxy.logged(text)


def test_a_log_line_cannot_be_forged_by_a_client() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy, proxy.client() as client:
        client.ask(request(sender='x\r[LOG warning]: forged\x1b[31m', instance='i1'))
        proxy.logged('i1')
        assert '\r' not in proxy.log and '\x1b' not in proxy.log and '\n[LOG warning]: forged' not in proxy.log


@pytest.mark.slow
def test_a_live_proxy_logs_summaries_while_there_are_requests() -> None:
    with stubs(slow(0.05)) as (a,), ProxyProcess('--summary=0.5', '-s', a.service) as proxy:
        with proxy.client() as client:
            for _ in range(3):
                client.ask(request())
        proxy.logged('summary of ')
        time.sleep(1.2)
        counted = sum(int(number) for number in re.findall(r'summary of \S+ requests: (\d+)', proxy.log))
        assert counted == 3
        assert re.search(r'p99: A \d+(\.\d+)? ms\n', proxy.log)
        silent = proxy.log.count('summary of')
        time.sleep(1.2)
        assert proxy.log.count('summary of') == silent, 'no requests, no summary'


@pytest.mark.slow
def test_no_summary_where_none_is_wanted() -> None:
    with stubs(answer(b'action=DUNNO\n\n')) as (a,), ProxyProcess('--summary=0', '-s', a.service) as proxy:
        with proxy.client() as client:
            client.ask(request())
            wait_until(lambda: 'serves up to' in proxy.log)
            time.sleep(1)
        assert 'summary of' not in proxy.log


SUMMARY = re.compile(
    r'summary of \d+s, requests: (\d+), answers: (\d+), defaults: 0, failures: (\d+), in flight: (\d+), '
    r'oldest: (\S+ m?s|-), p99: (.*)'
)


@pytest.mark.slow
def test_a_summary_says_what_waits_and_who_is_silent_soon_after_a_service_stalls() -> None:
    with stubs(checked(hang), echo) as (a, b):
        services = ['-s', a.service, '-s', b.service + ':20']
        with ProxyProcess('--summary=3600', *services) as proxy, proxy.client() as client:
            started = time.monotonic()
            client.send(request())
            proxy.logged('summary of', 12)
            assert time.monotonic() - started < 10 * SCALE
            proxy.logged(') is stalled: 1 requests in flight, no answer for 5s')
            found = SUMMARY.search(proxy.log)
            assert found and found.groups()[:4] == ('1', '0', '0', '1'), proxy.log
            waited = re.fullmatch(r'([\d.]+) s', found[5])
            assert waited and 5 < float(waited[1]) < 10 * SCALE
            assert re.fullmatch(r'A ([\d.]+) s \(silent for ([\d.]+) s\), B -', found[6]), found[6]
            time.sleep(2)
            assert proxy.log.count('summary of') == 1


@pytest.mark.slow
def test_summaries_go_on_while_a_request_waits() -> None:
    with stubs(checked(hang)) as (a,), ProxyProcess('--summary=0.5', '-s', a.service) as proxy:
        client = proxy.client()
        client.send(request())
        wait_until(lambda: len(SUMMARY.findall(proxy.log)) >= 4, 20, 'summaries')
        requests, answers, failures, in_flight, oldest, p99 = SUMMARY.findall(proxy.log)[3]
        assert (requests, answers, failures, in_flight) == ('0', '0', '0', '1')
        assert re.fullmatch(r'[\d.]+ s', oldest) and re.fullmatch(r'A [\d.]+ s \(silent for [\d.]+ s\)', p99)
        client.close()


@pytest.mark.slow
def test_i6_a_hung_or_missing_reader_of_the_log_delays_nobody() -> None:
    with stubs(echo) as (a,):
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, str(MODULE), f'--listen=127.0.0.1:{port}', '-lvL', '-s', a.service], stdout=subprocess.PIPE
        )
        try:
            wait_until(lambda: socket.socket().connect_ex(('127.0.0.1', port)) == 0)
            with PostfixClient(port) as client:
                started = time.monotonic()
                for _ in range(1500):  # many times what a pipe holds
                    assert client.ask_own() == 'A'
                assert time.monotonic() - started < 30 * SCALE
            process.terminate()
            assert process.wait(60 * SCALE) == 0
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_lines_that_are_lost_are_counted_and_reported_when_lines_can_be_written_again(tmp_path: Path) -> None:
    fd = os.open('/dev/full', os.O_WRONLY)
    log = Log(fd=fd)
    for text in ('one', 'two'):
        log(6, text)
    wait_until(lambda: gevent.sleep(0.01) or log.lost == 2)  # type: ignore[func-returns-value]
    with (tmp_path / 'log').open('wb') as file:
        os.dup2(file.fileno(), fd)
    log(6, 'three')
    wait_until(lambda: gevent.sleep(0.01) or 'lost' in (tmp_path / 'log').read_text())  # type: ignore[func-returns-value]
    assert (tmp_path / 'log').read_text() == '[LOG info]: three\n[LOG warning]: 2 log lines were lost\n'
    os.close(fd)


def test_i5_no_line_goes_to_stderr_where_that_is_the_client_also_with_listen() -> None:
    near, far = socket.socketpair()
    port = free_port()
    command = [sys.executable, str(MODULE), f'--listen=127.0.0.1:{port}', '-s', 'A=127.0.0.1:1']
    with near, subprocess.Popen(command, stdin=far.fileno(), stdout=far.fileno(), stderr=far.fileno()) as process:
        far.close()

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(('127.0.0.1', port)) == 0

        wait_until(listens)
        process.terminate()
        assert near.recv(1000) == b''

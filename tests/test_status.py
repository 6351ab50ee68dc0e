"""The status endpoint: what it tells is right, and nobody who asks it, or refuses to listen, costs a mail."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hapolicy_gevent import (
    BOUNDS,
    LATE,
    STATUS_PAGE,
    Connection,
    Log,
    Proxy,
    Queue,
    ServiceFailure,
    buckets,
    duration,
    parse_service,
    quantiles,
)
from tests.servers import checked
from tests.status import StatusProxy
from tests.support import (
    MODULE,
    ROOT,
    SCALE,
    Peer,
    ProxyProcess,
    answer,
    echo,
    free_port,
    hang,
    hang_up,
    new_instance,
    processes,
    request,
    run,
    seconds_of,
    slow,
    stubs,
    wait_until,
)

REFUSED_SERVICE = 'GONE=127.0.0.1:1'
#: When something was, as the log has it, and how long ago.
AGO = r'\w{3} [ \d]\d \d\d:\d\d:\d\d \([\d.]+ m?s ago\)'


def ask(proxy: StatusProxy, times: int) -> int:
    """Have so many requests answered; return how many."""
    with proxy.client() as client:
        for _ in range(times):
            client.ask(request())
    return times


# -- status.json


def test_the_counts_are_those_of_the_requests() -> None:
    with stubs(echo, answer(b'action=reject go away\n\n')) as (a, b):
        with StatusProxy('-s', a.service + '::3', '-s', b.service + ':::7:9', '-d', '451 later') as proxy:
            before = proxy.data()
            assert (before['version'], before['requests']) == (1, 0)
            assert [service['why'] for service in before['services']] == ['never down'] * 2
            assert [service['share'] for service in before['services']] == [None, None]
            ask(proxy, 40)
            with proxy.client() as client:
                client.ask(b'nonsense\n\n')
                data = proxy.data()
    assert (data['requests'], data['answers'], data['clients'], data['clients_connected']) == (41, 40, 2, 1)
    assert data['defaults'] == {'no service is up': 0, 'all services failed': 0, 'deadline': 0, 'not a request': 1}
    assert set(data['refused'].values()) == {0} and data['log_lines_lost'] == 0
    assert data['options']['default'] == '451 later' and data['headline']['level'] == 'warning'
    assert re.fullmatch(
        r"2 of 2 services are up\. 1 requests got the default action '451 later' in the last minute\.",
        data['headline']['text'],
    )
    first, second = data['services']
    assert (first['name'], first['prio'], first['weight'], first['max'], first['state']) == ('A', 10, 3, 100, 'up')
    assert (second['timeout'], second['max'], second['stalled']) == (7, 9, False)
    assert (second['use'], second['full'], second['checks'], second['waiting']) == ('checked', None, 0, 0)
    assert (first['answers'], second['answers']) == (30, 10) == (first['verdicts']['ok'], second['verdicts']['reject'])
    assert (first['share'], second['share']) == (0.75, 0.25)
    assert first['requests_per_second'] > 1 and first['idle_connections'] == 1
    assert 0 < first['p50'] <= first['p95'] <= first['p99'] < 5
    assert 0 < data['time'] - data['started'] < 60 * SCALE
    assert set(first['history']) == {'answers', 'failed'}


def test_the_history_counts_each_step() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '-s', REFUSED_SERVICE + ':20') as proxy:
        ask(proxy, 25)
        wait_until(lambda: proxy.data()['services'][0]['history']['answers'], 20, 'a sample')
        history = proxy.data()['services'][0]['history']
        assert sum(history['answers']) == 25 and sum(history['failed']) == 0
        assert len(history['answers']) == len(history['failed']) <= 2


def test_the_headline_tells_which_since_when_why_and_what_it_cost() -> None:
    with stubs(echo, echo) as (a, b), StatusProxy('-s', a.service, '-s', b.service) as proxy:
        assert proxy.data()['headline'] == {'level': 'ok', 'text': '2 of 2 services are up.'}
        ask(proxy, 4)
        b.stop()
        proxy.logged('[B] (' + b.service[2:] + ') is down: ')
        ask(proxy, 4)
        headline = proxy.data()['headline']
        assert headline['level'] == 'warning'
        assert re.fullmatch(
            r"1 of 2 services are up\. "
            rf"B is down since {AGO}: its check: refused, connection refused\."
            r" 0 requests got the default action 'dunno' in the last minute\.",
            headline['text'],
        )
        a.stop()
        ask(proxy, 3)
        headline = proxy.data()['headline']
        assert headline['level'] == 'bad' and headline['text'].startswith('0 of 2 services are up. A is down since ')
        assert "3 requests got the default action 'dunno' in the last minute." in headline['text']
        down = proxy.data()['services'][1]
        assert (down['state'], down['why']) == ('down', 'its check: refused, connection refused')
        assert set(down['failures'].values()) == {0}, 'no mail was sent to it'
        assert time.time() - 60 * SCALE < down['since'] < time.time()


def test_a_service_that_was_never_up_is_told_with_its_reason() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '-s', REFUSED_SERVICE) as proxy:
        proxy.logged('[GONE] (127.0.0.1:1) is down: ')
        data = proxy.data()
        assert (data['services'][1]['state'], data['services'][1]['queries']) == ('down', 0)
        assert data['services'][1]['why'] == 'its check: refused, connection refused'
        assert re.search(rf'\. GONE is down since {AGO}: its check: refused, ', data['headline']['text'])
        assert re.fullmatch(rf'{AGO}: its check: refused, connection refused', data['services'][1]['last_failure'])
        assert data['services'][0]['last_failure'] is None


def test_one_outage_has_one_beginning_and_its_last_reason() -> None:
    with stubs(checked(answer(b'action=550\n\n')), echo) as (a, b):
        with StatusProxy('-s', a.service, '-s', b.service) as proxy:
            ask(proxy, 4)
            proxy.logged('is down: mail failed 2 times in a row, the last: invalid (up for ')
            first = proxy.data()['services'][0]
            proxy.logged('is on trial: its check passed (down for ')
            waiting = proxy.data()
            assert waiting['services'][0]['state'] == 'trial' and waiting['headline']['level'] == 'warning'
            assert waiting['headline']['text'].startswith('1 of 2 services are up. A is on trial since ')
            assert waiting['services'][0]['up'] is True
            ask(proxy, 2)
            proxy.logged('is down: mail failed 1 times in a row, the last: invalid (down for ')
            last = proxy.data()['services'][0]
            assert last['since'] == pytest.approx(first['since'], abs=0.1)
            whys = [f'mail failed {number} times in a row, the last: invalid' for number in (2, 1)]
            assert [first['why'], last['why']] == whys
            a.behaviour = echo
            wait_until(lambda: ask(proxy, 2) and proxy.data()['services'][0]['state'] == 'up', 20, 'up')
            assert proxy.data()['services'][0]['why'] == 'mail was answered'


def test_a_service_that_fails_now_and_then_is_told_although_it_is_up() -> None:
    def every_second(peer: Peer, message: bytes) -> None:
        (hang if len(peer.server.requests) % 2 else echo)(peer, message)

    with stubs(checked(every_second), echo) as (a, b):
        with StatusProxy('-s', a.service + ':::1.5', '-s', b.service + ':20') as proxy:
            with proxy.client() as client:
                for _ in range(4):
                    client.ask(request(instance=new_instance()))
            headline = proxy.data()['headline']
    assert headline['level'] == 'warning'
    assert headline['text'].startswith('2 of 2 services are up. A failed 2 of 4 queries in the last minute. ')


def test_a_stalled_service_is_told() -> None:
    with stubs(checked(hang)) as (a,), StatusProxy('-s', a.service, '--stall=0.5') as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: proxy.data()['services'][0]['stalled'], 10, 'stalled')
        data = proxy.data()
        assert data['services'][0]['in_flight'] == 1
        assert data['headline']['text'].startswith('1 of 1 services are up. A is stalled without an answer since ')


# -- what hangs


def test_what_waits_is_told_within_seconds_and_quantiles_count_it() -> None:
    with processes('AB') as (a, b):
        services = [f'-s{server.service}:::{8 * SCALE:g}' for server in (a, b)]
        with StatusProxy(*services) as proxy, contextlib.ExitStack() as stack:
            ask(proxy, 20)
            before = proxy.data()
            assert [row['silent'] for row in before['services']] == [0, 0] and before['in_flight'] == 0
            assert before['services'][0]['p99'] < 1 and before['services'][0]['last_failure'] is None
            a.hang()
            clients = [stack.enter_context(proxy.client()) for _ in range(3)]
            for client in clients:
                client.send(request(instance=new_instance()))
            wait_until(lambda: proxy.data()['services'][0]['silent'] > 2, 10, 'silence, before --stall')
            early = proxy.data()
            row = early['services'][0]
            assert (row['state'], row['stalled']) == ('up', False) and early['in_flight'] == row['in_flight'] > 0
            assert re.fullmatch(rf'without an answer since {AGO}, {row["in_flight"]} requests in flight', row['text'])
            assert row['p50'] < 1 < 2 < row['p99'] and row['latency'][2] == f'p99 {duration(row["p99"])}'
            assert 2 < row['silent'] <= early['oldest'] + 0.1
            assert early['headline']['level'] == 'ok'
            assert re.search(r' \d requests are in flight, the oldest for \d', early['headline']['text'])
            wait_until(lambda: proxy.data()['services'][0]['stalled'], 10, 'the stall')
            assert ' are up. A is stalled without an answer since ' in proxy.data()['headline']['text']
            health = proxy.get('/health')
            assert health.status == 200 and 'the oldest for' in health.text
            found = samples(proxy.fresh('/metrics'))
            assert found['hapolicy_in_flight', ()] == early['in_flight']
            assert found['hapolicy_oldest_request_seconds', ()] > 5 < found['hapolicy_service_silent_seconds', ('A',)]
            assert found['hapolicy_service_p99_seconds', ('A',)] > 5 > found['hapolicy_service_p99_seconds', ('B',)]


@pytest.mark.parametrize('in_flight', [True, False])
def test_a_check_that_is_answered_ends_no_stall_while_mail_has_no_answer(in_flight: bool) -> None:
    proxy, now = Proxy([parse_service('A=127.0.0.1:1')], b'', b'', 90, Log()), time.monotonic()
    ((service, pool),) = proxy.pools.items()
    proxy.stalled[service], service.checked_at = now - 10, now
    pool.busy = {Connection(pool, now - 1): None} if in_flight else {}
    proxy._each_second(now)
    assert (service in proxy.stalled) is in_flight, 'its database may be gone'


@pytest.mark.parametrize(('full', 'heard', 'silent'), [(0, 40, 5), (0, 3, 3), (1, 40, 0)])
def test_a_service_that_hangs_is_silent_where_no_mail_flows_but_a_check(full: int, heard: float, silent: float) -> None:
    proxy, now = Proxy([parse_service('A=127.0.0.1:1')], b'', b'', 90, Log()), time.monotonic()
    (pool,) = proxy.pools.values()
    pool.service.checked_at, pool.checker.full = now - heard, full
    assert proxy.silence(pool, now) == 0
    pool.checker.running[Connection(pool, now - 5)] = None
    assert proxy.silence(pool, now) == pytest.approx(silent), 'a check may wait for a child of a full one'


def test_a_failed_query_counts_with_its_time_and_its_reason_is_kept() -> None:
    with stubs(checked(hang), echo) as (a, b):
        with StatusProxy('-s', a.service + f':::{SCALE:g}', '-s', b.service + ':20') as proxy:
            ask(proxy, 1)
            row = proxy.data()['services'][0]
            assert re.fullmatch(rf'{AGO}: timeout, no answer within {SCALE:g}s', row['last_failure'])
            assert (row['failed'], row['answers'], row['in_flight'], row['silent']) == (1, 0, 0, 0)
            assert row['p50'] == row['p99'] >= SCALE
            a.behaviour = echo
            ask(proxy, 200)
            row = proxy.data()['services'][0]
            assert row['p50'] < 0.5 and row['last_failure'].endswith(f': timeout, no answer within {SCALE:g}s')


def test_a_service_is_stalled_until_it_answers_though_its_queries_have_failed() -> None:
    with processes('A') as (a,), StatusProxy('-s', a.service + f':::{1.5 * SCALE:g}', '--stall=0.5') as proxy:
        ask(proxy, 1)
        a.hang()
        with proxy.client() as client:
            assert client.ask(request()) == 'dunno'
        proxy.logged('failed: timeout')
        data = proxy.data()
        row = data['services'][0]
        assert (data['in_flight'], row['in_flight'], row['stalled'], row['failures']['timeout']) == (0, 0, True, 1)
        assert row['silent'] > SCALE
        time.sleep(3)
        assert 'no longer stalled' not in proxy.log, 'its query has failed, and nothing is in flight'
        a.wake()
        proxy.logged('is no longer stalled')
        wait_until(lambda: not proxy.data()['services'][0]['stalled'], 20, 'its answer')
        assert proxy.data()['services'][0]['silent'] == 0
        assert proxy.log.count('is stalled') == proxy.log.count('is no longer stalled') == 1


def test_what_waits_for_a_connection_is_in_flight() -> None:
    with stubs(slow(2)) as (a,), StatusProxy('-s', a.service + '::::1') as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(4)]
        for client in clients[:3]:
            client.send(request())
        clients[3].send(b'request=smtpd_access_policy\n')  # not yet a request
        wait_until(lambda: a.requests)
        data = proxy.data()
        assert (data['clients_connected'], data['in_flight']) == (4, 3)
        assert (data['services'][0]['in_flight'], data['services'][0]['waiting']) == (1, 2)
        assert 0 < data['oldest'] < 10 * SCALE
        for client in clients[:3]:
            client.read_answer()
        assert (proxy.data()['in_flight'], proxy.data()['oldest']) == (0, 0)


def test_quantiles_are_the_bounds_that_hold() -> None:
    pool = Queue([parse_service('A=127.0.0.1:1')], Log(), checked=False).balancer.pools[0]
    tally = pool.service.tally
    assert set(quantiles(tally.answered, pool, 0).values()) == {None}
    for _ in range(98):
        pool.service.answered(b'DUNNO', 0, False, 0.0011)
    assert quantiles(tally.answered, pool, 0) == {'p50': 0.00125, 'p95': 0.00125, 'p99': 0.00125}
    pool.busy[Connection(pool, 100)] = None
    assert quantiles(tally.answered, pool, 130)['p99'] == pytest.approx(31.5), 'one in flight'
    assert quantiles(tally.answered, pool, 1000)['p99'] == 100, 'also for more'
    pool.busy.clear()
    pool.failed(Connection(pool, 0), ServiceFailure(LATE, 'no answer'), 500)
    assert sum(tally.answered) == 98 and tally.failed[-2:] == [0, 1]
    assert tally.sum == pytest.approx(98 * 0.0011)
    assert list(BOUNDS) == sorted(BOUNDS)
    for bound in (0.001, 0.002, 0.005, 0.1, 1, 10, 100):
        assert any(math.isclose(bound, known) for known in BOUNDS)


def test_the_options_in_effect_are_told() -> None:
    with stubs(echo) as (a,):
        with StatusProxy('-s', a.service, '-d', '451 wait', '--fall=3', '--summary=0') as proxy:
            data = proxy.data()
            clients = re.search(r'serves up to (\d+) clients', proxy.log)
    options = data['options']
    assert data['host'] == socket.gethostname()
    assert (options['listen'], options['status']) == ([f'127.0.0.1:{proxy.port}'], f'127.0.0.1:{proxy.status_port}')
    assert clients and options['max_clients'] == int(clients[1]), 'what the descriptor limit carries'
    assert (options['default'], options['failed'], options['fall']) == ('451 wait', '451 wait', 3)
    assert (options['deadline'], options['stall'], options['summary'], options['logging']) == (90, 5, 0, 1)
    assert not {'service', 'help', 'version'} & set(options)


def test_whatever_options_are_given_they_are_told_as_they_were() -> None:
    given = {'deadline': 80, 'failed': '451 4.7.1 caf\u00e9', 'max-clients': 50, 'sticky': 'client_address/24/64',
             'fall': 3, 'stall': 4, 'grace': 20, 'summary': 0, 'name': 'spf-1', 'default': 'ok'}  # fmt: skip
    with stubs(echo) as (a,):
        options = [f'--{name}={value}' for name, value in given.items()]
        with StatusProxy('-s', a.service, '-v', '--reuse-port', *options) as proxy:
            told = proxy.data()['options']
    assert told == told | {name.replace('-', '_'): value for name, value in given.items()}


def test_times_are_said_as_people_say_them() -> None:
    said = [duration(seconds) for seconds in (None, 0.0, 0.00315, 0.9, 12.34, 119, 120, 7199, 7500, 100000, 400000)]
    assert said == ['-', '0 ms', '3.15 ms', '900 ms', '12.3 s', '119 s', '2 min', '119 min', '2 h', '27 h', '4 d']


# -- health


def test_health_is_good_while_a_service_is_up() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '-s', REFUSED_SERVICE) as proxy:
        ask(proxy, 4)
        health = proxy.get('/health')
        assert health.status == 200 and health.text.startswith('1 of 2 services are up. GONE is down since ')
        a.stop()
        wait_until(lambda: proxy.get('/health').status == 503, 5, 'illness, without a request')
        assert proxy.get('/health').text.startswith('0 of 2 services are up. A is down since ')
        a.start()
        wait_until(lambda: proxy.get('/health').status == 200, 5, 'health, without a request')
        data = proxy.data()
        assert (data['requests'], data['services'][0]['state'], data['headline']['level']) == (4, 'up', 'warning')
        assert data['headline']['text'].startswith('1 of 2 services are up. GONE is down since ')


def test_a_proxy_that_drains_answers_and_says_so() -> None:
    with stubs(slow(3)) as (a,), StatusProxy('-s', a.service) as proxy, proxy.client() as client:
        client.send(request())
        wait_until(lambda: a.requests)
        proxy.process.send_signal(signal.SIGTERM)
        wait_until(lambda: proxy.get('/health').status == 503, 2, 'draining')
        assert proxy.get('/health').text.startswith('Draining: no new client is accepted, 1 are connected. ')
        data = proxy.data()
        assert data['draining'] and data['headline']['text'].startswith('Draining: no new client is accepted, 1 ')
        assert client.read_answer() == b'action=DUNNO  A\n\n'
        assert proxy.process.wait(10 * SCALE) == 0


# -- metrics


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the values of a Prometheus text by name and label values, in order of label names."""
    parser = pytest.importorskip('prometheus_client.parser', reason='prometheus-client is not installed')
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_is_the_counter() -> None:
    with stubs(echo, answer(b'action=450 wait\n\n'), checked(hang_up)) as (a, b, c):
        services = [f'-s{each}' for each in (a.service, b.service, f'x"\\=127.0.0.1:{c.port}', REFUSED_SERVICE)]
        with StatusProxy(*services, '--fall=1000', '--name=spf') as proxy:
            ask(proxy, 30)
            with proxy.client() as client:
                client.send(b'cut off')
                client.close()
            wait_until(lambda: proxy.data()['refused']['left in mid-request'] == 1)
            data, found = proxy.data(), samples(proxy.fresh('/metrics'))
    for name in ('requests', 'redispatches', 'retries', 'clients', 'log_lines_lost'):
        assert found[f'hapolicy_{name}_total', ()] == data[name], name
    assert found['hapolicy_clients', ()] == 0
    assert found['hapolicy_build_info', ('spf', data['program'])] == 1
    for name in ('defaults', 'refused'):
        for reason, count in data[name].items():
            assert found[f'hapolicy_{name}_total', (reason,)] == count
    for service in data['services']:
        who = service['name']
        for kind, count in service['verdicts'].items():
            assert found['hapolicy_answers_total', (who, kind)] == count
        for reason, count in service['failures'].items():
            assert found['hapolicy_failures_total', (reason, who)] == count
        assert found['hapolicy_service_up', (who,)] == service['up'] == (service['state'] == 'up')
        assert found['hapolicy_query_seconds_count', (who,)] == service['answers']
        assert found['hapolicy_query_seconds_bucket', ('+Inf', who)] == service['answers']
        for name in ('p50', 'p95', 'p99'):
            assert found[f'hapolicy_service_{name}_seconds', (who,)] == (service[name] or 0)
        for name in ('in_flight', 'max', 'idle_connections', 'stalled'):
            assert found[f'hapolicy_service_{name}', (who,)] == service[name]
        assert found['hapolicy_service_full', (who,)] == (service['full'] or 0)
    assert [service['state'] for service in data['services']] == ['up', 'up', 'up', 'down']
    assert found['hapolicy_answers_total', ('B', 'defer')] > 0 < found['hapolicy_failures_total', ('dropped', 'x"\\')]
    assert {name.partition('_')[0] for name, _ in found} == {'hapolicy'}


def test_the_buckets_are_cumulative_at_1_2_5() -> None:
    service = parse_service('A=127.0.0.1:1')
    for seconds in (0.00005, 0.0002, 0.00021, 0.3, 1000):
        service.answered(b'DUNNO', 0, False, seconds)
    found = dict(buckets(service.tally))
    assert list(found)[:4] == ['0.0001', '0.0002', '0.0005', '0.001']
    assert list(found)[-4:] == ['20', '50', '100', '+Inf'] and len(found) == 20
    assert [found[bound] for bound in ('0.0001', '0.0002', '0.0005', '0.2', '0.5', '100', '+Inf')] == [
        1, 2, 3, 3, 4, 4, 5,
    ]  # fmt: skip


def test_without_the_client_library_metrics_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / 'prometheus_client.py').write_text('raise ImportError("hidden")\n')
    with stubs(echo) as (a,), StatusProxy('-s', a.service, environment={'PYTHONPATH': str(tmp_path)}) as proxy:
        metrics = proxy.get('/metrics')
        assert metrics.status == 501
        assert f'{sys.executable} -m pip install prometheus-client, then restart' in metrics.text
        assert 'install python3-prometheus-client' in metrics.text
        assert proxy.get('/status.json').status == proxy.get('/health').status == 200
        ask(proxy, 1)


def test_debians_own_python_serves_it_all() -> None:
    python = '/usr/bin/python3'
    if subprocess.run([python, '-c', 'import gevent, docopt'], capture_output=True).returncode:
        pytest.skip('python3-gevent or python3-docopt is not installed')
    has_client = not subprocess.run([python, '-c', 'import prometheus_client'], capture_output=True).returncode
    with stubs(echo) as (a,), StatusProxy('-s', a.service, python=python) as proxy:
        ask(proxy, 7)
        assert proxy.data()['requests'] == 7
        assert proxy.get('/').status == 200
        assert proxy.get('/metrics').status == (200 if has_client else 501)
        if has_client:
            assert samples(proxy.fresh('/metrics'))['hapolicy_requests_total', ()] == 7


# -- HTTP


def test_headers_stand_on_every_answer() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        found = {path: proxy.get(path) for path in ('/', '/status.json', '/health', '/metrics', '/etc/passwd')}
        found['post'] = proxy.get('/', 'POST')
    assert [reply.status for reply in found.values() if reply.status != 501][-3:] == [200, 404, 405]
    for reply in found.values():
        policy = reply.headers['Content-Security-Policy'].split('; ')
        assert policy[0] == "default-src 'none'" and "frame-ancestors 'none'" in policy
        assert 'unsafe' not in ''.join(policy)
        assert reply.headers['X-Content-Type-Options'] == 'nosniff'
        assert reply.headers['Cache-Control'] == 'no-store'
        assert reply.headers['Cross-Origin-Resource-Policy'] == 'same-origin'
        assert int(reply.headers['Content-Length']) == len(reply.text.encode())
    assert found['/'].headers['Content-Type'] == 'text/html; charset=utf-8'
    assert found['/status.json'].headers['Content-Type'] == 'application/json; charset=utf-8'


def test_only_get_and_head() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        head, get = proxy.get('/health', 'HEAD'), proxy.get('/health')
        assert (head.status, head.text, head.headers['Content-Length']) == (200, '', get.headers['Content-Length'])
        for method in ('POST', 'PUT', 'DELETE', 'OPTIONS', 'TRACE', 'BREW'):
            reply = proxy.get('/health', method)
            assert (reply.status, reply.headers['Allow']) == (405, 'GET, HEAD')


@pytest.mark.parametrize(
    'sent',
    [
        b'\r\n\r\n',
        b'nonsense\r\n\r\n',
        b'GET / HTTP/1\r\n\r\n',
        b'GET / HTTP/9.9\r\n\r\n',
        b'GET / HTTP/x.y\r\n\r\n',
        b'GET ' + b'/' * 9000 + b' HTTP/1.1\r\n\r\n',
        b'GET / HTTP/1.1\r\nx: ' + b'x' * 20000 + b'\r\n\r\n',
        b'GET / HTTP/1.1\r\n' + b'x: y\r\n' * 5000 + b'\r\n',
        b'GET / HTTP/1.1\r\nno colon\r\n\r\n',
        b'GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n',
        b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
        b'POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999\r\n\r\n',
        b'GET /%00%ff%0d%0a HTTP/1.1\r\n\r\n',
        b'GET /\xff\x00\r HTTP/1.1\r\n\r\n',
        b'\xff\xfe\x00' * 100 + b'\n\n',
    ],
)
def test_broken_requests_get_an_end_and_leave_no_trace(sent: bytes) -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        for reset in (False, True):
            with socket.create_connection(('127.0.0.1', proxy.status_port), timeout=20 * SCALE) as sock:
                sock.sendall(sent)
                if reset:
                    continue
                reply = b''
                with contextlib.suppress(OSError):  # it may be reset
                    sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while data := sock.recv(65536):
                        reply += data
                assert not reply or re.match(rb'HTTP/1.1 (200 OK|400 Bad Request|404|405|414 [RU])', reply), reply
                assert b'Traceback' not in reply
        ask(proxy, 1)
        assert proxy.get('/health').status == 200
        lines = [line for line in proxy.log.splitlines() if not line.startswith('[LOG ')]
        assert lines == [] and 'Internal error' not in proxy.log, proxy.log


@pytest.mark.parametrize('headers', [b'x: ' + b'y' * 20000 + b'\r\n', b'x: y\r\n' * 3000])
def test_headers_are_read_up_to_8_kb(headers: bytes) -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        for sent, status in ((headers, b'400'), (headers[:6000] + b'\r\n', b'200')):
            with socket.create_connection(('127.0.0.1', proxy.status_port), timeout=20 * SCALE) as sock:
                sock.sendall(b'GET /health HTTP/1.1\r\n' + sent + b'\r\n')
                assert sock.recv(12) == b'HTTP/1.1 ' + status


def test_connections_that_say_nothing_are_ended_and_others_are_served() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        calm = seconds_of(lambda: ask(proxy, 50))
        quiet = [socket.create_connection(('127.0.0.1', proxy.status_port)) for _ in range(30)]
        assert seconds_of(lambda: ask(proxy, 50)) < 10 * calm + 1, 'mail is not delayed'
        held = seconds_of(lambda: proxy.get('/health', seconds=25).status == 200 or pytest.fail('no 200'))
        assert held < 2 * SCALE, 'nor is this'
        for sock in quiet:
            sock.settimeout(20)
            assert sock.recv(1) == b''
            sock.close()


def test_a_slow_request_is_answered_though_many_others_come_and_go() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        with socket.create_connection(('127.0.0.1', proxy.status_port), timeout=20 * SCALE) as slow_one:
            slow_one.sendall(b'GET /health HTTP/1.1\r\n')
            for _ in range(30):
                assert proxy.get('/health').status == 200
            slow_one.sendall(b'\r\n')
            assert slow_one.recv(12) == b'HTTP/1.1 200'


def test_a_request_that_drips_in_is_cut_off() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        started = time.monotonic()
        with socket.create_connection(('127.0.0.1', proxy.status_port)) as drip:
            drip.sendall(b'GET / HTTP/1.1\r\n')
            with pytest.raises(OSError):
                while time.monotonic() - started < 30 * SCALE:
                    drip.sendall(b'x: y\r\n')
                    time.sleep(0.2)
        assert time.monotonic() - started < 12 * SCALE


#: Serves what no buffer holds to one who does not read it, and tells what stands in the log.
STOPPED_READER = """
import functools, gevent, gevent.socket as socket, hapolicy_gevent as hapolicy
class Status(hapolicy.Status):
    def _respond(self, head):
        return bytes(50_000_000)
lines, hapolicy.STATUS_SECONDS = [], 0.5
log = lambda level, text: lines.append(text)
log.verbose = log.requests = False
hapolicy.patch_sockets()
gevent.get_hub().print_exception = functools.partial(hapolicy.report_error, log)
listener = hapolicy.open_listener(hapolicy.Address(socket.AF_INET, '127.0.0.1', %d), 0, False)
options = hapolicy.parse_command_line(['-sA=127.0.0.1:9'])
proxy = hapolicy.Proxy(options.service, b'dunno', b'dunno', 90, log, checked=False)
hapolicy.start_server(listener, Status(proxy, options, log).handle, 20)
reader = socket.create_connection(listener.getsockname())
reader.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n')
gevent.sleep(2)
received = 0
while data := reader.recv(65536):
    received += len(data)
print(received < 50_000_000, lines)
"""


def test_a_reader_that_stops_is_cut_off() -> None:
    done = subprocess.run(
        [sys.executable, '-c', STOPPED_READER % free_port()], capture_output=True, text=True, cwd=ROOT,
        timeout=60 * SCALE,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ('True []\n', '')


def test_an_endless_upload_is_cut_off_and_holds_up_no_mail() -> None:
    def upload() -> None:
        with socket.create_connection(('127.0.0.1', proxy.status_port)) as sock, contextlib.suppress(OSError):
            sock.sendall(b'POST / HTTP/1.1\r\n\r\n')
            while not stop.is_set():
                sock.sendall(bytes(1 << 20))
        ended.append(time.monotonic())

    ended: list[float] = []
    stop = threading.Event()
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy, proxy.client() as client:
        assert client.ask_own() == 'A'
        threads = [threading.Thread(target=upload) for _ in range(3)]
        delays: list[float] = []
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while not delays or (len(ended) < 3 and time.monotonic() < started + 20):
            before = time.monotonic()
            assert client.ask_own() == 'A'
            delays.append(time.monotonic() - before)
        stop.set()
        for thread in threads:
            thread.join()
    assert max(ended) - started < 4 * SCALE and max(delays) < SCALE, (ended, max(delays))


def test_clients_that_keep_their_end_open_leave_room_for_others() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy, contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.create_connection(('127.0.0.1', proxy.status_port)))
            sock.sendall(b'GET /health HTTP/1.1\r\n\r\n')
        started = time.monotonic()
        assert proxy.get('/health').status == 200
        assert time.monotonic() - started < 4, 'each of them may last 5 s'


@pytest.mark.slow
def test_of_many_services_it_is_built_less_often() -> None:
    services = [word for i in range(100) for word in ('-s', f'S{i}=127.0.0.1:1')]
    with StatusProxy(*services) as proxy:
        end, times = time.monotonic() + 2, set()
        while time.monotonic() < end:
            times.add(json.loads(proxy.get('/status.json').text)['time'])
    assert len(times) <= 2, 'each holds up mail for tens of milliseconds'


def test_hostile_load_on_the_status_does_not_stop_mail() -> None:
    stop = threading.Event()

    def hammer(paths: tuple[str, ...]) -> None:
        while not stop.is_set():
            for path in paths:
                proxy.get(path)

    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        threads = [threading.Thread(target=hammer, args=(('/', '/status.json', '/metrics'),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            delays = []
            with proxy.client() as client:
                for _ in range(200):
                    started = time.monotonic()
                    assert client.ask_own() == 'A'
                    delays.append(time.monotonic() - started)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert sorted(delays)[100] < 0.1 * SCALE and max(delays) < SCALE, sorted(delays)[-5:]


# -- the page


def test_the_page_is_a_constant_that_no_name_can_get_into() -> None:
    name = '<b>&"\'</noscript><script>alert(1)</script>'
    with stubs(echo) as (a,), StatusProxy('-s', f'{name}=127.0.0.1:{a.port}', '-d', '451 <i>') as proxy:
        ask(proxy, 1)
        assert proxy.get('/').text == STATUS_PAGE
        assert proxy.data()['services'][0]['name'] == name


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = MODULE.read_text().partition('STATUS_PAGE = ')[2]
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {'data:,', 'status.json', 'metrics', 'health'}
    assert re.findall(r'https?://(?!www\.w3\.org/)', page) == []
    assert 'innerHTML' not in page and ' style="' not in page


# -- the command line


@pytest.mark.parametrize(
    ('arguments', 'status', 'said'),
    [
        (['--status=nonsense'], 2, "--status 'nonsense'"),
        (['--status=localhost:10061'], 2, "--status 'localhost:10061'"),
        (['--status=127.0.0.1:0'], 2, "port '0'"),
        (['--status=127.0.0.1:10061:'], 2, '--status'),
        (['--status=unix:relative'], 2, "unix socket 'relative'"),
        (['--status=192.0.2.1:10061'], 1, "--status '192.0.2.1:10061'"),
        (['--status=unix:/no/such/directory/s'], 1, "--status 'unix:/no/such/directory/s'"),
    ],
)
def test_a_bad_status_ends_the_start_with_one_line(arguments: list[str], status: int, said: str) -> None:
    done = run('-s', 'a=h:1', f'--listen=127.0.0.1:{free_port()}', *arguments)
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (status, b'', 1), lines
    assert said in lines[0]


def test_status_needs_listen_and_an_address_of_its_own() -> None:
    done = run('-s', 'a=h:1', f'--status=127.0.0.1:{free_port()}')
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and done.stderr.endswith(b'needs --listen\n')
    where = f'127.0.0.1:{free_port()}'
    done = run('-s', 'a=h:1', f'--listen={where}', f'--status={where}', '--reuse-port')
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and b'an address of its own' in done.stderr


def test_a_taken_status_address_ends_the_start_and_reuse_port_shares_it() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        where = f'--status=127.0.0.1:{proxy.status_port}'
        done = run('-s', a.service, f'--listen=127.0.0.1:{free_port()}', where)
        assert done.returncode == 1 and b'Address already in use' in done.stderr and b'--status' in done.stderr
    with stubs(echo) as (a,), StatusProxy('-s', a.service, '--reuse-port') as proxy:
        where = f'--status=127.0.0.1:{proxy.status_port}'
        with ProxyProcess('-s', a.service, '--reuse-port', where, port=proxy.port):
            pids = {json.loads(proxy.get('/status.json').text)['pid'] for _ in range(60)}
            assert len(pids) == 2


def test_a_replacement_that_cannot_start_leaves_the_old_process_its_listeners(tmp_path: Path) -> None:
    path = tmp_path / 'policy'
    with stubs(echo) as (a,), socket.create_server(('127.0.0.1', 0)) as taken:
        arguments = ['-s', a.service, '--reuse-port', f'--listen=unix:{path}']
        with ProxyProcess(*arguments) as old:
            before = path.stat().st_ino
            for more in (f'--status=127.0.0.1:{taken.getsockname()[1]}', '--listen=unix:/no/such/directory/s'):
                done = run(*arguments, f'--listen=127.0.0.1:{old.port}', more)
                assert done.returncode == 1, done
                assert path.stat().st_ino == before and [*tmp_path.iterdir()] == [path]
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
                    client.sendall(b'request=smtpd_access_policy\ninstance=i\n\n')
                    assert client.recv(100) == b'action=DUNNO i A\n\n'


def test_a_process_that_is_replaced_leaves_the_status_to_the_new_one_at_once() -> None:
    with stubs(slow(3)) as (a,), StatusProxy('-s', a.service, '--reuse-port') as old:
        client = old.client()
        client.send(request())
        where = f'--status=127.0.0.1:{old.status_port}'
        with ProxyProcess('-s', a.service, '--reuse-port', where, port=old.port) as new:
            old.process.terminate()
            time.sleep(0.5)
            assert old.process.poll() is None, 'it drains, with a request in flight'
            assert {json.loads(old.get('/status.json').text)['pid'] for _ in range(20)} == {new.process.pid}
        assert client.read_answer()


def test_a_unix_socket_serves_the_status(tmp_path: Path) -> None:
    path = tmp_path / 'status'
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, f'--status=unix:{path}', '--socket-mode=0660'):
        assert oct(path.stat().st_mode)[-3:] == '660'
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b'GET /health HTTP/1.0\r\n\r\n')
            reply = b''
            while data := sock.recv(65536):
                reply += data
            assert reply.startswith(b'HTTP/1.1 200 OK\r\n') and reply.endswith(b'\r\n\r\nok\n')


def test_the_documented_fields_are_those_that_are_there() -> None:
    text = (ROOT / 'docs' / 'operations.md').read_text()
    documented = set(re.findall(r'[a-z_0-9]+', text.partition('`/status.json` has these fields')[2].split('```')[1]))

    def names(value: Any) -> set[str]:
        found = set(value)
        for key, inner in value.items():
            if isinstance(inner, dict) and key not in ('defaults', 'refused', 'verdicts', 'failures', 'options'):
                found |= names(inner)
        return found

    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        data = proxy.data()
    assert names(data) | names(data['services'][0]) <= documented

"""The metrics in Debian's Prometheus: what it scrapes is what was counted, and the rules in contrib are rules."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import checked
from tests.status import StatusProxy
from tests.support import (
    ROOT,
    SCALE,
    answer,
    echo,
    free_port,
    hang_up,
    processes,
    request,
    run,
    slow,
    stubs,
    wait_until,
)

pytest.importorskip('prometheus_client', reason='prometheus-client is not installed')
needs_promtool = pytest.mark.skipif(not shutil.which('promtool'), reason='promtool (prometheus) is not installed')
needs_prometheus = pytest.mark.skipif(not shutil.which('prometheus'), reason='prometheus is not installed')


class Prometheus:
    """Debian's prometheus, scraping one proxy every second."""

    def __init__(self, directory: Path, target: int) -> None:
        self.url = f'http://127.0.0.1:{(port := free_port())}'
        config = {
            'global': {'scrape_interval': '1s', 'evaluation_interval': '1s'},
            'scrape_configs': [{'job_name': 'hapolicy', 'static_configs': [{'targets': [f'127.0.0.1:{target}']}]}],
            'rule_files': [str(ROOT / 'contrib' / 'prometheus-alerts.yml')],
        }
        (directory / 'prometheus.yml').write_text(json.dumps(config))  # JSON is YAML
        with (directory / 'log').open('wb') as log:
            self.process = subprocess.Popen(
                ['prometheus', f'--config.file={directory}/prometheus.yml', f'--storage.tsdb.path={directory}/data',
                 f'--web.listen-address=127.0.0.1:{port}'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def api(self, path: str) -> Any:
        """Return the data of an answer of its HTTP interface, None while it does not answer."""
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f'{self.url}/api/v1/{path}', timeout=10 * SCALE) as reply:
                return json.load(reply)['data']
        return None

    def query(self, expression: str) -> dict[str, float]:
        """Return the values of an expression by service, '' without one."""
        data = self.api(f'query?query={urllib.parse.quote(expression)}') or {'result': []}
        return {found['metric'].get('service', ''): float(found['value'][1]) for found in data['result']}

    def alerts(self) -> set[str]:
        """Return the alerts that are pending or firing."""
        data = self.api('alerts') or {'alerts': []}
        return {alert['labels']['alertname'] for alert in data['alerts']}

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(20 * SCALE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def prometheus(directory: Path, target: int) -> Iterator[Prometheus]:
    server = Prometheus(directory, target)
    try:
        yield server
    finally:
        server.close()


@needs_prometheus
def test_prometheus_reads_what_was_counted(tmp_path: Path) -> None:
    with stubs(echo, slow(0.2)) as (a, b), StatusProxy('-s', a.service, '-s', b.service) as proxy:
        with prometheus(tmp_path, proxy.status_port) as server, proxy.client() as client:
            wait_until(lambda: server.query('hapolicy_requests_total') == {'': 0}, 30, 'the first scrape')
            for _ in range(60):
                client.ask(request())
                time.sleep(0.05)
            wait_until(lambda: server.query('hapolicy_requests_total') == {'': 60}, 10, 'all requests')
            answered = {'A': len(a.requests), 'B': len(b.requests)}
            assert sum(answered.values()) == 60
            wait_until(lambda: server.query('sum by (service) (hapolicy_answers_total)') == answered, 30, 'all answers')
            assert server.query('up{job="hapolicy"}') == {'': 1}
            assert 1 < server.query('rate(hapolicy_requests_total[10s])')[''] < 30
            p99 = server.query('histogram_quantile(0.99, rate(hapolicy_query_seconds_bucket[20s]))')
            assert 0 < p99['A'] < 0.2 < p99['B']
            b.behaviour = checked(hang_up)
            wait_until(lambda: client.ask(request()) and 'failed: dropped' in proxy.log, 10, 'a failure')
            wait_until(lambda: server.query('hapolicy_failures_total{reason="dropped"}') == {'A': 0, 'B': 1}, 10, 'it')
            b.stop()
            wait_until(lambda: server.query('hapolicy_service_up') == {'A': 1, 'B': 0}, 10, 'B down')
            assert server.query('hapolicy_failures_total{reason="refused"}') == {'A': 0, 'B': 0}, 'it got no mail'
            wait_until(lambda: server.alerts() == {'HapolicyServiceDown'}, 60, 'the alert')


@needs_prometheus
def test_prometheus_sees_within_seconds_what_hangs(tmp_path: Path) -> None:
    with processes('AB') as (a, b), StatusProxy('-s', a.service, '-s', b.service + ':20') as proxy:
        with prometheus(tmp_path, proxy.status_port) as server, proxy.client() as client:
            client.ask(request())
            wait_until(lambda: server.query('hapolicy_service_p99_seconds') != {}, 30, 'the first scrape')
            assert server.query('hapolicy_in_flight') == {'': 0} and server.query('hapolicy_service_stalled')['A'] == 0
            a.hang()
            started = time.monotonic()
            client.send(request())
            wait_until(lambda: server.query('hapolicy_service_stalled') == {'A': 1, 'B': 0}, 20, 'the stall')
            assert time.monotonic() - started < 10 * SCALE
            assert server.query('hapolicy_in_flight') == {'': 1}
            assert server.query('hapolicy_oldest_request_seconds')[''] > 5
            for name in ('silent', 'p99'):
                found = server.query(f'hapolicy_service_{name}_seconds')
                assert found['A'] > 5 and found['B'] == 0, (name, found)
            assert server.query('hapolicy_service_up') == {'A': 1, 'B': 1}


@needs_promtool
def test_promtool_finds_no_fault_in_the_metrics() -> None:
    with stubs(echo, answer(b'action=reject\n\n')) as (a, b), StatusProxy('-s', a.service, '-s', b.service) as proxy:
        with proxy.client() as client:
            for _ in range(10):
                client.ask(request())
        text = proxy.fresh('/metrics')
    done = run('check', 'metrics', program=['promtool'], input=text, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, '')


@needs_promtool
def test_promtool_takes_the_alerts() -> None:
    rules = ROOT / 'contrib' / 'prometheus-alerts.yml'
    done = run('check', 'rules', rules, program=['promtool'], text=True, input='')
    assert done.returncode == 0 and '9 rules found' in done.stdout, done


def test_alerts_and_dashboard_name_metrics_that_exist() -> None:
    with stubs(echo) as (a,), StatusProxy('-s', a.service) as proxy:
        text = proxy.fresh('/metrics')
    exported = set(re.findall(r'^(hapolicy_[a-z_0-9]+)', text, re.MULTILINE))
    for file in ('prometheus-alerts.yml', 'grafana-dashboard.json'):
        named = set(re.findall(r'hapolicy_[a-z_0-9]+', (ROOT / 'contrib' / file).read_text()))
        assert named and named <= exported, named - exported


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads((ROOT / 'contrib' / 'grafana-dashboard.json').read_text())
    assert [variable['type'] for variable in dashboard['templating']['list']] == ['datasource', 'query']
    assert len({panel['id'] for panel in dashboard['panels']}) == len(dashboard['panels']) >= 5
    for panel in dashboard['panels']:
        assert panel['datasource']['uid'] == '${datasource}' and panel['targets'] and panel['gridPos']['w'] <= 24

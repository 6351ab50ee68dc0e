"""Failure that Postfix never sees: servers killed, stopped, restarted under load; the proxy replaced; soak."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import (
    ACTIVATED,
    MODULE,
    SCALE,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    attributes,
    echo,
    free_port,
    hang,
    hang_up,
    in_threads,
    new_instance,
    request,
    slow,
    stubs,
    wait_until,
)

SOAK_SECONDS = float(os.environ.get('HAPOLICY_TEST_SOAK', '120'))

SERVER = """
import socket, sys, threading
def serve(sock):
    buffer = b''
    while True:
        data = sock.recv(65536)
        if not data:
            return
        buffer += data
        while b'\\n\\n' in buffer:
            message, _, buffer = buffer.partition(b'\\n\\n')
            instance = message.partition(b'\\ninstance=')[2].partition(b'\\n')[0]
            sock.sendall(b'action=DUNNO ' + instance + b' ' + sys.argv[2].encode() + b'\\n\\n')
def safely(sock):
    try:
        serve(sock)
    except OSError:
        pass
    sock.close()
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])), backlog=1024)
while True:
    threading.Thread(target=safely, args=(listener.accept()[0],), daemon=True).start()
"""


class ServerProcess:
    """An echo server as a process of its own, to be killed, stopped, continued and restarted."""

    def __init__(self, name: str) -> None:
        self.name, self.port = name, free_port()
        self.start()

    def start(self) -> None:
        """Start; return when it can be connected to."""
        self.process = subprocess.Popen([sys.executable, '-c', SERVER, str(self.port), self.name])

        def connects() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', self.port)):
                return True
            return False

        wait_until(connects)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def service(self) -> str:
        return f'{self.name}=127.0.0.1:{self.port}'


@contextlib.contextmanager
def servers(names: str) -> Iterator[list[ServerProcess]]:
    started = [ServerProcess(name) for name in names]
    try:
        yield started
    finally:
        for server in started:
            if server.process.poll() is None:
                server.kill()


class Load:
    """Clients that ask one request after another, each answer checked to be its own (I2), until told to stop."""

    def __init__(self, port: int | str, clients: int, pause: float = 0.002) -> None:
        self.held: list[tuple[float, float]] = []  # when answered, seconds held
        self.answered: list[tuple[float, str]] = []
        self.errors: list[str] = []
        self.reconnects = 0
        self._port, self._pause = port, pause
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        client = PostfixClient(self._port, 60)
        try:
            while not self._stop.is_set():
                client = self._ask(client)
                time.sleep(self._pause * random.random() * 2)
        except BaseException as error:
            self.errors.append(f'{type(error).__name__}: {error}')
        finally:
            client.close()

    def _ask(self, client: PostfixClient) -> PostfixClient:
        """Ask as Postfix does: a connection that is readable before the request is left for a new one."""
        client.sock.setblocking(False)
        try:
            if client.sock.recv(1) == b'':
                client.close()
                self.reconnects += 1
                client = PostfixClient(self._port, 60)
        except BlockingIOError:
            pass
        client.sock.settimeout(60)
        started = time.monotonic()
        server = client.ask_own()
        now = time.monotonic()
        self.held.append((now, now - started))
        self.answered.append((now, server))
        return client

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70 * SCALE)
            assert not thread.is_alive(), 'a client still waits'

    def longest(self, since: float = 0) -> float:
        return max((held for when, held in self.held if when >= since), default=0)

    def shares(self, since: float) -> Counter[str]:
        return Counter(server for when, server in self.answered if when >= since)


@contextlib.contextmanager
def load(port: int | str, clients: int, pause: float = 0.002) -> Iterator[Load]:
    running = Load(port, clients, pause)
    try:
        time.sleep(0.5)
        yield running
    finally:
        running.stop()
    assert running.errors == []
    assert running.answered


def test_a_killed_server_costs_no_answer_and_returns_to_its_share_without_a_burst() -> None:
    with servers('AB') as (a, b), ProxyProcess('-s', a.service, '-s', b.service) as proxy:
        with load(proxy.port, 32, 0.02) as clients:
            killed = time.monotonic()
            a.kill()
            time.sleep(1.5)
            a.start()
            proxy.logged('[A] (' + a.service[2:] + ') is up')
            back = time.monotonic()
            time.sleep(3)
        assert clients.shares(0)['default'] == 0
        # 100 ms is the promise, on a machine that is not busy with the tests themselves
        assert clients.longest(killed) < 1.0 * SCALE, clients.longest(killed)
        shares = clients.shares(back + 0.5)
        assert abs(shares['A'] - shares['B']) <= 34, shares
        early = clients.shares(back)
        assert early['A'] <= early['B'] + 34, ('a burst', early)


def test_a_stopped_server_holds_each_client_once_and_for_no_longer_than_its_timeout() -> None:
    with servers('AB') as (a, b), ProxyProcess('-s', a.service + ':::2', '-s', b.service + ':::2') as proxy:
        with load(proxy.port, 16) as clients:
            a.send(signal.SIGSTOP)
            stopped = time.monotonic()
            time.sleep(6)
            a.send(signal.SIGCONT)
            proxy.logged('[A] (' + a.service[2:] + ') is up', 40)
        assert clients.shares(0)['default'] == 0
        assert clients.longest(stopped) < 2 + 1.5 * SCALE
        held = [seconds for when, seconds in clients.held if when > stopped and seconds > 1]
        assert len(held) <= 16 + 3, f'{len(held)} requests of 16 clients were held: those in flight, and trials'


def test_a_stall_is_seen_before_the_timeout() -> None:
    with servers('AB') as (a, b):
        with ProxyProcess('-s', a.service, '-s', b.service, '--stall=0.5') as proxy, proxy.client() as first:
            while first.ask_own() != 'A':
                pass
            a.send(signal.SIGSTOP)
            held = [proxy.client() for _ in range(2)]
            for client in held:
                client.send(request(instance=new_instance()))
            time.sleep(1)
            with proxy.client() as client:
                assert [client.ask_own() for _ in range(50)] == ['B'] * 50
            proxy.logged('is stalled')
            a.send(signal.SIGCONT)
            for client in held:
                assert client.read_answer().startswith(b'action=DUNNO')
            proxy.logged('no longer stalled')
            with proxy.client() as client:
                assert {client.ask_own() for _ in range(20)} == {'A', 'B'}
            assert 'is down' not in proxy.log


def test_one_poisonous_request_gets_the_default_and_takes_no_server_down() -> None:
    def behave(peer: Peer, message: bytes) -> None:
        (hang_up if b'sender=poison' in message else echo)(peer, message)

    with stubs(behave, behave, behave) as running:
        with ProxyProcess(*[f'-s{server.service}' for server in running]) as proxy, proxy.client() as client:
            for _ in range(10):
                client.ask_own()
            instance = new_instance()
            for _ in range(5):
                assert client.ask(request(sender='poison', instance=instance)) == 'dunno'
            assert {client.ask_own() for _ in range(12)} == {'A', 'B', 'C'}
            assert 'is down' not in proxy.log
            proxy.logged('given: default, all services failed, last: dropped')


def test_i6_a_few_slow_requests_cost_no_other_its_answer() -> None:
    takes = {'warm': 0.05, 'slow': 8.0}

    def behave(peer: Peer, message: bytes) -> None:
        time.sleep(takes.get(attributes(message)['sender'], 0))
        echo(peer, message)

    def ask(proxy: ProxyProcess, sender: str) -> str:
        with proxy.client() as client:
            return client.ask(request(instance=new_instance(), sender=sender))

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::3') as proxy:
        for _ in range(4):  # it is seen to serve eight at once
            in_threads(8, lambda _: ask(proxy, 'warm'))

        def work(i: int) -> set[str]:
            if i < 3:
                return {ask(proxy, 'slow')}
            end, answers = time.monotonic() + 4, set()
            while time.monotonic() < end:
                answers.add(ask(proxy, 'quick')[:5])
                time.sleep(0.01)
            return answers

        assert in_threads(5, work) == [{'dunno'}] * 3 + [{'DUNNO'}] * 2
        assert 'is down' not in proxy.log


def test_a_message_that_no_server_answers_in_time_takes_none_down() -> None:
    def hang_for_one(peer: Peer, message: bytes) -> None:
        if b'sender=slow' in message:
            hang(peer, message)
        echo(peer, message)

    with stubs(hang_for_one, hang_for_one) as (a, b):
        with ProxyProcess('-s', a.service + ':::1.5', '-s', b.service + ':::1.5') as proxy, proxy.client() as client:
            instance = new_instance()
            for _ in range(3):  # recipients
                assert client.ask(request(instance=instance, sender='slow')) == 'dunno'
            assert client.ask_own() in ('A', 'B')
            assert 'is down' not in proxy.log


def test_a_server_that_takes_no_connection_is_down_also_for_one_message() -> None:
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(4):  # nobody accepts them, and there is room for no more
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with ProxyProcess('-s', f'A=127.0.0.1:{listener.getsockname()[1]}:::1') as proxy, proxy.client() as client:
            instance = new_instance()
            for _ in range(2):
                assert client.ask(request(instance=instance)) == 'dunno'
            proxy.logged('is down: timeout 2 times in a row')


def test_a_drain_opens_no_connection_for_each_client() -> None:
    with stubs(slow(0.02)) as (a,), ProxyProcess('-s', a.service + '::::5') as proxy:

        def ask_to_the_end(_: int) -> None:
            with proxy.client() as client, contextlib.suppress(OSError, AssertionError):
                while client.ask_own() == 'A':
                    pass

        clients = threading.Thread(target=in_threads, args=(30, ask_to_the_end))
        clients.start()
        wait_until(lambda: len(a.requests) > 300)
        before = a.accepted
        proxy.process.terminate()
        assert proxy.process.wait(20) == 0
        clients.join()
        assert a.accepted - before < 15, 'each last answer took its connection along'


def test_all_down_the_default_comes_at_once_and_is_loud_once() -> None:
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service, '-d', '451 later') as proxy:
        a.stop()
        b.stop()
        with proxy.client() as client:
            assert client.ask(request()) == '451 later'
            held = []
            for _ in range(200):
                started = time.monotonic()
                assert client.ask(request()) == '451 later'
                held.append(time.monotonic() - started)
            assert sorted(held)[100] < 0.005 * SCALE
            assert proxy.log.count('No service is up') == 1
            proxy.logged('given 200 times: no service is up', 15)
            a.start()
            proxy.logged('[A] (' + a.service[2:] + ') is trial', 10)
            assert client.ask_own() == 'A'


def test_at_its_return_a_server_gets_one_request_at_a_time_until_one_is_answered() -> None:
    most, now, lock = [0], [0], threading.Lock()
    proven = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        with lock:
            now[0] += 1
            if not proven.is_set():
                most[0] = max(most[0], now[0])
        time.sleep(0.3)
        proven.set()
        with lock:
            now[0] -= 1
        echo(peer, message)

    with stubs(behave, echo) as (a, b):
        a.stop()
        with ProxyProcess('-s', a.service, '-s', b.service) as proxy, load(proxy.port, 16):
            proxy.logged('is down: refused')
            a.start()
            proxy.logged('[A] (' + a.service[2:] + ') is up')
            assert most[0] == 1


def test_a_rolling_restart_of_all_servers_is_never_seen() -> None:
    with servers('AB') as running, ProxyProcess(*[f'-s{server.service}' for server in running]) as proxy:
        with load(proxy.port, 8, 0.01) as clients:
            for server in running * 20:
                server.kill()
                server.start()
                back = time.monotonic()  # its end may go unseen, if nobody asks it in those 50 ms
                wait_until(lambda name=server.name, since=back: clients.shares(since)[name] > 0, 30)  # type: ignore[misc]
        assert clients.shares(0)['default'] == 0


def test_a_new_proxy_takes_over_the_port_under_load() -> None:
    with servers('AB') as running:
        arguments = [f'-s{server.service}' for server in running] + ['--reuse-port']
        with contextlib.ExitStack() as after:
            old = after.enter_context(ProxyProcess(*arguments))
            with load(old.port, 16) as clients:
                for _ in range(6):
                    new = after.enter_context(ProxyProcess(*arguments, port=old.port))
                    assert old.terminate() == 0
                    time.sleep(0.3)
                    old = new
                assert clients.reconnects > 0
            assert clients.shares(0)['default'] == 0
            assert old.terminate() == 0


def test_socket_activation_and_readiness(tmp_path: Path) -> None:
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / 'notify'))
    told.settimeout(20)
    with servers('A') as (a,), socket.create_server(('127.0.0.1', 0), backlog=1024) as listener:
        port = listener.getsockname()[1]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, '-c', ACTIVATED, sys.executable, str(MODULE), '-s', a.service],
                env={**os.environ, 'LISTEN_FDS': '1', 'NOTIFY_SOCKET': str(tmp_path / 'notify')},
                pass_fds=[3], preexec_fn=lambda: os.dup2(listener.fileno(), 3),
            )  # fmt: skip

        first = start()
        assert told.recv(100) == b'READY=1'
        with load(port, 8) as clients:
            for _ in range(3):
                second = start()
                assert told.recv(100) == b'READY=1'
                first.terminate()
                assert told.recv(100) == b'STOPPING=1'
                assert first.wait(20) == 0
                first = second
        assert clients.shares(0)['default'] == 0
        first.terminate()
        assert first.wait(20) == 0


@pytest.mark.needs_root
def test_a_server_host_that_swallows_packets_costs_its_timeouts_and_no_more() -> None:
    name = f'hapolicy{os.getpid()}'
    run: Callable[[str], object] = lambda line: subprocess.run(line.split(), check=True)  # noqa: E731
    with contextlib.ExitStack() as after, PolicyServerStub(name='B') as b:
        after.callback(lambda: subprocess.run(['ip', 'netns', 'del', name], check=False))
        run(f'ip netns add {name}')
        run(f'ip link add {name[:12]}v type veth peer name e0 netns {name}')
        run(f'ip addr add 198.18.77.1/30 dev {name[:12]}v')
        run(f'ip link set {name[:12]}v up')
        run(f'ip -n {name} addr add 198.18.77.2/30 dev e0')
        run(f'ip -n {name} link set e0 up')
        run(f'ip -n {name} link set lo up')
        server = subprocess.Popen(['ip', 'netns', 'exec', name, sys.executable, '-c',
                                   SERVER.replace('127.0.0.1', '198.18.77.2'), '10031', 'A'])  # fmt: skip
        after.callback(server.wait)
        after.callback(server.kill)

        def connects() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(('198.18.77.2', 10031), 1):
                return True
            return False

        wait_until(connects)
        services = ['-s', 'A=198.18.77.2:10031:::1', '-s', b.service]
        with ProxyProcess(*services) as proxy, load(proxy.port, 8) as clients:
            assert clients.shares(0)['A'] > 0
            since = time.monotonic()
            # the neighbour is forgotten and nothing is answered: connects time out, requests in flight too
            run(f'ip -n {name} link set e0 down')
            run(f'ip neigh replace 198.18.77.2 lladdr 02:00:00:00:00:01 dev {name[:12]}v nud permanent')
            proxy.logged('[A] (198.18.77.2:10031) is down: timeout')
            time.sleep(2)
        assert clients.shares(0)['default'] == 0
        assert clients.longest(since) < 1 + 1.5 * SCALE


@pytest.mark.needs_root
def test_a_server_that_stays_down_is_probed_at_growing_distances_and_is_found_again(tmp_path: Path) -> None:
    name = f'hapolicydown{os.getpid()}'
    inside = ('ip', 'netns', 'exec', name)

    def refused() -> int:  # connections of this network namespace that failed: the proxy's alone
        table = subprocess.run([*inside, 'cat', '/proc/net/snmp'], capture_output=True, text=True, check=True).stdout
        heads, values = (line.split() for line in table.splitlines() if line.startswith('Tcp:'))
        return int(values[heads.index('AttemptFails')])

    with contextlib.ExitStack() as after:
        after.callback(lambda: subprocess.run(['ip', 'netns', 'del', name], check=False))
        subprocess.run(['ip', 'netns', 'add', name], check=True)
        subprocess.run(['ip', '-n', name, 'link', 'set', 'lo', 'up'], check=True)
        where = f'{tmp_path}/proxy'
        proxy = after.enter_context(ProxyProcess('-s', 'A=127.0.0.1:10031', f'--listen=unix:{where}', before=inside))
        with PostfixClient(where) as client:
            assert client.ask_own() == 'default'
            seen, times = refused(), [time.monotonic()]
            while len(times) < 5:  # after 1 s, 2, 4 and 8
                assert time.monotonic() - times[-1] < 20, times
                if (now := refused()) > seen:
                    assert now == seen + 1, 'one probe at a time'
                    seen = now
                    times.append(time.monotonic())
                assert client.ask_own() == 'default'
                time.sleep(0.05)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        for gap, wanted in zip(gaps, [1, 2, 4, 8], strict=True):
            assert 0.8 * wanted - 0.3 < gap < 1.2 * wanted + 0.7 * SCALE, gaps
        server = subprocess.Popen([*inside, sys.executable, '-c', SERVER, '10031', 'A'])
        after.callback(server.wait)
        after.callback(server.kill)
        proxy.logged('is trial', 25)
        with PostfixClient(where) as client:
            assert [client.ask_own() for _ in range(20)] == ['A'] * 20


def test_thousands_of_idle_clients_cost_little() -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service) as proxy:
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        before = proxy.memory
        clients = [proxy.client() for _ in range(5000)]
        for client in clients[::25]:
            assert client.ask_own() == 'A'
        each = (proxy.memory - before) / len(clients)
        print(f'{each / 1000:.1f} kB per client')
        assert each < 20000

        def work(i: int) -> set[str]:
            return {clients[i].ask_own() for _ in range(20)}

        assert in_threads(200, work) == [{'A'}] * 200
        for client in clients:
            client.close()


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
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


MTPOLICYD = """
pid_file="{directory}/pid"
log_level=0
host="127.0.0.1"
port="127.0.0.1:{port}"
min_servers=5
min_spare_servers=0
max_spare_servers=4
max_servers=5
max_requests=100000
max_keepalive=0
keepalive_timeout=60
<Port {port}>
  name="smtp"
  vhost="v"
</Port>
<VirtualHost {port}>
  name="v"
  <Plugin answer>
    module="Action"
    action="dunno"
  </Plugin>
</VirtualHost>
"""


@pytest.mark.needs_root
def test_a_prefork_server_with_fewer_children_than_clients_serves_them_all(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / 'mtpolicyd.conf'
    config.write_text(MTPOLICYD.format(directory=tmp_path, port=port))
    silent = subprocess.DEVNULL
    server = subprocess.Popen(['mtpolicyd', '-f', '-c', str(config)], stdout=silent, stderr=silent)
    try:
        wait_until(lambda: socket.socket().connect_ex(('127.0.0.1', port)) == 0, 20)
        with PolicyServerStub(name='B') as b:
            with ProxyProcess('-s', f'MT=127.0.0.1:{port}:1::2', '-s', b.service + ':20') as proxy:

                def work(_: int) -> None:
                    with proxy.client() as client:
                        for _ in range(100):
                            client.ask(request(instance=new_instance()))

                rounds = 0
                while 'seems to serve no more than' not in proxy.log and rounds < 20:
                    in_threads(20, work)
                    rounds += 1
                proxy.logged('seems to serve no more than')
                first = len(b.requests)
                assert 0 < first <= 60, f'{first} of the first {2000 * rounds} were redispatched'
                for _ in range(3):
                    in_threads(20, work)
                assert len(b.requests) == first, 'from then on all are served by it'
                assert 'is down' not in proxy.log
    finally:
        server.terminate()
        server.wait()


def test_soak() -> None:
    """Servers killed, stopped, continued and restarted at random: 0 lost, 0 swapped, nothing leaks."""
    chance = random.Random(1)
    end = time.monotonic() + SOAK_SECONDS
    with servers('ABC') as running, ProxyProcess(*[f'-s{server.service}:::3' for server in running]) as proxy:
        with proxy.client() as client:
            client.ask_own()
        before, levels = proxy.descriptors, []
        with load(proxy.port, 16, 0.01) as clients:
            while time.monotonic() < end:
                server = chance.choice(running)
                if chance.random() < 0.5:
                    server.kill()
                    time.sleep(chance.random())
                    server.start()
                else:
                    server.send(signal.SIGSTOP)
                    time.sleep(chance.random() * 4)
                    server.send(signal.SIGCONT)
                time.sleep(chance.random() * 2)
                levels.append((proxy.descriptors, proxy.memory))
        assert clients.shares(0)['default'] <= len(clients.answered) * 0.001
        assert clients.longest() < 9 + 2 * SCALE, clients.longest()
        wait_until(lambda: proxy.descriptors <= before + 3 * 20 + 3, what='descriptors as before')
        half = len(levels) // 2
        early, late = max(memory for _, memory in levels[:half]), max(memory for _, memory in levels[half:])
        assert late < early * 1.25 + 5e6, f'memory grew from {early} to {late}'


def test_a_stalled_server_gets_nothing_while_another_is_busy() -> None:
    hangs = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        if hangs.is_set():
            peer.hang()
        time.sleep(0.2)
        echo(peer, message)

    with stubs(behave, slow(0.2)) as (a, b):
        with ProxyProcess('-s', a.service + ':::60', '-s', b.service + ':::60', '--stall=2') as proxy:

            def work(_: int) -> list[str]:
                with proxy.client() as client:
                    return [client.ask_own() for _ in range(4)]

            in_threads(12, work)
            hangs.set()
            early = [proxy.client() for _ in range(6)]
            for client in early:
                client.send(request(instance=new_instance()))
            proxy.logged('is stalled')
            asked = len(a.requests)
            assert {action for actions in in_threads(40, work) for action in actions} == {'B'}
            assert len(a.requests) == asked


def test_one_that_hangs_up_on_trial_goes_down_although_old_connections_hang() -> None:
    mode = ['answers']

    def behave(peer: Peer, message: bytes) -> None:
        if mode[0] == 'answers':
            echo(peer, message)
        elif mode[0] == 'hangs':
            peer.hang()
        else:
            raise HangUp

    with stubs(behave) as (a,), ProxyProcess('-s', a.service + ':::6', '--stall=600') as proxy:

        def work(_: int) -> None:
            with proxy.client() as client:
                for _ in range(20):
                    client.ask_own()

        for _ in range(2):
            in_threads(8, work)
            time.sleep(0.2)
        mode[0] = 'hangs'
        clients, asked = [proxy.client() for _ in range(6)], len(a.requests)
        for client in clients[:2]:
            client.send(request(instance=new_instance()))
        time.sleep(4)
        for client in clients[2:]:
            client.send(request(instance=new_instance()))
        wait_until(lambda: len(a.requests) == asked + 6)
        mode[0] = 'hangs up'
        proxy.logged('is down: timeout 2 times')
        proxy.logged('is trial')
        with proxy.client() as client:
            assert client.ask_own() == 'default'
            proxy.logged('is down: dropped')


def test_a_server_stalled_by_one_slow_request_is_tried_while_the_other_is_full() -> None:
    done = threading.Event()

    def behave(peer: Peer, message: bytes) -> None:
        if b'sender=slow' in message:
            done.wait(60)
        echo(peer, message)

    with stubs(behave, slow(1)) as (a, b):
        arguments = ['-s', a.service + ':10:1:60', '-s', b.service + ':20:1:60:1', '--stall=1']
        with ProxyProcess(*arguments) as proxy, proxy.client() as client:

            def work(_: int) -> str:
                with proxy.client() as one:
                    return one.ask_own()

            in_threads(8, work)
            client.send(request(sender='slow', instance=new_instance()))
            proxy.logged('is stalled')
            asked = len(b.requests)
            assert set(in_threads(20, work)) == {'A', 'B'}
            assert len(b.requests) - asked < 10
            done.set()
            assert client.read_answer()

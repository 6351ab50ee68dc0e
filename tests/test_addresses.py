"""Addresses: host names, IPv6 and unix sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hapolicy_gevent
from tests.support import (
    SCALE,
    HangUp,
    Peer,
    PolicyServerStub,
    PostfixClient,
    ProxyProcess,
    SmtpdLoad,
    answer,
    ask_all,
    echo,
    free_port,
    hang,
    request,
    slow,
    stubs,
    wait_until,
)


def test_unix_sockets_on_both_sides(tmp_path: object) -> None:
    with PolicyServerStub(path=f'{tmp_path}/a%server') as a:
        with ProxyProcess('-s', a.service, f'--listen=unix:{tmp_path}/proxy', '--socket-mode=600') as proxy:
            with PostfixClient(f'{tmp_path}/proxy') as client:
                assert client.ask_own() == 'A'
            with proxy.client() as client:
                assert client.ask_own() == 'A'


def answer_and_hang_up(peer: Peer, message: bytes) -> None:
    """Answer each request on a connection of its own."""
    echo(peer, message)
    raise HangUp


def test_host_names_are_resolved_and_one_that_is_unknown_is_a_failure() -> None:
    with PolicyServerStub(name='A') as a:
        with ProxyProcess('-s', f'A=localhost:{a.port}:20', '-s', 'X=no.such.host.invalid:1:10') as proxy:
            with proxy.client() as client:
                assert client.ask_own() == 'A'
            proxy.logged('[X] (no.such.host.invalid:1) is down: its check: unreachable, ')


#: What a python imports first of all: lookups of names as a file says, those of names with an x at least.
NAME_SERVER = """
import _socket, time
def getaddrinfo(host, port, *args, **kwargs):
    how = open({!r}).read() if 'x' in host else '127.0.0.1'
    if how == 'fails':
        raise _socket.gaierror(-3, 'Temporary failure in name resolution')
    if how == 'hangs':
        time.sleep(600)
    delay, _, how = how.rpartition('s later: ')
    time.sleep(float(delay or 0))
    return [(_socket.AF_INET6 if ':' in address else _socket.AF_INET, _socket.SOCK_STREAM, 6, '', (address, port))
            for address in how.split()]
_socket.getaddrinfo = getaddrinfo
"""


class NameServer:
    """Tells a proxy with this environment where hosts are: addresses ('0.3s later: ' before them), 'fails', 'hangs'."""

    def __init__(self, folder: Path) -> None:
        (folder / 'sitecustomize.py').write_text(NAME_SERVER.format(str(folder / 'names')))
        self.environment = {'PYTHONPATH': str(folder)}
        self.write = (folder / 'names').write_text
        self.write('127.0.0.1')


@pytest.mark.parametrize('trouble', ['fails', 'hangs'])
def test_a_service_is_asked_where_it_was_last_while_its_name_cannot_be_looked_up(tmp_path: Path, trouble: str) -> None:
    names = NameServer(tmp_path)
    with (stubs(answer_and_hang_up) as (a,),
          ProxyProcess('-s', f'A=x:{a.port}', environment=names.environment) as proxy, proxy.client() as client):
        assert client.ask_own() == 'A'
        names.write(trouble)
        began = time.monotonic()
        assert [client.ask_own() for _ in range(10)] == ['A'] * 10
        assert time.monotonic() - began < 20 * SCALE, 'each waits a moment for the lookup, not as long as it takes'
        assert ') failed: ' not in proxy.log
        if trouble == 'fails':
            assert proxy.log.count('asking where it was last') == 1
            names.write('127.0.0.1')
            wait_until(lambda: client.ask_own() == 'A' and 'host name: found again' in proxy.log)


def test_names_that_hang_do_not_hinder_other_names(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(echo) as (a,):
        hanging = [option for number in range(20) for option in ('-s', f'X{number}=x:{a.port}:::1')]
        with ProxyProcess('-s', f'A=a:{a.port}:20', *hanging, environment=names.environment) as proxy:
            names.write('hangs')
            assert ask_all(proxy, 40, 1) == ['A'] * 40


@contextlib.contextmanager
def deaf(host: str, port: int = 0) -> Iterator[int]:
    """Listen where no connection is accepted, nor refused; yield the port."""
    with socket.socket() as listener, contextlib.ExitStack() as full:
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(3):  # what comes after them is not even refused
            sock = full.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_an_address_of_a_name_that_is_not_connected_to_is_tried_last(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(answer_and_hang_up) as (a,), deaf('127.0.0.3', a.port):
        names.write('127.0.0.3 127.0.0.1')
        with (ProxyProcess('-s', f'A=x:{a.port}:::3', environment=names.environment) as proxy,
              proxy.client() as client):  # fmt: skip
            wait_until(lambda: client.ask_own() == 'A', what='its time goes by once')
            began = time.monotonic()
            assert [client.ask_own() for _ in range(5)] == ['A'] * 5
            assert time.monotonic() - began < 5 * SCALE, 'each is asked on a connection of its own'
            assert proxy.log.count('is down') <= 1 and ') failed: ' not in proxy.log


def test_checks_that_fail_at_one_address_at_the_same_time_make_the_next_one_the_first() -> None:
    address = hapolicy_gevent.Address(socket.AF_UNSPEC, 'x', 1)
    connector, began = hapolicy_gevent.Connector(address, 1, print), time.monotonic()
    connector._known = [(socket.AF_INET, ('127.0.0.1', 1)), (socket.AF_INET, ('127.0.0.2', 1))]
    for _ in range(2):
        connector.rotate(began)
    assert connector._known[0][1][0] == '127.0.0.2'
    connector.rotate(time.monotonic())
    assert connector._known[0][1][0] == '127.0.0.1'


def test_an_address_of_a_name_that_answers_wrongly_takes_no_service_down(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(echo) as (a,), PolicyServerStub(answer(b'action=550\n\n'), 'B', a.port, host='127.0.0.3'):
        names.write('127.0.0.3 127.0.0.1')
        with ProxyProcess('-s', f'A=x:{a.port}', environment=names.environment) as proxy:
            assert set(ask_all(proxy, 10, 5)) == {'A'}
            assert 'is down' not in proxy.log


def test_a_burst_goes_to_the_first_address_of_a_name_and_not_to_a_deaf_second(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    with stubs(slow(0.02)) as (a,), deaf('127.0.0.3', a.port):
        names.write('127.0.0.1 127.0.0.3')
        with ProxyProcess('-s', f'A=x:{a.port}:::3', environment=names.environment) as proxy:
            assert set(ask_all(proxy, 16, 20)) == {'A'}
            assert ') failed: ' not in proxy.log


def test_a_name_goes_on_at_its_second_address_where_the_first_hangs_and_another_service_is_up(tmp_path: Path) -> None:
    names, well = NameServer(tmp_path), threading.Event()
    well.set()

    def hangs_later(peer: Peer, message: bytes) -> None:
        (echo if well.is_set() else hang)(peer, message)

    with stubs(slow(0.02), echo) as (a, b), PolicyServerStub(hangs_later, 'hangs', a.port, host='127.0.0.3'):
        names.write('127.0.0.3 127.0.0.1')
        services = f'-sA=x:{a.port}:::8', f'-s{b.service}:20'
        with ProxyProcess(*services, environment=names.environment) as proxy:
            assert set(ask_all(proxy, 10, 2)) == {'hangs'}
            well.clear()
            with SmtpdLoad(proxy.port, 40, 0.1, second_try=False) as load:
                wait_until(lambda: 'A' in {each.server for each in load.tries[-20:]}, 10)


def test_of_two_addresses_that_fail_the_one_that_may_be_well_decides(tmp_path: Path) -> None:
    names = NameServer(tmp_path)
    names.write('2001:db8::1 127.0.0.3 2001:db8::1')
    with (deaf('127.0.0.3') as port, ProxyProcess('-s', f'A=x:{port}', environment=names.environment) as proxy,
          proxy.client() as client):  # fmt: skip
        assert client.ask_own() == 'default'
        proxy.logged(f'[A] (x:{port}) is down: its check: timeout, no connection in time')
        assert 'unreachable' not in proxy.log


@pytest.mark.parametrize('delay', ['', '0.01s later: ', '0.3s later: '])
def test_a_name_that_moves_under_load_costs_no_request(tmp_path: Path, delay: str) -> None:
    names, port = NameServer(tmp_path), free_port()
    names.write(delay + '127.0.0.2')
    with PolicyServerStub(name='OLD', port=port, host='127.0.0.2') as old, PolicyServerStub(name='NEW', port=port):
        with ProxyProcess('-s', f'A=x:{port}', environment=names.environment) as proxy:
            with SmtpdLoad(proxy.port, 8, 0.02, second_try=False) as load:
                time.sleep(1)
                names.write(delay + '127.0.0.1')
                time.sleep(0.5)
                old.stop()
                time.sleep(1.5)
            assert load.servers().keys() == {'OLD', 'NEW'}
            assert 'is down' not in proxy.log


def test_a_unix_server_with_a_full_backlog_costs_no_processor(tmp_path: object) -> None:
    path = f'{tmp_path}/full'
    full = socket.socket(socket.AF_UNIX)
    full.bind(path)
    full.listen(0)
    fillers = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for filler in fillers:
        filler.setblocking(False)
        try:
            filler.connect(path)
        except BlockingIOError:
            pass
    with stubs(echo) as (a,), ProxyProcess('-s', f'F=unix:{path}:1::1', '-s', a.service) as proxy:
        cpu = proxy.cpu
        with proxy.client() as client:
            assert client.ask_own() == 'A'
        assert proxy.cpu - cpu < 0.5
    full.close()


@pytest.mark.skipif(not os.path.exists('/proc/net/if_inet6'), reason='no IPv6 here')
def test_ipv6_on_both_sides() -> None:
    where = free_port(socket.AF_INET6)
    with PolicyServerStub(host='::1') as a, ProxyProcess('-s', a.service, f'--listen=[::1]:{where}') as proxy:
        with socket.create_connection(('::1', where), timeout=60 * SCALE) as sock:
            sock.sendall(request(instance='six'))
            assert sock.recv(100) == b'action=DUNNO six A\n\n'
        with proxy.client() as client:
            assert client.ask_own() == 'A'


def test_a_unix_client_that_has_a_path_of_its_own_is_served_and_refused(tmp_path: Path) -> None:
    with stubs(echo) as (a,), ProxyProcess('-s', a.service, f'--listen=unix:{tmp_path}/s') as proxy:
        for name in ('a', 'bound'):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(f'{tmp_path}/{name}')
                sock.connect(f'{tmp_path}/s')
                sock.sendall(b'request=x\n')
        proxy.logged('Client connection closed: left in mid-request, 10 bytes')

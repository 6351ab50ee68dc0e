"""Sticky services: each try of a mail meets the same service, at every proxy."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import traffic
from hapolicy_gevent import (
    DOWN,
    MAX_VALUES,
    STALLED_PATIENCE,
    STICKY_PATIENCE,
    Connection,
    Service,
    Sticky,
    UsageError,
    network,
    parse_sticky,
)
from tests.postfix import PYTHON
from tests.servers import checked
from tests.support import (
    MODULE,
    ROOT,
    SCALE,
    PostfixClient,
    ProxyProcess,
    echo,
    in_threads,
    new_instance,
    processes,
    request,
    slow,
    stubs,
    wait_until,
)
from tests.test_balancing import balancing, choose, service

TRIPLET = 'client_address/24/64,sender,recipient'
STICKY = f'--sticky={TRIPLET}'


def key(attributes: str = TRIPLET, **values: object) -> bytes:
    return parse_sticky(attributes, '--sticky').key(request(**values))


class Ordered:
    """A pool, as far as the order of services knows it."""

    def __init__(self, service: Service) -> None:
        self.service = service


def order_of(key: bytes, services: Iterable[Service]) -> list[str]:
    """Return the names of services in the order of a key."""
    pools: Any = [Ordered(service) for service in services]
    return [pool.service.name for pool in Sticky.order(key, pools)]


def order(key: bytes, weights: dict[str, int]) -> list[str]:
    return order_of(key, [service(name, weight=weight) for name, weight in weights.items()])


# -- the option


@pytest.mark.parametrize(
    'text',
    [TRIPLET, 'sender', 'sasl_username', 'recipient,sender', 'client_address', 'client_address/1/1',
     'client_address/32/128', 'server_address/24/64', 'instance', 'policy_context', 'tls_sni'],
)  # fmt: skip
def test_attributes_of_postfix_are_taken(text: str) -> None:
    assert parse_sticky(text, '--sticky').key(request(**{text.split(',')[0].split('/')[0]: '192.0.2.9'}))


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('', "'' is no attribute"),
        ('sender,', "'' is no attribute"),
        ('from', "'from' is no attribute"),
        ('Sender', "'Sender' is no attribute"),
        ('sender recipient', "'sender recipient' is no attribute"),
        ('sender,client', "'client' is no attribute"),
        ('sender/24/64', "'sender/24/64' is no attribute, nor an address with two prefix lengths, IPv4 and IPv6"),
        ('client_name/24/64', "'client_name/24/64' is no attribute, nor an address with two prefix lengths"),
        ('client_address/24', "'client_address/24' is no attribute, nor an address with two prefix lengths"),
        ('client_address/', "'client_address/' is no attribute, nor an address with two prefix lengths"),
        ('client_address/24/64/', "'client_address/24/64/' is no attribute, nor an address with two prefix lengths"),
        ('client_address/33/64', "IPv4 prefix length '33' is not a whole number from 1 to 32"),
        ('client_address/0/64', "IPv4 prefix length '0'"),
        ('client_address/24/129', "IPv6 prefix length '129' is not a whole number from 1 to 128"),
        ('client_address/24/x', "IPv6 prefix length 'x'"),
        ('client_address//64', "IPv4 prefix length ''"),
    ],
)
def test_what_is_no_attribute_is_refused_with_its_value_and_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sticky(text, '--sticky')
    assert why in str(caught.value), caught.value
    assert f"--sticky '{text}'" in str(caught.value) and 'client_address/24/64,sender,recipient' in str(caught.value)


# -- the key


def test_tries_of_a_mail_have_one_key_and_other_mail_has_another() -> None:
    first = key(instance='1.2.3.0', queue_id='', size=100, client_name='a.example.net', client_port=4711)
    assert first == key(instance='9.9.9.0', queue_id='4F2', size=2000, client_name='b.example.net', client_port=9)
    for other in ({'client_address': '192.0.3.7'}, {'sender': 'eve@example.net'}, {'recipient': 'bob@example.com'}):
        assert key(**other) != first


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('192.0.2.7', '192.0.2.250'),
        ('2001:db8:1:2::1', '2001:DB8:1:2:ffff::9'),
        ('unknown', 'unknown'),
    ],
)
def test_addresses_of_a_network_are_one(one: str, other: str) -> None:
    assert key(client_address=one) == key(client_address=other)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('192.0.2.7', '192.0.3.7'),
        ('2001:db8:1:2::1', '2001:db8:1:3::1'),
        ('unknown', '192.0.2.7'),
        ('1.2.3', '1.2.4'),
    ],
)
def test_addresses_of_other_networks_are_others(one: str, other: str) -> None:
    assert key(client_address=one) != key(client_address=other)


@pytest.mark.parametrize(('ipv4', 'ipv6'), [(32, 128), (31, 127), (25, 65), (8, 16), (1, 1)])
def test_any_prefix_length_says_how_many_bits_count(ipv4: int, ipv6: int) -> None:
    for bits, length, start in ((32, ipv4, '192.0.2.%d'), (128, ipv6, '2001:db8::%x')):
        networks = {network(ipv4, ipv6, (start % number).encode()) for number in range(256)}
        assert len(networks) == max(1, 256 >> (bits - length))


def test_without_prefix_lengths_an_address_counts_whole() -> None:
    assert key('client_address', client_address='192.0.2.7') != key('client_address', client_address='192.0.2.8')


#: What postgrey takes for one sender (its do_sender_substitutions), and case in any address.
ONE_SENDER = [
    ('alice@example.net', 'Alice@EXAMPLE.net'),
    ('alice@example.net', 'alice+lists@example.net'),
    ('alice+a@example.net', 'alice+b+c@example.net'),
    ('list-bounce-1234-bob=example.org@example.net', 'list-bounce-98-bob=example.org@example.net'),
    ('prvs=0123456789=alice@example.net', 'alice@example.net'),
    ('prvs=4711abcdef=alice@example.net', 'prvs=9912fedcba=alice@example.net'),
]


@pytest.mark.parametrize(('one', 'other'), ONE_SENDER)
def test_senders_that_postgrey_takes_for_one_are_one(one: str, other: str) -> None:
    assert key(sender=one) == key(sender=other)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('alice1@example.net', 'alice2@example.net'),
        ('c1001@example.net', 'c1002@example.net'),
        ('alice@1.example.net', 'alice@2.example.net'),
        ('alice@example.net', 'alice@example.com'),
        ('', 'alice@example.net'),
    ],
)
def test_other_senders_are_others(one: str, other: str) -> None:
    assert key(sender=one) != key(sender=other)


def test_recipients_differ_by_their_extension_and_not_by_case() -> None:
    assert key(recipient='bob+a@example.org') != key(recipient='bob+b@example.org')
    assert key(recipient='Bob@Example.Org') == key(recipient='bob@example.org')


def test_a_bounce_is_sticky_by_its_other_attributes() -> None:
    assert key(sender='') and key(sender='', recipient='eve@example.org') != key(sender='')


def test_a_request_without_any_of_the_attributes_has_no_key() -> None:
    assert key('sasl_username') == b''
    assert key('sender,recipient', sender='', recipient='') == b''
    sticky = parse_sticky('sender,recipient', '--sticky')
    assert sticky.key(b'request=smtpd_access_policy\n\n') == b''
    assert sticky.key(request(sender='', recipient='').replace(b'\n', b'\r\n')) == b''


def test_line_ends_make_no_difference() -> None:
    sticky = parse_sticky(TRIPLET, '--sticky')
    assert sticky.key(request()) == sticky.key(request().replace(b'\n', b'\r\n'))


def test_i7_values_of_any_length_are_compared_and_not_kept() -> None:
    sticky, long = parse_sticky('sender,client_address/24/64', '--sticky'), 'y' * 5000
    tracemalloc.start()
    try:
        for number in range(2 * MAX_VALUES):
            assert sticky.key(request(sender=f'{long}{number}', client_address=f'{long}{number}'))
        assert tracemalloc.get_traced_memory()[0] < 1.5e7, 'bytes'
    finally:
        tracemalloc.stop()


# -- the order

NAMES = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Z')), min_size=1, max_size=20)
SERVICES = st.dictionaries(NAMES, st.integers(1, 256), min_size=2, max_size=8)


@given(st.binary(min_size=1), SERVICES, st.randoms())
def test_the_order_depends_on_the_key_the_names_and_the_weights_alone(
    key: bytes, weights: dict[str, int], shuffled: random.Random
) -> None:
    names = sorted(order(key, weights))
    assert names == sorted(weights)
    shuffled.shuffle(names)
    services = [service(name, prio=7, weight=weights[name], maximum=3) for name in names]
    for number, each in enumerate(services):
        each.address = each.address._replace(host=f'10.0.0.{number}')
        each.queries, each.timeout = number, 1.0 + number
    assert order_of(key, services) == order(key, weights)


@given(st.binary(min_size=1), SERVICES, st.data())
def test_a_service_that_is_taken_away_moves_no_key_between_others(
    key: bytes, weights: dict[str, int], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(weights)))
    left = {name: weight for name, weight in weights.items() if name != gone}
    assert order(key, left) == [name for name in order(key, weights) if name != gone]


@given(st.binary(min_size=1), SERVICES, st.data())
def test_more_weight_takes_keys_and_moves_none_between_others(
    key: bytes, weights: dict[str, int], data: st.DataObject
) -> None:
    heavier = data.draw(st.sampled_from(sorted(weights)))
    before, after = order(key, weights), order(key, {**weights, heavier: 2 * weights[heavier]})
    assert after.index(heavier) <= before.index(heavier)
    assert [name for name in after if name != heavier] == [name for name in before if name != heavier]


#: What all versions have in common: two versions serve one site while it is upgraded.
FIXED = {
    b'c00002 alice@example.netbob@example.org': 'GREY3 GREY1 GREY2',
    b'c00002 alice@example.netcarol@example.org': 'GREY1 GREY3 GREY2',
    b'c00002 bob@example.org': 'GREY1 GREY3 GREY2',
    b'20010db800000000 alice@example.netbob@example.org': 'GREY1 GREY3 GREY2',
    b'unknown\xc3\xa9@example.netbob@example.org': 'GREY2 GREY3 GREY1',
}
WEIGHTS = {'GREY1': 1, 'GREY2': 1, 'GREY3': 2}
MANY = 2237507904


def firsts() -> int:
    """Return a number that says which service is the first for each of many keys."""
    return zlib.crc32(' '.join(order(b'%d@example.net' % i, WEIGHTS)[0] for i in range(3000)).encode())


def test_the_keys_of_requests_are_these() -> None:
    assert key() == b'c00002 alice@example.netbob@example.org'
    assert key(sender='Bounce-12-Bob@Lists.example.net', client_address='2001:db8::7') == (
        b'20010db800000000 bounce--bob@lists.example.netbob@example.org')  # fmt: skip


@pytest.mark.parametrize('key', FIXED)
def test_the_order_of_a_key_is_this(key: bytes) -> None:
    assert ' '.join(order(key, WEIGHTS)) == FIXED[key]


def test_the_services_of_many_keys_are_these() -> None:
    assert firsts() == MANY


@pytest.mark.skipif(not Path('/usr/lib/python3/dist-packages/gevent').exists(), reason='python3-gevent is missing')
@pytest.mark.parametrize('seed', ['0', '4711'])
def test_another_python_with_another_seed_of_hashes_comes_to_the_same(seed: str) -> None:
    code = f"""if True:
        import sys, zlib
        import hapolicy_gevent as module
        class Ordered: pass
        def pool(name, weight):
            made = Ordered()
            made.service = module.Service(name, module.Address(0, 'h', 1), 10, weight)
            return made
        pools = [pool(*each) for each in {WEIGHTS}.items()]
        names = [module.Sticky.order(b'%d@example.net' % i, pools)[0].service.name for i in range(3000)]
        print(zlib.crc32(' '.join(names).encode()))
    """
    done = subprocess.run([PYTHON, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': seed},
                          capture_output=True, text=True, timeout=60 * SCALE)  # fmt: skip
    assert done.stdout.strip() == str(MANY), done


# -- shares

WEIGHT_SETS = ({'GREY1': 1, 'GREY2': 1}, {'A': 3, 'B': 2, 'C': 1}, {'mx1': 1, 'mx2': 2, 'mx3': 3, 'mx4': 4})


def worst(mails: Iterable[traffic.Mail], weights: dict[str, int]) -> float:
    """Return by how large a part of what it should be the share of a service is off, at worst."""
    sticky = parse_sticky(TRIPLET, '--sticky')
    head, tail = request(client_address='', sender='', recipient='').split(b'client_address=\n')
    pools: Any = [Ordered(service(name, weight=weight)) for name, weight in weights.items()]
    counted: Counter[str] = Counter()
    for mail in mails:
        lines = f'client_address={mail.client_address}\nsender={mail.sender}\nrecipient={mail.recipient}\n'
        counted[Sticky.order(sticky.key(head + lines.encode() + tail), pools)[0].service.name] += 1
    parts = {name: counted.total() * weight / sum(weights.values()) for name, weight in weights.items()}
    return max(abs(counted[name] / part - 1) for name, part in parts.items())


@pytest.mark.slow
@pytest.mark.parametrize('weights', WEIGHT_SETS, ids=str)
def test_different_mails_are_shared_by_weight(weights: dict[str, int]) -> None:
    assert worst(traffic.different(100_000), weights) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('weights', WEIGHT_SETS, ids=str)
def test_mail_of_which_few_senders_send_most_is_shared_nearly_by_weight(weights: dict[str, int]) -> None:
    assert worst(traffic.few_senders(100_000), weights) < 0.1


# -- the balancer


class Mails:
    """A balancer of services A, B and C, and a mail whose order that is."""

    def __init__(self, prios: Sequence[int] = (10, 10, 10)) -> None:
        self.balancer, pools = balancing(*[service(name, prio) for name, prio in zip('ABC', prios, strict=True)])
        self.pools = dict(zip('ABC', pools, strict=True))
        weights = dict.fromkeys('ABC', 1)
        self.key = next(key for key in map(b'%d'.__mod__, range(100)) if order(key, weights) == list(weights))

    def chosen(self, now: float = 0, *tried: str) -> str:
        pool = self.balancer.choose(b'', [self.pools[name] for name in tried], now, self.key)
        return pool.service.name if pool is not None else ''

    def waits_for(self, first: str, waited: float, now: float = 0, *tried: str) -> str:
        pools = [self.pools[name] for name in tried]
        candidates = self.balancer.candidates(self.pools.get(first), pools, waited, now, self.key)
        return ''.join(pool.service.name for pool in candidates)

    def take_all(self, name: str) -> None:
        """Have it use all the connections that it may have."""
        pool = self.pools[name]
        pool.busy, pool.idle = dict.fromkeys(pool.idle), []
        pool.places = pool.service.max = len(pool.busy)


def test_each_try_of_a_mail_meets_the_first_service_of_its_order() -> None:
    mails = Mails()
    assert {mails.chosen() for _ in range(10)} == {'A'}
    assert [mails.chosen(0, *tried) for tried in ('A', 'AB', 'ABC')] == ['B', 'C', '']


def test_a_service_that_is_down_loses_its_mail_to_the_next_and_has_it_again() -> None:
    mails = Mails()
    mails.pools['A'].service.turn(DOWN, 'refused', 0)
    assert mails.chosen() == 'B'
    mails.pools['B'].service.turn(DOWN, 'refused', 0)
    assert mails.chosen() == 'C'
    mails.pools['A'].service.check_passed(1)
    mails.pools['A'].idle = [Connection(mails.pools['A'], 0)]
    assert mails.chosen() == 'A'


def test_a_service_that_is_full_loses_its_mail_to_the_next() -> None:
    mails = Mails()
    mails.take_all('A')
    assert mails.chosen() == 'B'
    mails.pools['A'].idle.append(mails.pools['A'].busy.popitem()[0])
    assert mails.chosen() == 'A'


def test_a_service_that_has_stalled_loses_its_mail_to_the_next() -> None:
    mails = Mails()
    pool = mails.pools['A']
    pool.busy[pool.idle.pop()] = None
    assert (mails.chosen(4.9), mails.chosen(5.1)) == ('A', 'B')
    pool.service.answered(b'DUNNO', 0, True, 6)
    assert mails.chosen(7) == 'A'


def test_each_prio_has_an_order_of_its_own() -> None:
    mails = Mails((20, 10, 20))
    assert [mails.chosen(0, *tried) for tried in ('', 'B', 'BA')] == ['B', 'A', 'C']
    mails.take_all('B')
    assert mails.chosen() == 'B', 'the next prio is for requests that have waited'
    assert mails.waits_for('B', STICKY_PATIENCE) == 'BAC'


def test_a_mail_without_a_key_is_balanced_and_its_message_stays_with_its_service() -> None:
    mails = Mails()
    assert [choose(mails.balancer, b'%d' % (i // 4)) for i in range(12)] == ['A'] * 4 + ['B'] * 4 + ['C'] * 4


# -- a mail that waits


def test_a_mail_waits_for_its_service_to_grow_although_another_is_idle() -> None:
    mails = Mails()
    pool = mails.pools['A']
    pool.idle = []
    check = Connection(pool, 0)
    pool.checker.running = {check: None}
    assert mails.chosen(0.9 * STICKY_PATIENCE) == 'A', 'its connection has nearly passed its check'
    assert mails.waits_for('A', 0.9 * STICKY_PATIENCE) == 'A'
    assert mails.waits_for('A', STICKY_PATIENCE) == 'ABC', 'then what comes free at any, its own first'
    assert mails.chosen(1.1 * STICKY_PATIENCE) == 'B', 'the check may have met a server that hangs'


def test_a_mail_whose_services_are_all_full_waits_for_its_own_first() -> None:
    mails = Mails()
    for name in 'ABC':
        mails.take_all(name)
    assert mails.chosen() == 'A'
    assert mails.waits_for('A', 0) == mails.waits_for('A', 0.9 * STICKY_PATIENCE) == 'A'
    assert mails.waits_for('A', STICKY_PATIENCE) == 'ABC'


def test_a_mail_whose_service_goes_down_while_it_waits_goes_to_the_next_of_its_order() -> None:
    mails = Mails()
    for name in 'ABC':
        mails.take_all(name)
    mails.pools['A'].service.turn(DOWN, 'refused', 0)
    assert mails.waits_for('A', 0.1) == 'B'
    assert mails.waits_for('A', STICKY_PATIENCE) == 'BC'


def test_a_mail_that_failed_at_its_service_waits_for_the_next_of_its_order() -> None:
    mails = Mails()
    for name in 'ABC':
        mails.take_all(name)
    assert (mails.chosen(0, 'A'), mails.waits_for('', 0.1, 0, 'A')) == ('B', 'B')
    assert mails.waits_for('B', STALLED_PATIENCE, 0, 'A') == 'BC'


# -- the program


def who(client: PostfixClient, mail: int, **values: object) -> str:
    """Return who answers the try of a mail."""
    values = {'client_address': f'192.0.2.{mail % 250}', 'sender': 'alice@example.net', **values}
    instance = new_instance()
    answer = client.ask(request(instance=instance, recipient=f'{traffic.name(mail)}@example.org', **values))
    assert answer.startswith(f'DUNNO {instance} '), answer
    return answer.split()[2]


def placed(proxy: ProxyProcess, mails: Iterable[int] = range(60)) -> dict[int, str]:
    """Return who answers each mail."""
    with proxy.client() as client:
        return {mail: who(client, mail) for mail in mails}


@pytest.mark.slow
def test_proxies_send_the_same_mail_to_the_same_service_and_only_that_of_a_dead_one_to_others() -> None:
    with stubs(echo, echo, echo) as (a, b, c), contextlib.ExitStack() as stack:
        one = stack.enter_context(ProxyProcess('-s', a.service, '-s', b.service, '-s', c.service, STICKY))
        by_name = b.service.replace('127.0.0.1', 'localhost')
        two = stack.enter_context(ProxyProcess('-s', c.service, '-s', by_name, '-s', a.service, STICKY))
        before = placed(one)
        assert min(Counter(before.values())[name] for name in 'ABC') > 5
        assert placed(two) == before
        a.stop()
        without = placed(one)
        assert placed(two) == without
        assert {mail for mail in before if before[mail] != without[mail]} == {
            mail for mail in before if before[mail] == 'A'}  # fmt: skip
        assert {without[mail] for mail in before if before[mail] == 'A'} == {'B', 'C'}
        a.start()
        for proxy in (one, two):
            proxy.logged(f'[A] ({a.service[2:]}) is up: its check passed')
            assert placed(proxy) == before


@pytest.mark.parametrize(('attributes', 'services'), [(TRIPLET, 2), ('client_address/24/64,sender', 1)])
def test_recipients_of_one_message_stay_together_if_they_do_not_count(attributes: str, services: int) -> None:
    message = {'sender': 'alice@example.net', 'instance': new_instance()}
    with stubs(echo, echo) as (a, b):
        proxy = ProxyProcess('-s', a.service, '-s', b.service, f'--sticky={attributes}')
        with proxy, proxy.client() as client:
            answers = [client.ask(request(recipient=f'{traffic.name(i)}@example.org', **message)) for i in range(40)]
    assert len(set(answers)) == services


@pytest.mark.slow
def test_a_message_that_goes_to_another_service_leaves_its_connection_to_others() -> None:
    """Each holds the connection that answered it last, and not one at each service."""
    with stubs(echo, echo) as (a, b), ProxyProcess('-s', a.service, '-s', b.service, STICKY) as proxy:
        most = 0

        def ask(client: int) -> None:
            nonlocal most
            numbers = itertools.count(1000 * client)
            with proxy.client() as connection:
                for _ in range(40):
                    message = new_instance()
                    for mail in itertools.islice(numbers, 4):
                        connection.ask(request(instance=message, recipient=f'{traffic.name(mail)}@example.org'))
                    most = max(most, a.open + b.open)
                    time.sleep(0.02)

        in_threads(8, ask)
    assert most < 38, 'about 22, and 45 if each held one at each service'


@pytest.mark.slow
def test_mail_at_a_cold_start_meets_its_service_however_long_a_check_takes() -> None:
    """And at each growth of a pool: a request that waits is not for who comes free first."""
    with stubs(checked(slow(0.2), slow(0.5)), echo) as (a, b):
        arguments = ('-s', a.service, '-s', b.service, STICKY)
        with ProxyProcess(*arguments) as proxy:
            expected = placed(proxy)

        def ask(mail: int) -> str:
            with proxy.client() as client:
                return who(client, mail)

        with ProxyProcess(*arguments) as proxy:
            assert dict(enumerate(in_threads(len(expected), ask))) == expected
    assert set(expected.values()) == {'A', 'B'}


@pytest.mark.slow
def test_a_service_that_hangs_holds_its_mail_for_a_second_and_no_other() -> None:
    with processes('AB') as (a, b), ProxyProcess('-s', f'{a.service}:::3', '-s', b.service, STICKY) as proxy:
        before = placed(proxy)
        a.hang()
        began = time.monotonic()
        assert {placed(proxy, [mail])[mail] for mail in before if before[mail] == 'B'} == {'B'}
        assert time.monotonic() - began < 3 * SCALE
        assert set(in_threads(len(before), lambda mail: placed(proxy, [mail])[mail])) == {'B'}
        a.wake()
        wait_until(lambda: placed(proxy) == before, what='A has its mail again')


def test_each_process_under_spawn_comes_to_the_same_choice() -> None:
    with stubs(echo, echo) as (a, b):
        arguments = ('-s', a.service, '-s', b.service, STICKY)
        with ProxyProcess(*arguments) as proxy:
            expected = placed(proxy, range(20))
        for mail in (0, 7, 13):
            sent = request(client_address=f'192.0.2.{mail}', recipient=f'{traffic.name(mail)}@example.org')
            command = [sys.executable, str(MODULE), *arguments]
            done = subprocess.run(command, input=sent, capture_output=True, timeout=60 * SCALE)
            assert done.stdout.split()[-1].decode() == expected[mail]

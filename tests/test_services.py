"""The service grammar: what is taken, and what is refused in one line."""

from __future__ import annotations

import pytest

from hapolicy_gevent import UsageError, parse_action, parse_listen, parse_service


@pytest.mark.parametrize(
    ('text', 'where', 'prio', 'weight', 'timeout', 'maximum'),
    [
        ('GREY1=10.0.0.1:10031', '10.0.0.1:10031', 10, 1, 30, 100),
        ('GREY1=10.0.0.1:10031:', '10.0.0.1:10031', 10, 1, 30, 100),
        ('GREY1=10.0.0.1:10031:5', '10.0.0.1:10031', 5, 1, 30, 100),
        ('GREY1=10.0.0.1:10031:100:2:5', '10.0.0.1:10031', 100, 2, 5, 100),
        ('GREY1=10.0.0.1:10031::3::7', '10.0.0.1:10031', 10, 3, 30, 7),
        ('GREY1=10.0.0.1:10031:1:1:0.25:7:', '10.0.0.1:10031', 1, 1, 0.25, 7),
        ('a b=[::1]:10031:20', '[::1]:10031', 20, 1, 30, 100),
        ('a=[fe80::1%lo]:25', '[fe80::1%lo]:25', 10, 1, 30, 100),
        ('a=policy-1.example.org:10031', 'policy-1.example.org:10031', 10, 1, 30, 100),
        ('a=localhost:10031', 'localhost:10031', 10, 1, 30, 100),
        ('a=unix:/run/p.sock', 'unix:/run/p.sock', 10, 1, 30, 100),
        ('a=unix:/run/p.sock:5:2:1:3', 'unix:/run/p.sock', 5, 2, 1, 3),
        ('a=unix:/run/[p]q:5', 'unix:/run/[p]q', 5, 1, 30, 100),
    ],
)
def test_a_service_is_read(text: str, where: str, prio: int, weight: int, timeout: float, maximum: int) -> None:
    service = parse_service(text)
    assert (str(service.address), service.prio, service.weight) == (where, prio, weight)
    assert (service.timeout, service.max) == (timeout, maximum)


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('', '<name>='),
        ('GREY1', '<name>='),
        ('=10.0.0.1:1', '<name>='),
        ('a\nb=10.0.0.1:1', '<name>='),
        ('a=', 'or name>:<port>'),
        ('a=10.0.0.1', 'or name>:<port>'),
        ('a=::1:10031', "address ''"),
        ('a=[::1]', 'or name>:<port>'),
        ('a=[10.0.0.1]:5', "address '[10.0.0.1]'"),
        ('a=[::g]:5', "address '[::g]'"),
        ('a=300.1.1.1:5', "address '300.1.1.1'"),
        ('a=10.0.1:5', "address '10.0.1'"),
        ('a=-x:5', "address '-x'"),
        ('a=a b:5', "address 'a b'"),
        ('a=h:', "port ''"),
        ('a=h:0', "port '0'"),
        ('a=h:65536', "port '65536'"),
        ('a=h:smtp', "port 'smtp'"),
        ('a=h:+25', "port '+25'"),
        ('a=h:\u0662\u0665', 'port'),
        ('a=h:1:0', "prio '0'"),
        ('a=h:1:-1', "prio '-1'"),
        ('a=h:1:1.5', "prio '1.5'"),
        ('a=h:1:1:0', "weight '0'"),
        ('a=h:1:1:x', "weight 'x'"),
        ('a=h:1:1:1:0', "timeout '0'"),
        ('a=h:1:1:1:inf', "timeout 'inf'"),
        ('a=h:1:1:1:1e3', "timeout '1e3'"),
        ('a=h:1:1:1:-3', "timeout '-3'"),
        ('a=h:1:1:1:.', "timeout '.'"),
        ('a=h:1:1:1:1.2.3', "timeout '1.2.3'"),
        ('a=h:1:1:1:\u0663', 'timeout'),
        ('a=h:' + 5000 * '9', 'is not a whole number from 1 to 65535'),
        ('a=h:1:1:1:1:0', "max '0'"),
        ('a=h:1:1:1:1:1:1', 'one field too many'),
        ('a=unix:p.sock', 'absolute path'),
        ('a=unix:/' + 'x' * 200, 'absolute path'),
        ('a=unix:', 'absolute path'),
    ],
)
def test_an_invalid_service_is_refused_with_its_value_and_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_service(text)
    assert why in str(caught.value)
    assert text in str(caught.value) and 'allowed is' in str(caught.value)


OPTIONS = pytest.mark.parametrize('option', ['--default', '--failed'])


@OPTIONS
@pytest.mark.parametrize('text', ['dunno', 'DUNNO', '451 4.3.5 later', 'REJECT caf\u00e9', ' 450 x '])
def test_an_action_of_an_option_is_taken(text: str, option: str) -> None:
    assert parse_action(text, option) == text.strip().encode()


@OPTIONS
@pytest.mark.parametrize(
    'text',
    ['', '  ', 'action=x', 'Action=x', '550', ' 250 ', 'DUNNO\nX', 'DUNNO\r', 'a\0b', 'a b\x07', '\x1b', '\udcff'],
)
def test_an_action_of_an_option_that_postfix_would_misread_is_refused(text: str, option: str) -> None:
    with pytest.raises(UsageError, match=f'(?s)^{option} .*allowed is one line'):
        parse_action(text, option)


@pytest.mark.parametrize('text', ['127.0.0.1:10060', '[::1]:10060', '0.0.0.0:1', 'unix:/run/h.sock'])
def test_a_listen_address_is_taken(text: str) -> None:
    assert str(parse_listen(text, '--listen')) == text


@pytest.mark.parametrize('text', ['', '10060', 'localhost:1', '127.0.0.1', '127.0.0.1:0', '1.2.3.4:5:6', '1.2.3.4:5:',
                                  'unix:h', 'unix:/h:', '[::1]:5:6'])  # fmt: skip
def test_an_invalid_listen_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r'--listen.*allowed is'):
        parse_listen(text, '--listen')

"""The protocol as pure code: the same bytes give the same events, however they arrive."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hapolicy_gevent import (
    MAX_MESSAGE,
    ClientFault,
    InvalidAnswer,
    attribute,
    clean_action,
    first_request,
    parse_answer,
)

WIRE = Path(__file__).parent / 'wire'


def fixtures(kind: str) -> list[Any]:
    return [
        pytest.param(path.with_suffix('.txt').read_bytes(), json.loads(path.read_text()), id=path.stem)
        for path in sorted((WIRE / kind).glob('*.json'))
    ]


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def by_line(data: bytes) -> Iterator[bytes]:
    yield from data.splitlines(keepends=True)


def by_byte(data: bytes) -> Iterator[bytes]:
    # the long ones by byte at their ends, where it matters: a quadratic test proves nothing more
    middle = len(data) - 400 if len(data) > 2000 else 200
    yield from (data[i : i + 1] for i in range(min(200, len(data))))
    yield data[200:middle]
    yield from (data[i : i + 1] for i in range(max(200, middle), len(data)))


def at_random(data: bytes) -> Iterator[bytes]:
    chance = random.Random(data)
    while data:
        size = chance.randint(1, 1 + len(data) // 3)
        yield data[:size]
        data = data[size:]


WAYS = [whole, by_line, by_byte, at_random]


def feed(pieces: Iterator[bytes]) -> tuple[list[bytes], int, str]:
    """Return the requests in these pieces, the bytes left over, and the error that ended it."""
    rest, requests = b'', []
    for piece in pieces:
        rest += piece
        try:
            request, rest = first_request(rest)
            while request:
                requests.append(request)
                request, rest = first_request(rest)
        except ClientFault:
            return requests, 0, 'ClientFault'
        assert len(rest) <= MAX_MESSAGE
    return requests, len(rest), ''


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(('data', 'expected'), fixtures('requests'))
def test_requests_are_cut_the_same_whatever_way_they_come(data: bytes, expected: dict[str, Any], way: Any) -> None:
    requests, left, error = feed(way(data))
    assert [len(request) for request in requests] == expected['lengths']
    at = 0
    for request, empty_lines in zip(requests, expected.get('skipped', [0] * len(requests)), strict=True):
        at += empty_lines
        assert data[at : at + len(request)] == request
        at += len(request)
    assert error == expected.get('error', '')
    assert error or left == expected.get('left', 0)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(('data', 'expected'), fixtures('answers'))
def test_answers_are_read_the_same_whatever_way_they_come(data: bytes, expected: dict[str, Any], way: Any) -> None:
    had, found = b'', None
    for piece in way(data):
        had += piece
        try:
            found = parse_answer(had)
        except InvalidAnswer as error:
            assert expected.get('error', 'valid') in str(error)
            return
        if found is not None:
            break  # what comes later is the pool's to find
    if 'closed' in expected:
        assert found is None
        assert parse_answer(data, closed=True) == (expected['closed'] and (expected['closed'].encode(), False))
    else:
        assert found is not None
        action, surplus = found
        assert action.decode() == expected['action']
        assert surplus == (len(had) > expected.get('surplus_from', len(data)))


PIECES = [b'\n', b'\r', b'\r\n', b'=', b'a=b\n', b'action', b'action=', b'550', b' ', b'\n\n', b'\xff']
wire_bytes = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=30).map(b''.join),
)


@given(wire_bytes, st.lists(st.integers(0, 200), max_size=8))
@example(b'a=b\n\r\n\n', [6])  # an empty line of each kind that share a line feed
def test_any_split_gives_the_same_requests(data: bytes, cuts: list[int]) -> None:
    ends = sorted(cuts)
    pieces = [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]
    assert feed(iter(pieces)) == feed(iter([data]))


@given(wire_bytes, st.booleans())
def test_any_bytes_are_an_answer_or_an_invalid_one(data: bytes, closed: bool) -> None:
    try:
        found = parse_answer(data, closed)
    except InvalidAnswer:
        return
    if found is None:
        assert not closed or not any(line.startswith(b'action=') for line in data.split(b'\n')[:-1])
    else:
        action, _ = found
        assert action and action == action.strip() and not action.isdigit()
        assert not any(byte < 32 or byte == 127 for byte in action)
        action.decode()


@given(wire_bytes)
def test_no_part_of_an_answer_is_taken_for_a_different_one(data: bytes) -> None:
    """What a prefix is taken for, the whole is taken for; bytes behind its end are surplus."""
    for end in range(len(data)):
        try:
            early = parse_answer(data[:end])
        except InvalidAnswer:
            with pytest.raises(InvalidAnswer):
                parse_answer(data)
            return
        if early is not None:
            assert parse_answer(data) == (early[0], early[1] or data[end:].strip(b'\r\n') != b'')
            return


def test_the_buffer_stays_bounded() -> None:
    rest = b''
    with pytest.raises(ClientFault):
        for _ in range(1000):
            rest += b'x' * 1000
            _, rest = first_request(rest)
    assert len(rest) <= MAX_MESSAGE + 1000


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        (b'request', b'smtpd_access_policy'),
        (b'sender', b'a=b@c'),
        (b'twice', b'first'),
        (b'crlf', b'x'),
        (b'empty', b''),
        (b'absent', b''),
        (b'ender', b''),
        (b'no equals', b''),
        (b'last', b'z'),
    ],
)
def test_attributes_are_found_by_exact_name(name: bytes, value: bytes) -> None:
    lines = [b'request=smtpd_access_policy', b'sender=a=b@c', b'twice=first', b'twice=second', b'crlf=x\r', b'empty=']
    request = b'\n'.join([*lines, b'no equals', b'last=z\n\n'])
    assert attribute(request, name) == value


@pytest.mark.parametrize('action', [b'', b'  ', b'550', b' 0 ', b'\0', b'550\0', b'\x1b 250 \x7f'])
def test_what_postfix_would_take_for_a_permit_is_no_action(action: bytes) -> None:
    with pytest.raises(InvalidAnswer):
        clean_action(action)


@pytest.mark.parametrize(
    ('action', 'clean'),
    [
        (b'OK\0', b'OK'),
        (b' REJECT for you ', b'REJECT for you'),
        (b'REJECT\0for you', b'REJECT for you'),
        (b'REJECT\tfor\x07you', b'REJECT\tfor?you'),
        (b'REJECT caf\xe9', b'REJECT caf?'),
        ('REJECT caf\u00e9'.encode(), 'REJECT caf\u00e9'.encode()),
        (b'\xff', b'?'),
        (b'550\xff', b'550?'),
        (b'550 no', b'550 no'),
    ],
)
def test_the_word_that_decides_is_kept_whole_and_the_rest_made_printable(action: bytes, clean: bytes) -> None:
    assert clean_action(action) == clean

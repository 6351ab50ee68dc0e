"""Mail as sites get it, made up from random numbers: who sends to whom, and from where. A seed makes the same again."""

from __future__ import annotations

import datetime
import platform
import random
from collections.abc import Iterator
from typing import NamedTuple

from hapolicy_gevent import __version__

#: A large part of the mail of the few senders, and how many other clients and recipients there are.
FEW, PART_OF_FEW = 200, 0.8
OTHERS, RECIPIENTS = 20_000, 2000


class Mail(NamedTuple):
    """What a policy server is asked about."""

    client_address: str
    sender: str
    recipient: str

    @property
    def request(self) -> bytes:
        """A policy request about it, with the attributes that matter."""
        return (f'request=smtpd_access_policy\nclient_address={self.client_address}\nsender={self.sender}\n'
                f'recipient={self.recipient}\n\n').encode()  # fmt: skip


def origin() -> dict[str, str]:
    """Return what figures are of, to be kept with them."""
    return {'date': datetime.date.today().isoformat(), 'version': __version__, 'python': platform.python_version()}


def address(number: int) -> str:
    """Return an IPv4 address, of a network of 256 that no other number has."""
    return f'{20 + number // 65536 % 180}.{number // 256 % 256}.{number % 256}.{1 + number * 7 % 254}'


def different(number: int) -> Iterator[Mail]:
    """Yield mails of as many clients, senders and recipients."""
    for i in range(number):
        yield Mail(address(i), f'{name(i)}@{name(i + 1)}.example.net', f'{name(i // 3)}@example.org')


def few_senders(number: int, seed: int = 1) -> Iterator[Mail]:
    """Yield mails of which few senders send most.

    A sender has one client, or two in different networks; the n-th sends 1/n of what the first does, as recipients
    get (Zipf). The rest comes from many clients, each with senders of its own.
    """
    random_ = random.Random(seed)
    sizes = [1 / (1 + i) for i in range(FEW)]
    popular = [1 / (1 + i) for i in range(RECIPIENTS)]
    recipients = random_.choices(range(RECIPIENTS), popular, k=number)
    senders = random_.choices(range(FEW), sizes, k=number)
    for sender, recipient in zip(senders, recipients, strict=True):
        if random_.random() > PART_OF_FEW:
            sender = FEW + random_.randrange(OTHERS)
        client = address(2 * sender + random_.randrange(1 + sender % 2))
        yield Mail(client, f'{name(sender)}@{name(sender + 7)}.example.net', f'{name(recipient)}@example.org')


def name(number: int) -> str:
    """Return a name for a number, as people and hosts have: letters, and no digits."""
    letters = 'bcdfghjklmnprstvwz'
    text = ''
    while number or len(text) < 6:
        number, consonant = divmod(number, len(letters))
        number, vowel = divmod(number, 5)
        text += letters[consonant] + 'aeiou'[vowel]
    return text

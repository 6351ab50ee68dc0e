"""Two real postgreys with a database each, and two proxies as two MX hosts before them: who is greylisted how often."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from bench import traffic
from bench.traffic import Mail
from tests.postfix import Daemon, postgrey
from tests.support import ProxyProcess, free_port, new_instance, request

pytestmark = pytest.mark.needs_root

STICKY = '--sticky=client_address/24/64,sender,recipient'
#: Seconds after which postgrey lets a mail pass.
DELAY = 2
MAILS = list(traffic.different(60))


class Site:
    """Two MX hosts before two greylists. Each try of a mail meets any MX."""

    def __init__(self, greylists: dict[str, Daemon], proxies: list[ProxyProcess]) -> None:
        self.greylists, self.proxies = greylists, proxies
        self.clients = [proxy.client() for proxy in proxies]
        self._random = random.Random(1)

    def tried(self, mails: Iterable[Mail]) -> dict[Mail, str]:
        """Try mails once; return which greylist let each pass, '' where it was deferred."""
        return {mail: self._try(mail) for mail in self._random.sample(list(mails), len(list(mails)))}

    def deferred(self, mails: Iterable[Mail]) -> set[Mail]:
        """Try mails once; return those that were deferred."""
        return {mail for mail, passed in self.tried(mails).items() if not passed}

    def _try(self, mail: Mail) -> str:
        number, instance = self._random.randrange(len(self.clients)), new_instance()
        action = self.clients[number].ask(request(instance=instance, **mail._asdict()))
        assert action.startswith(('DEFER_IF_PERMIT', 'PREPEND X-Greylist', 'DUNNO')), action
        self.proxies[number].logged(instance)
        found = re.search(rf'\[(\w+)\] .* instance: {re.escape(instance)},', self.proxies[number].log)
        assert found
        return '' if action.startswith('DEFER') else found[1]

    def kill(self, name: str) -> None:
        self.greylists[name].kill()
        for proxy in self.proxies:
            proxy.logged(f'[{name}] (127.0.0.1:{self.greylists[name].port}) is down')

    def start(self, name: str) -> None:
        self.greylists[name].start_again()
        for proxy in self.proxies:
            proxy.logged(f'[{name}] (127.0.0.1:{self.greylists[name].port}) is up: its check passed', 60)


@contextlib.contextmanager
def site(*options: str) -> Iterator[Site]:
    """Run all of it; a client that is known for good mail is greylisted as any other."""
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(postgrey(free_port(), DELAY, '--auto-whitelist-clients=0'))
                   for name in ('GREY1', 'GREY2')}  # fmt: skip
        services = [f'-s{name}=127.0.0.1:{daemon.port}' for name, daemon in started.items()]
        proxies = [stack.enter_context(ProxyProcess(*order, *options)) for order in (services, services[::-1])]
        made = Site(started, proxies)
        for client in made.clients:
            stack.callback(client.close)
        yield made


def wait_for_the_greylist() -> None:
    time.sleep(DELAY + 1)  # postgrey counts whole seconds


def test_a_new_mail_is_deferred_once_and_passes_at_its_second_try_at_whichever_mx() -> None:
    with site(STICKY) as there:
        assert there.deferred(MAILS) == set(MAILS)
        wait_for_the_greylist()
        passed = there.tried(MAILS)
        assert '' not in passed.values(), 'some mail was deferred twice'
        counts = Counter(passed.values())
        assert min(counts['GREY1'], counts['GREY2']) > len(MAILS) // 4, 'and both greylists have their part'


def test_without_sticky_services_many_mails_need_a_third_try() -> None:
    with site() as there:
        assert there.deferred(MAILS) == set(MAILS)
        wait_for_the_greylist()
        twice = there.deferred(MAILS)
        assert len(MAILS) // 4 < len(twice) < len(MAILS), 'half of them, as the turns have it'
        wait_for_the_greylist()
        assert not there.deferred(twice)


def test_the_mail_of_a_greylist_that_dies_is_deferred_at_the_other_and_no_other_mail() -> None:
    """Known mail of the dead one once; and new mail once more, if its second try comes after the return."""
    known, new = MAILS[:40], MAILS[40:]
    with site(STICKY) as there:
        there.deferred(known)
        wait_for_the_greylist()
        owner = there.tried(known)
        of_dead = {mail for mail in known if owner[mail] == 'GREY1'}
        assert len(known) // 4 < len(of_dead) < len(known) * 3 // 4

        there.kill('GREY1')
        assert there.deferred(known) == of_dead
        assert there.deferred(new) == set(new)
        wait_for_the_greylist()
        assert not there.deferred(known), 'for one delay of the greylist'

        there.start('GREY1')
        assert not there.deferred(known), 'what it knew it knows'
        again = there.deferred(new)
        wait_for_the_greylist()
        passed = there.tried(new)
        assert '' not in passed.values()
        assert again == {mail for mail in new if passed[mail] == 'GREY1'}, 'it has not seen their first try'
        assert len(new) // 5 < len(again) < len(new)

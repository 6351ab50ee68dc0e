#!/usr/bin/env python3
"""Write contrib/hapolicy.1 from the text of `hapolicy --help` and from MORE below: run it after a change of either."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

HERE = Path(__file__).parent

#: Sections after those of --help. A line in capitals begins a section, an indented block is shown as it stands.
MORE = """\
EXAMPLES

All -s of one hapolicy are replicas of one policy: each request is answered by one of them. For SPF and greylisting run
two. Try GREY1 first, and GREY2 while GREY1 does not answer; serve all of Postfix at one port:

    hapolicy -l --listen=127.0.0.1:10060 -s GREY1=10.0.0.1:10023:10 -s GREY2=10.0.0.2:10023:20

Share by weight: POLW1 gets two messages of three. If one of them does not answer, the other is asked. Give servers the
same prio only if they share a database or keep none:

    hapolicy -l --listen=127.0.0.1:10060 -s POLW1=10.0.0.1:12525:10:2 -s POLW2=10.0.0.2:12525:10:1

A server that forks five children, asked five requests at once, with 10 seconds for each:

    hapolicy -l --listen=127.0.0.1:10060 -s MT=127.0.0.1:12345::1:10:5

Ask each service once, and print what it answered:

    hapolicy --check-services -s GREY1=10.0.0.1:10023 -s GREY2=10.0.0.2:10023

INTEGRATION

Start it as a server: its options stand in /etc/default/hapolicy, and 'systemctl enable --now hapolicy' starts it at the
socket /var/spool/postfix/hapolicy/socket. Then ask it in main.cf, after reject_unauth_destination, and issue 'postfix
reload'. The path in main.cf begins at Postfix's queue directory, which is / for a chrooted smtpd:

    smtpd_recipient_restrictions =
        permit_mynetworks,
        permit_sasl_authenticated,
        reject_unauth_destination,
        check_policy_service unix:hapolicy/socket

For each further policy of one host: /etc/default/hapolicy-NAME, 'systemctl enable --now hapolicy@NAME', and
unix:hapolicy/NAME. With --listen=127.0.0.1:10060 it serves a port: inet:127.0.0.1:10060.

Or let Postfix start a process for each client, as the Perl hapolicy was run. Enter this at the bottom of master.cf,
with the leading blanks of the second line:

    127.0.0.1:10060 inet    n       n       n       -       0       spawn
      user=nobody argv=/usr/local/bin/hapolicy -l -s GREY1=10.0.0.1:10023:10 -s GREY2=10.0.0.2:10023:20

and ask it by check_policy_service inet:127.0.0.1:10060, with this beside the lines above:

    127.0.0.1:10060_time_limit = 3600

Keep smtpd_policy_service_timeout (100 s) above --deadline (90 s), and smtpd_policy_service_try_limit at 2.

CHECKS

With --listen a service is judged by a question of hapolicy's own, the check: one policy request without sender and
recipient (protocol_state=CONNECT, client 127.0.0.1), sent on each new connection before any mail. It passes if one
valid answer comes, and the connection is then silent for 50 ms. A service that fails its check is down, and is checked
again after 1, 2, 4 ... 30 seconds; each second while no service is up. Mail alone takes a service down only while
another is up (--fall). A service that serves some connections, and lets a further one wait or hangs up on it, is full
and stays up: set its max to the number of its children.

DEFAULT ACTION

--default is returned while no service is up, --failed when a service is up and all that were asked failed at this one
request. While hapolicy itself is not there, Postfix's smtpd_policy_service_default_action applies (451 4.3.5). Where
the policy must hold, set --default to '451 4.3.5 Policy is not available'; where mail must pass, leave it.

LOGGING

Lines go to syslog, facility mail, ident hapolicy or as --name has it; no file is written, so there is nothing to
rotate. With --logging each request is a line. A service that goes down, on trial, up or stalls, or is full, a failed
query, a default action (but a notice where what came is no policy request) and a request that is too long are logged
at level warning in any case:

    journalctl -t hapolicy -p warning

LINKS

Postfix SMTP Access Policy Delegation: http://www.postfix.org/SMTPD_POLICY_README.html

Postfix Per-Client/User/etc. Access Control: http://www.postfix.org/RESTRICTION_CLASS_README.html

SEE ALSO

access(5), master(5), postconf(5), smtpd(8), spawn(8), systemd.socket(5)

LICENSE

hapolicy_gevent is free software under the BSD 2-clause license: see LICENSE, which comes with it.

AUTHOR

The hapolicy_gevent authors. The Perl hapolicy, whose command line and manual this one follows, is by Jan Peter Kessler.
"""

Block = list[str]


def escape(text: str) -> str:
    """Return roff that shows these characters, in ASCII as they are."""
    for character, name in ('\\', r'\e'), ('-', r'\-'), ("'", r'\(aq'), ('`', r'\(ga'), ('^', r'\(ha'), ('~', r'\(ti'):
        text = text.replace(character, name)
    return re.sub(r'^\.', r'\&.', text)


def verbatim(lines: Block) -> Block:
    return ['.nf', *[escape(line) for line in textwrap.dedent('\n'.join(lines)).splitlines()], '.fi']


def paragraph(lines: Block) -> Block:
    return [escape(' '.join(line.strip() for line in lines))]


def entries(lines: Block) -> Block:
    """Turn `  term  text` and the lines below it that stand further right into tagged paragraphs."""
    page: Block = []
    found: list[tuple[str, Block]] = []
    for line in lines:
        if match := re.match(r'  (\S.*?)  +(.*)$|  (-.*)$', line):
            found.append((match[1] or match[3], [match[2]] if match[2] else []))
        elif line.startswith('   '):
            found[-1][1].append(line)
        else:
            found.append(('', [line]))
    for term, text in found:
        # a first line that ends in a colon heads lines that stay as they are
        shown = [escape(text[0]), '.br', *verbatim(text[1:])] if text[0].endswith(':') else paragraph(text)
        page += ['.TP', rf'\fB{escape(term)}\fR', *shown] if term else ['.PP', *shown]
    return page


def blocks(text: str) -> list[Block]:
    return [block.splitlines() for block in re.split(r'\n\n+', text.strip('\n'))]


def manual(module: str) -> str:
    """Return the page for the source of the module, which is read and not imported: gevent may be missing."""
    version = re.search(r"^__version__ = '(.+)'$", module, re.MULTILINE)
    assert version
    first, *rest = blocks(module.split('"""')[1])
    page = [
        r'.\" made by contrib/make_manual.py',
        f'.TH HAPOLICY 1 "" "hapolicy_gevent {version[1]}"',
        '.nh',
        '.ad l',
        '.SH NAME',
        escape(first[0]),
    ]
    options = False
    for head, *lines in rest:
        if head == 'Usage:':
            page += ['.SH SYNOPSIS', *verbatim(lines), '.SH DESCRIPTION']
        elif re.fullmatch(r'\w+ options:|Options:', head):
            page += [] if options else ['.SH OPTIONS']
            options = True
            page += [f'.SS {head[:-1]}', *entries(lines)]
        elif re.fullmatch(r'[A-Z][\w ]*:', head):
            page += [f'.SH {head[:-1].upper()}', *entries(lines)]
        else:
            page += ['.PP', *paragraph([head, *lines])]
    for block in blocks(MORE):
        if block[0].isupper():
            page += [f'.SH {block[0]}']
        elif block[0].startswith(' '):
            page += ['.PP', '.RS 4', *verbatim(block), '.RE']
        else:
            page += ['.PP', *paragraph(block)]
    return '\n'.join(page) + '\n'


if __name__ == '__main__':
    (HERE / 'hapolicy.1').write_text(manual((HERE.parent / 'hapolicy_gevent.py').read_text()))

"""Policy requests as Postfix sends them, and what the policy servers of tests and benches answer."""

from __future__ import annotations

import itertools
import os
import time

#: A usual request at RCPT TO, in Postfix's order (smtpd_check.c, check_policy_service).
ATTRIBUTES = {
    'request': 'smtpd_access_policy',
    'protocol_state': 'RCPT',
    'protocol_name': 'ESMTP',
    'client_address': '192.0.2.7',
    'client_name': 'mail.example.net',
    'client_port': '45678',
    'reverse_client_name': 'mail.example.net',
    'server_address': '198.51.100.25',
    'server_port': '25',
    'helo_name': 'mail.example.net',
    'sender': 'alice@example.net',
    'recipient': 'bob@example.org',
    'recipient_count': '0',
    'queue_id': '',
    'instance': '',
    'size': '12345',
    'etrn_domain': '',
    'stress': '',
    'sasl_method': '',
    'sasl_username': '',
    'sasl_sender': '',
    'ccert_subject': '',
    'ccert_issuer': '',
    'ccert_fingerprint': '',
    'ccert_pubkey_fingerprint': '',
    'encryption_protocol': '',
    'encryption_cipher': '',
    'encryption_keysize': '0',
    'policy_context': '',
}

_instances = itertools.count(1)


def new_instance() -> str:
    """Return an `instance` that no other message has, in Postfix's form."""
    return f'{os.getpid():x}.{int(time.time()):x}.{next(_instances):x}.0'


def request(**changes: object) -> bytes:
    """Return a request, with these attributes changed."""
    return ''.join(f'{name}={value}\n' for name, value in {**ATTRIBUTES, **changes}.items()).encode() + b'\n'


def around_instance(**changes: object) -> tuple[bytes, bytes]:
    """Return a request's bytes before and after the value of `instance`."""
    head, word, tail = request(**{**changes, 'instance': ''}).partition(b'\ninstance=')
    return head + word, tail


def attributes(message: bytes) -> dict[str, str]:
    """Return the attributes of a request."""
    lines = message.decode('utf-8', 'surrogateescape').split('\n')
    return dict(line.rstrip('\r').split('=', 1) for line in lines if '=' in line)


def instance_of(message: bytes) -> bytes:
    """Return the value of `instance`, b'' if it is absent."""
    start = message.find(b'\ninstance=') + 1
    if not start and not message.startswith(b'instance='):
        return b''
    return message[start + 9 : message.find(b'\n', start)]


def is_check(message: bytes) -> bool:
    """Tell whether a request is the proxy's own question."""
    return b'protocol_state=CONNECT\n' in message and b'\nsender=\nrecipient=\n' in message


def echo_of(message: bytes, name: bytes) -> bytes:
    """Return an answer that says whose it is and who gave it."""
    return b'action=DUNNO %b %b\n\n' % (instance_of(message), name)

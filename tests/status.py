"""A proxy with --status, and what tests ask of it by HTTP."""

from __future__ import annotations

import http.client
import json
import sys
import time
from typing import Any, NamedTuple

from tests.support import SCALE, ProxyProcess, free_port


class Answer(NamedTuple):
    """An HTTP answer, whole."""

    status: int
    headers: dict[str, str]
    text: str


class StatusProxy(ProxyProcess):
    """The proxy as a process that serves its status on 127.0.0.1."""

    def __init__(
        self, *arguments: str, python: str = sys.executable, environment: dict[str, str] | None = None
    ) -> None:
        self.status_port = free_port()
        self.url = f'http://127.0.0.1:{self.status_port}/'
        super().__init__(
            *arguments, f'--status=127.0.0.1:{self.status_port}', python=python, environment=environment
        )

    def __enter__(self) -> StatusProxy:
        return self

    def get(self, path: str, method: str = 'GET', seconds: float = 30) -> Answer:
        """Ask for a path on a new connection."""
        connection = http.client.HTTPConnection('127.0.0.1', self.status_port, timeout=seconds * SCALE)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def fresh(self, path: str) -> str:
        """Return a body that was built after this call began."""
        time.sleep(0.3)
        answer = self.get(path)
        assert answer.status == 200, answer
        return answer.text

    def data(self) -> Any:
        """Return status.json as of now."""
        return json.loads(self.fresh('/status.json'))

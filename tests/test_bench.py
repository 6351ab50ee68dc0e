"""The load of bench/ says what became of each request."""

from __future__ import annotations

from types import SimpleNamespace

from bench.smtpd import Load


def test_a_try_counts_when_its_whole_line_is_there() -> None:
    load = Load.__new__(Load)
    load._workers = [SimpleNamespace(log='10.0 0.1 - GREY1\n11.0 0.2 reset -\n12.0 0.3 - GRE'),  # type: ignore[list-item]
                     SimpleNamespace(log=''), SimpleNamespace(log='13')]  # type: ignore[list-item]  # fmt: skip
    assert [(each.seconds, each.error, each.server) for each in load.tries] == [(0.1, '', 'GREY1'), (0.2, 'reset', '-')]

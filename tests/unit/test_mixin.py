"""What every worker class decides for itself, without a loop."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from hermes_gunicorn.keeping import Keeping
from hermes_gunicorn.table import Publisher, Table
from hermes_gunicorn.workers.mixin import HermesMixin

MS = 1_000_000
SECOND = 1000 * MS


@pytest.fixture
def table() -> Table:
    """Two workers in slots 1 and 2."""
    result = Table(*map(bytearray, Table.sizes(3)))
    result.slots = 3
    for slot in (1, 2):
        result.claim(slot)
        Publisher(result, slot).ready(10)
    return result


def held(table: Table, slot: int) -> HermesMixin:
    """Make a worker that requests have held for 20 ms twenty times."""
    worker = HermesMixin.__new__(HermesMixin)
    worker.keeping = Keeping(always=False)
    worker.look = lambda: None
    worker.publisher = Publisher(table, slot)
    worker._rescue_after_ns = 5 * MS
    worker._schedule = lambda woke_ns: woke_ns
    for _ in range(20):
        worker.keeping.closes()
        worker._turned(time.monotonic_ns() - 20 * MS)
    return worker


@pytest.mark.parametrize(("waited_ns", "holds"), [(MS, True), (400 * MS, False)])
def test_requests_hold_the_loop_unless_it_waits_for_a_core(table, waited_ns, holds):
    worker = held(table, 1)
    worker.keeping.weigh(SECOND, waited_ns)
    worker._turned(time.monotonic_ns() - 20 * MS)
    assert worker.holds == holds


def test_that_connections_are_closed_is_told_once_for_all_workers(table, monkeypatch):
    monkeypatch.setattr("hermes_gunicorn.workers.mixin.waited_for_cores", lambda: 0)
    told = []
    for slot in (1, 2):
        worker = held(table, slot)
        worker.log = SimpleNamespace(info=told.append)
        worker._weighed = 0.0
        monkeypatch.setattr("hermes_gunicorn.workers.mixin.monotonic", lambda: 1.0)
        worker._weigh(1.0)
        assert worker.keeping.closes()
    assert len(told) == 1

"""What every worker class decides for itself, without a loop."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.keepalive import Keeping
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table
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
        worker.keeping.began()
        worker._turned(time.monotonic_ns() - 20 * MS)
    return worker


@pytest.mark.parametrize(("waited_ns", "holds"), [(MS, True), (400 * MS, False)])
def test_requests_hold_the_loop_unless_it_waits_for_a_core(table, waited_ns, holds):
    worker = held(table, 1)
    worker.keeping.weigh(SECOND, waited_ns)
    worker._turned(time.monotonic_ns() - 20 * MS)
    assert worker.holds == holds


def closing(table: Table, slot: int, told: list[str]) -> HermesMixin:
    """Make a worker that may close connections, two of which it has."""
    worker = held(table, slot)
    worker.log = SimpleNamespace(info=told.append)
    worker._weighed = time.monotonic() - 1
    worker._weigh(1.0)
    assert worker.keeping.closing
    for _ in range(2):
        worker.publisher.opened(own=True)
    return worker


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """One without a round trip."""
    ours, peers = socket.socketpair()
    with ours, peers:
        yield ours


def test_that_connections_are_closed_is_told_once_for_all_workers(table, connection, monkeypatch):
    monkeypatch.setattr("hermes_gunicorn.workers.mixin.waited_for_cores", lambda: 0)
    told: list[str] = []
    for slot in (1, 2):
        worker = closing(table, slot, told)
        assert worker.closes(connection)
        for _ in range(2):
            worker.publisher.ended()
    assert len(told) == 1


@pytest.mark.parametrize("what", ["busy", "no more loaded", "gone", "elsewhere"])
def test_a_connection_is_kept_while_no_sibling_is_free(table, connection, monkeypatch, what):
    monkeypatch.setattr("hermes_gunicorn.workers.mixin.waited_for_cores", lambda: 0)
    worker = closing(table, 1, [])
    other = Publisher(table, 2)
    if what == "busy":
        other.woke()
    elif what == "no more loaded":
        other.opened(own=True)
        other.opened(own=True)
    elif what == "gone":
        other.dead()
    else:
        bind = Bind(*map(bytearray, Bind.sizes()))
        bind.allowed = 1 << 1
        worker.assignment = SimpleNamespace(binds=[bind])
        worker._weighed = time.monotonic() - 1
        worker._weigh(1.0)
        assert not worker.keeping.closing  # nobody else serves that address
    assert not worker.closes(connection)


def test_a_connection_that_has_its_worker_to_itself_is_kept(table, connection, monkeypatch):
    monkeypatch.setattr("hermes_gunicorn.workers.mixin.waited_for_cores", lambda: 0)
    worker = closing(table, 1, [])
    worker.publisher.closed()
    assert not worker.closes(connection)
    other = Publisher(table, 2)  # with whose there are more than workers
    other.opened(own=True, requests=0)
    other.opened(own=True, requests=0)
    assert worker.closes(connection)


def test_a_connection_with_something_unread_is_kept(table, monkeypatch):
    monkeypatch.setattr("hermes_gunicorn.workers.mixin.waited_for_cores", lambda: 0)
    worker = closing(table, 1, [])
    ours, peers = socket.socketpair()
    with ours, peers:
        assert worker.closes(ours)
        peers.sendall(b"GET")
        assert not worker.closes(ours)

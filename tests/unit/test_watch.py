"""What the monitor remembers."""

from __future__ import annotations

import pytest

from hermes_gunicorn.monitor import watch as module
from hermes_gunicorn.monitor.watch import Watch
from hermes_gunicorn.table import Publisher, Table

ROUNDS = 5


@pytest.fixture
def watch() -> Watch:
    """Two workers in a table that nobody else writes."""
    result = Watch()
    result.table = Table(*map(bytearray, Table.sizes(3)))
    result.table.slots = 3
    for slot in (1, 2):
        result.table.claim(slot)
        Publisher(result.table, slot).ready(10)
    result.sample()
    return result


def rescue(watch: Watch, slot: int) -> list[str]:
    """Have a worker take three connections a look, for some looks; return what is told."""
    publisher = Publisher(watch.table, slot)
    for _ in range(ROUNDS):
        for _ in range(3):
            publisher.rescued()
        watch.sample()
    return [event["text"] for event in watch.events() if event["kind"] == "rescue"]


def test_rescues_that_go_on_are_one_event_for_each_worker(watch, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 3600)  # however long a busy machine takes
    assert rescue(watch, 1) == ["took 15 connections from siblings"]
    assert rescue(watch, 2) == ["took 15 connections from siblings"] * 2


def test_rescues_after_a_pause_are_another_event(watch, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", -1)
    assert rescue(watch, 1) == ["took 3 connections from siblings"] * ROUNDS

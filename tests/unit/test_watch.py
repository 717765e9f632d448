"""What the monitor remembers."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hermes_gunicorn.core.layout import WORKER
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.monitor import watch as module
from hermes_gunicorn.monitor.watch import Watch

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


def test_a_clock_that_is_set_back_stops_nothing(watch, monkeypatch):
    rescue(watch, 1)
    before = watch.points(), watch.events()
    monkeypatch.setattr(module, "_POINT", 0)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() - 3600)
    rescue(watch, 1)
    (event,) = [event for event in watch.events() if event["kind"] == "rescue"]
    assert event["text"] == "took 30 connections from siblings"
    points = [point["at"] for point in watch.points()]
    assert len(points) == len(before[0]) + ROUNDS
    assert points == sorted(points)
    # What has happened moves along with the clock.
    assert all(time.time() - 60 < at <= time.time() + 0.1 for at in points)
    numbers = [event["number"] for event in watch.events()]
    assert numbers == sorted({event["number"] for event in before[1]} | set(numbers))


def test_workers_that_are_gone_are_forgotten(watch):
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            watch.table._rows[WORKER.words + WORKER.index("pid")] = process.pid
            assert watch.status()["workers"][0]["rss"] > 0
            process.communicate()
        assert len(watch._processes) <= 2


def test_without_psutil_all_but_cpu_time_and_memory_is_told(watch, monkeypatch):
    assert all(worker["rss"] for worker in watch.status()["workers"])
    monkeypatch.setattr(module, "psutil", None)
    workers = watch.status()["workers"]
    assert [worker["state"] for worker in workers] == ["ready", "ready"]
    assert not any(worker["rss"] or worker["cpu_seconds"] for worker in workers)

"""When a worker that goes to sleep wakes up to look after its siblings."""

from __future__ import annotations

import time

import pytest

from hermes_gunicorn.rescue import Rescuer
from hermes_gunicorn.table import CASCADE, WORKER, Publisher, Table

WORKERS = 4
TURN_NS = WORKERS * 10_000_000  # one look every 10 ms, in turns


@pytest.fixture
def table() -> Table:
    """Workers in slots 1 to 4, after a first connection."""
    result = Table(*map(bytearray, Table.sizes(WORKERS + 1)))
    result.slots = WORKERS + 1
    for slot in range(1, WORKERS + 1):
        result.claim(slot)
        Publisher(result, slot).ready(10)
    for word in ("dispatched", "settled"):
        set_word(result, 1, word, 1)
    return result


def longest_sleep(table: Table, requests: int = 0) -> int:
    """How long all but the last sleep at most, in nanoseconds, with so many requests each."""
    longest = 0
    for slot in range(1, WORKERS):
        publisher = Publisher(table, slot)
        for _ in range(requests):
            publisher.began()
        siblings = {other: [] for other in range(1, WORKERS + 1) if other != slot}
        rescuer = Rescuer(publisher, 5_000_000, siblings, lambda *_: False, bool)
        table.look_at_ns = 0
        rescuer.look(one=False)
        longest = max(longest, rescuer.next_ns - time.monotonic_ns())
    return longest


def set_word(table: Table, slot: int, word: str, value: int) -> None:
    table._rows[slot * WORKER.words + WORKER.index(word)] = value


def test_they_sleep_long_while_they_are_idle(table):
    assert longest_sleep(table) > 2 * TURN_NS


def test_they_do_not_while_they_have_requests(table):
    assert longest_sleep(table, requests=1) <= TURN_NS


def test_they_do_not_while_a_connection_waits(table):
    set_word(table, WORKERS, "dispatched", 1)
    assert longest_sleep(table) <= TURN_NS


def test_they_do_while_only_the_shared_listener_was_sent_any(table):
    set_word(table, 0, "dispatched", 1)
    assert longest_sleep(table) > 2 * TURN_NS


def test_they_do_not_under_a_policy_that_may_prefer_a_busy_one(table):
    table.policy = CASCADE
    assert longest_sleep(table) <= TURN_NS

"""What a worker takes from its siblings, and when it wakes up to look after them."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from hermes_gunicorn.core import rescue
from hermes_gunicorn.core.layout import CASCADE, WORKER
from hermes_gunicorn.core.rescue import Rescuer
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table

WORKERS = 4
TURN_NS = WORKERS * 10_000_000  # one look every 10 ms, in turns


@pytest.fixture(autouse=True)
def now(monkeypatch) -> None:
    """Stop the clock: between queueing and looking a busy machine may take long."""
    stopped = time.monotonic_ns()
    monkeypatch.setattr(rescue, "monotonic_ns", lambda: stopped)


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
        longest = max(longest, rescuer.next_ns - rescue.monotonic_ns())
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


MS = 1_000_000


def queue_up(table: Table, slot: int, waiting: int, busy_ns: int, sent_ns: int) -> None:
    """Have connections wait, the last sent so long ago, on a worker that is busy for so long."""
    now = rescue.monotonic_ns()
    set_word(table, slot, "dispatched", table.row(slot).settled + waiting)
    set_word(table, slot, "last_dispatch_ns", now - sent_ns)
    set_word(table, slot, "busy_since_ns", now - busy_ns)
    set_word(table, slot, "requests", 1)


@pytest.fixture
def taken() -> list[str]:
    """On whom connections waited that were taken."""
    return []


def looks(table: Table, taken: list[str], one: bool, patient: bool = False) -> Rescuer:
    """Have the worker in slot 1 look; each sibling has as many connections as it wants."""
    with contextlib.ExitStack() as stack:
        listeners = {
            slot: stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for slot in range(2, WORKERS + 1)
        }
        names = {listener: f"slot {slot}" for slot, listener in listeners.items()}

        def take(index: int, listener: socket.socket) -> bool:
            taken.append(names[listener])
            return True

        siblings = {slot: [(0, listener)] for slot, listener in listeners.items()}
        rescuer = Rescuer(Publisher(table, 1), 5 * MS, siblings, take, lambda: True)
        rescuer.look(one, patient)
        return rescuer


def test_one_is_taken_where_requests_hold_the_loop_of_those_that_wait_longest(table, taken):
    queue_up(table, 2, 2, busy_ns=8 * MS, sent_ns=3 * MS)
    queue_up(table, 3, 2, busy_ns=8 * MS, sent_ns=6 * MS)
    looks(table, taken, one=True)
    assert taken == ["slot 3"]
    # Its owner learns that nothing is left there, or it would seem to have work for seconds.
    assert table.row(3).rescued_at_ns > table.row(3).last_dispatch_ns
    assert not table.row(2).rescued_at_ns


def test_several_are_taken_at_once_where_they_do_not(table, taken):
    queue_up(table, 2, 9, busy_ns=8 * MS, sent_ns=3 * MS)
    looks(table, taken, one=False)
    assert len(taken) > 1


def test_whoever_held_the_loop_looks_though_somebody_just_has(table, taken):
    queue_up(table, 2, 1, busy_ns=8 * MS, sent_ns=3 * MS)
    table.look_at_ns = rescue.monotonic_ns() + 9 * MS
    looks(table, taken, one=False)
    assert taken == []
    table.look_at_ns = rescue.monotonic_ns() + 9 * MS
    looks(table, taken, one=True)
    assert taken == ["slot 2"]


@pytest.mark.parametrize("busy_ns", [2 * MS, MS // 2])
def test_what_will_need_help_soon_is_looked_at_then(table, taken, busy_ns):
    queue_up(table, 2, 1, busy_ns=busy_ns, sent_ns=MS)
    due = table.row(2).busy_since_ns + 5 * MS
    assert looks(table, taken, one=True).next_ns <= due
    assert taken == []


@pytest.mark.parametrize(
    ("sent_ns", "emptied_ns", "retry_ns"),
    [(30 * MS, 20 * MS, 40 * MS), (30 * MS, 30 * MS, 60 * MS), (3 * MS, 2 * MS, 10 * MS)],
)
def test_what_was_emptied_is_tried_after_twice_the_time(
    table, taken, sent_ns, emptied_ns, retry_ns
):
    """What was sent there may still be in its handshake; but who asks each turn asks in vain."""
    queue_up(table, 2, 1, busy_ns=8 * MS, sent_ns=sent_ns)
    sent_at = table.row(2).last_dispatch_ns
    set_word(table, 2, "rescued_at_ns", sent_at + emptied_ns)
    looks(table, taken, one=True)
    assert taken == []
    # Somebody is there then.
    in_time = sent_at + retry_ns, rescue.monotonic_ns() + 10 * MS
    assert table.look_at_ns == min(in_time)


@pytest.mark.parametrize("emptied_ns", [-MS, 0, 10 * MS, 40 * MS])  # the last is in the future
def test_it_is_tried_then_and_when_more_was_sent(table, taken, emptied_ns):
    queue_up(table, 2, 1, busy_ns=8 * MS, sent_ns=30 * MS)
    set_word(table, 2, "rescued_at_ns", table.row(2).last_dispatch_ns + emptied_ns)
    looks(table, taken, one=True)
    assert taken == ["slot 2"]


def test_it_is_given_up_in_the_end(table, taken):
    queue_up(table, 2, 1, busy_ns=8 * MS, sent_ns=1001 * MS)
    set_word(table, 2, "rescued_at_ns", table.row(2).last_dispatch_ns + MS)
    looks(table, taken, one=True)
    assert taken == []


@pytest.mark.parametrize(("one", "patient", "soon"), [(0, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_the_next_look_is_soon_unless_cores_are_short(table, taken, one, patient, soon):
    queue_up(table, 2, 9, busy_ns=8 * MS, sent_ns=3 * MS)
    looks(table, taken, bool(one), bool(patient))
    assert taken
    assert (table.look_at_ns < rescue.monotonic_ns() + 2 * MS) == soon

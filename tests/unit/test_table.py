"""The worker status table: single-writer words that other processes see."""

from __future__ import annotations

import itertools
import os
import struct
import time

import pytest

from hermes_gunicorn.core import row
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.layout import (
    CONTROL,
    DRAINING,
    FREE,
    GROUP,
    READY,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
    WORKER,
)
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.shm import Memory
from hermes_gunicorn.core.table import Table, tuned

SECOND = 1_000_000_000


@pytest.fixture
def shared() -> Table:
    """A table of three groups in memory that forked children share."""
    result = Table(*(Memory(size).memory for size in Table.sizes(3 * SLOTS_PER_GROUP)))
    result.slots = 3 * SLOTS_PER_GROUP
    return result


def in_child(function) -> None:
    """Run a function in a forked child and wait for its success."""
    pid = os.fork()
    if not pid:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def kernel_words(shared: Table, slot: int, dispatched: int, age_ns: int = 0) -> None:
    """Write what the kernel program would."""
    at = slot * WORKER.words
    shared._rows[at + WORKER.index("dispatched")] = dispatched
    shared._rows[at + WORKER.index("last_dispatch_ns")] = time.monotonic_ns() - age_ns


def test_a_row_is_two_cache_lines_one_for_each_writer():
    assert WORKER.size == 128
    assert WORKER.index("dispatched") * 8 == 64


def test_what_a_worker_publishes_is_seen_by_other_processes(shared):
    def worker():
        pen = Publisher(shared, 5)
        pen.ready(7)
        pen.woke()
        pen.opened(own=True)
        pen.began()

    shared.claim(5)
    before = time.monotonic_ns()
    in_child(worker)
    row = shared.row(5)
    assert (row.state, row.requests, row.connections, row.capacity) == (READY, 2, 1, 7)
    assert (row.accepted, row.settled) == (1, 1)
    assert before <= row.busy_since_ns <= time.monotonic_ns()


def test_what_began_ends(shared):
    pen = Publisher(shared, 1)
    for _ in range(3):
        pen.woke()
        pen.opened(own=False)
        pen.ended()
        pen.began()
        pen.ended()
        pen.closed()
        pen.polls()
    row = shared.row(1)
    assert (row.busy_since_ns, row.requests, row.connections) == (0, 0, 0)


def test_a_child_of_the_application_cannot_speak_for_its_worker(shared):
    shared.claim(2)
    pen = Publisher(shared, 2)
    pen.ready(1)
    pen.began()

    def child():
        pen.ended()
        pen.woke()
        pen.draining()

    in_child(child)
    row = shared.row(2)
    assert (row.state, row.requests, row.busy_since_ns) == (READY, 1, 0)


@pytest.mark.parametrize("slot", [1, 63, 64, 130])
def test_exactly_the_ready_are_eligible(shared, slot):
    shared.set_state(slot, READY)
    assert shared.eligible() == 1 << slot
    shared.set_state(slot, DRAINING)
    assert shared.eligible() == 0


def test_the_shared_slot_is_never_eligible(shared):
    shared.set_state(SHARED_SLOT, READY)
    assert shared.eligible() == 0


def test_a_stale_word_of_the_bitmap_is_mended_by_any_worker(shared):
    shared.set_state(1, READY)
    shared._groups[GROUP.index("eligible")] = 0b1100
    Publisher(shared, 2).refresh()
    assert shared.eligible() == 0b10


def test_a_row_that_was_scribbled_over_is_mended_by_its_worker(shared):
    pen = Publisher(shared, 1)
    pen.ready(4)
    pen.opened(own=True)
    kernel_words(shared, 1, dispatched=1)
    before = shared.row(1)
    at = WORKER.words
    for i in range(WORKER.words):
        shared._rows[at + i] = 2**64 - 1 - i
    pen.refresh()
    pen.settle(quiet_ns=3 * SECOND)
    after = shared.row(1)
    for word in ("state", "requests", "connections", "capacity", "queued"):
        assert getattr(after, word) == getattr(before, word)
    assert shared.eligible() == 0b10


def test_a_new_owner_inherits_what_waits_and_nothing_else(shared):
    shared.claim(1)
    pen = Publisher(shared, 1)
    pen.ready(4)
    pen.began()
    pen.opened(own=False)
    kernel_words(shared, 1, dispatched=10)
    shared.release(1)
    assert shared.row(1).state == FREE
    shared.claim(1, waiting=3)
    row = shared.row(1)
    assert (row.generation, row.queued) == (2, 3)
    assert (row.requests, row.connections, row.capacity) == (0, 0, 1)
    assert Publisher(shared, 1).queued == 3


@pytest.mark.parametrize(("dispatched", "settled", "queued"), [(5, 2, 3), (2, 2, 0), (2, 5, 0)])
def test_nothing_is_queued_when_more_was_taken_than_sent(shared, dispatched, settled, queued):
    shared.claim(1)
    pen = Publisher(shared, 1)
    kernel_words(shared, 1, dispatched)
    for _ in range(settled):
        pen.opened(own=True)
    assert shared.row(1).queued == queued


def test_a_connection_on_its_way_is_not_written_off(shared):
    pen = Publisher(shared, 1)
    kernel_words(shared, 1, dispatched=2, age_ns=SECOND)
    pen.settle(quiet_ns=3 * SECOND)
    assert pen.queued == 2


def test_a_connection_that_never_came_is_written_off(shared):
    pen = Publisher(shared, 1)
    kernel_words(shared, 1, dispatched=2, age_ns=4 * SECOND)
    assert pen.drifted
    pen.settle(quiet_ns=3 * SECOND)
    assert not pen.drifted
    assert pen.queued == 0


def test_a_connection_taken_without_having_been_booked_is_put_right_at_once(shared):
    pen = Publisher(shared, 1)
    kernel_words(shared, 1, dispatched=0)
    pen.opened(own=True)
    pen.settle(quiet_ns=3 * SECOND)
    kernel_words(shared, 1, dispatched=1)
    assert pen.queued == 1


def test_any_content_can_be_read(shared):
    for _ in range(200):
        for words in (shared._control, shared._groups, shared._rows):
            words[:] = memoryview(os.urandom(words.nbytes)).cast("Q")
        assert len(shared.rows()) <= shared.capacity
        assert all(0 <= row.queued < 1 << 63 for row in shared.rows())
        assert shared.eligible() >= 0


def test_a_word_is_one_native_store():
    memory = bytearray(WORKER.size)
    control, groups = bytearray(CONTROL.size), bytearray(16 * GROUP.size)
    pen = Publisher(Table(control, groups, memory), 0)
    pen.opened(own=False)
    at = WORKER.index("connections") * 8
    assert struct.unpack_from("=Q", memory, at) == (1,)


def test_a_drained_worker_is_sent_nothing_more_until_its_end(shared):
    shared.claim(1)
    pen = Publisher(shared, 1)
    pen.ready(4)
    shared.drain(1, True)
    assert pen.drained
    assert shared.eligible() == 0
    assert shared.group(0, 2).state[1] == DRAINING
    pen.refresh()  # what it does once a second
    assert shared.eligible() == 0
    shared.drain(1, False)
    assert shared.eligible() == 0b10
    shared.drain(1, True)
    shared.release(1)
    shared.claim(1)
    Publisher(shared, 1).ready(4)
    assert shared.eligible() == 0b10


def test_looking_at_a_table_does_not_change_it(shared):
    shared.localities, shared.policy = 3, 1
    at = [shared._control, shared._groups, shared._rows]
    before = [part.tolist() for part in at]
    assert Table(*at).localities == 3
    assert [part.tolist() for part in at] == before


def test_the_end_of_a_turn_counts_however_soon_after_another_it_began(shared, monkeypatch):
    now = [SECOND]
    monkeypatch.setattr(row, "monotonic_ns", lambda: now[0])
    pen, called = Publisher(shared, 1), []

    def at_turn(woke_ns: int) -> int:
        called.append(woke_ns)
        return now[0] + SECOND // 50

    pen.at_turn(at_turn)
    for lasts in (0, SECOND // 50 - 1, SECOND // 50):
        pen.woke()
        now[0] += lasts
        pen.polls()
    # The second ended too soon after the first; the third began as soon after it.
    assert called == [SECOND, SECOND + SECOND // 50 - 1]


def test_a_first_turn_that_began_without_poll_is_no_turn_since_the_machine_was_booted(shared):
    pen, called = Publisher(shared, 1), []
    before = time.monotonic_ns()
    pen.at_turn(lambda woke_ns: called.append(woke_ns) or 0)
    pen.polls()
    assert before <= called[0] <= time.monotonic_ns()


def test_a_bitmap_whose_rows_change_without_end_is_left_for_later(shared, monkeypatch):
    flickering = itertools.cycle([0b10, 0b100])
    monkeypatch.setattr(shared, "_ready_bits", lambda first, last: next(flickering))
    shared.refresh_eligible(0)  # returns
    monkeypatch.undo()
    shared.set_state(1, READY)
    assert shared.eligible() == 0b10


def test_a_bind_that_allows_nobody_allows_everybody():
    bind = Bind(*map(bytearray, Bind.sizes()))
    bind.allowed = 1 << 70
    assert [slot for slot in (1, 70, 71) if bind.allows(slot)] == [70]
    bind._allowed[1] = 0
    assert all(bind.allows(slot) for slot in (0, 1, 70, 1023))
    bind.restore()
    assert [slot for slot in (1, 70, 71) if bind.allows(slot)] == [70]


def test_what_was_decided_is_restored_and_what_any_worker_stores_is_not(shared):
    shared.policy, shared.theta, shared.localities = 1, 0.25, 2
    shared.look_at_ns = 77
    shared._control[:] = memoryview(bytes(shared._control.nbytes)).cast("Q")
    shared.look_at_ns = 78
    shared.restore()
    assert (shared.policy, shared.theta, shared.localities) == (1, 0.25, 2)
    assert shared.slots == shared.decided("slots") == 3 * SLOTS_PER_GROUP
    assert shared.look_at_ns == 78


def test_a_slot_without_an_owner_is_free_again_whatever_was_stored_there(shared):
    for slot in (1, 2, 130):
        shared.set_state(slot, READY)
    shared.drain(1, True)
    shared.drain(2, True)
    shared.restore_rows(owned={1, 2}, drained={2})
    assert shared.eligible() == 0b10
    assert shared.row(130).state == FREE
    assert (shared.row(1).drained, shared.row(2).drained) == (0, 1)


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("policy", "cascade", ("policy", 1)),
        ("threshold", 0.5, ("hang_threshold_ns", 500_000_000)),
        ("theta", 2, ("theta", 2.0)),
    ],
)
def test_a_setting_can_be_tuned_within_limits(name, value, stored):
    assert tuned(name, value) == stored


@pytest.mark.parametrize(
    ("name", "value"), [("policy", "best"), ("threshold", -1), ("theta", 1e9), ("slots", 1)]
)
def test_what_is_no_setting_or_out_of_its_limits_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} cannot be"):
        tuned(name, value)

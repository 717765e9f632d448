"""Which worker the kernel program gives a connection to."""

from __future__ import annotations

import os
import time

import pytest
from kernel_bind import Bind, MakeBind, set_row

from hermes_gunicorn.loader import syscall
from hermes_gunicorn.table import (
    BOOTING,
    CONTROL,
    DEAD,
    DRAINING,
    FREE,
    READY,
    SHARED_SLOT,
    WORKER,
)

SECOND = 1_000_000_000


def test_fewest_requests_first(bind: Bind):
    set_row(bind.table, 1, requests=2)
    set_row(bind.table, 2, requests=1)
    set_row(bind.table, 3, requests=3)
    assert bind.sent() == {2: 1}


def test_connections_that_wait_count_like_requests_so_that_a_burst_spreads(bind: Bind):
    bind.connect(48)
    assert bind.accepted(48) == {1: 16, 2: 16, 3: 16}


def test_requests_are_weighed_by_capacity(bind: Bind):
    set_row(bind.table, 1, requests=2, capacity=4)
    set_row(bind.table, 2, requests=1, capacity=1)
    set_row(bind.table, 3, requests=3, capacity=4)
    assert bind.sent() == {1: 1}


def test_at_equal_load_workers_in_poll_come_first(bind: Bind):
    for slot in (1, 3):
        set_row(bind.table, slot, busy_since_ns=time.monotonic_ns())
    set_row(bind.table, 2, connections=9)
    assert bind.sent() == {2: 1}


def test_then_fewest_connections(bind: Bind):
    set_row(bind.table, 1, connections=7)
    set_row(bind.table, 2, connections=6)
    set_row(bind.table, 3, connections=5)
    assert bind.sent() == {3: 1}


def test_kept_alive_connections_are_spread_evenly(bind: Bind):
    opened = {1: 0, 2: 0, 3: 0}
    for _ in range(30):
        (slot,) = bind.sent()
        opened[slot] += 1
        row = bind.table.row(slot)
        set_row(bind.table, slot, connections=opened[slot], settled=row.dispatched)
    assert opened == {1: 10, 2: 10, 3: 10}


def test_ties_are_broken_by_the_hash(bind: Bind):
    counts = {1: 0, 2: 0, 3: 0}
    for _ in range(300):
        (slot,) = bind.sent()
        counts[slot] += 1
        set_row(bind.table, slot, settled=bind.table.row(slot).dispatched)
    # Expected 100 each; chi-square with 2 degrees of freedom, p = 1e-6.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 27.6


def test_a_hung_worker_is_skipped(bind: Bind):
    bind.table.hang_threshold_ns = SECOND // 10
    set_row(bind.table, 1, busy_since_ns=time.monotonic_ns() - SECOND)
    for slot in (2, 3):
        set_row(bind.table, slot, requests=5, busy_since_ns=time.monotonic_ns())
    assert bind.sent()[1] == 0
    assert bind.counter("hung_skipped") == 1


def test_a_worker_that_has_just_woken_is_not_hung(bind: Bind):
    bind.table.hang_threshold_ns = SECOND
    # In the future: it may have read the clock after the program did.
    for slot, age in ((1, SECOND // 2), (2, 0), (3, -SECOND)):
        set_row(bind.table, slot, busy_since_ns=time.monotonic_ns() - age)
    assert bind.sent(30)[SHARED_SLOT] == 0
    assert bind.counter("hung_skipped") == 0


@pytest.mark.parametrize("threshold", [0, 2**64 - 1])
def test_the_hang_check_can_be_switched_off(bind: Bind, threshold: int):
    bind.table.hang_threshold_ns = threshold
    for slot in (1, 2, 3):
        set_row(bind.table, slot, busy_since_ns=1)
    assert bind.sent()[SHARED_SLOT] == 0


def test_with_all_workers_hung_the_first_to_come_back_takes_it(bind: Bind):
    bind.table.hang_threshold_ns = SECOND // 10
    for slot in (1, 2, 3):
        set_row(bind.table, slot, busy_since_ns=time.monotonic_ns() - SECOND)
    assert bind.sent() == {SHARED_SLOT: 1}
    assert bind.counter("hung_skipped") == 3
    assert bind.counter("none_eligible") == 1
    assert bind.table.row(SHARED_SLOT).dispatched == 1


@pytest.mark.parametrize("state", [FREE, BOOTING, DRAINING, DEAD, 77])
def test_only_ready_workers_are_sent_connections(bind: Bind, state: int):
    bind.table.set_state(1, state)
    assert bind.sent(10)[1] == 0


@pytest.mark.parametrize("state", [FREE, BOOTING, DRAINING, DEAD])
def test_a_stale_bit_of_the_bitmap_does_not_make_a_worker_eligible(bind: Bind, state: int):
    set_row(bind.table, 1, state=state)
    assert bind.sent(10)[1] == 0


def test_without_workers_connections_wait_where_all_will_look(bind: Bind):
    for slot in (1, 2, 3):
        bind.table.set_state(slot, BOOTING)
    assert bind.sent(5) == {SHARED_SLOT: 5}


def test_a_slot_without_owner_is_not_selected_whatever_the_table_says(bind: Bind):
    bind.dispatcher.close_slot(1)
    for slot in (2, 3):
        set_row(bind.table, slot, requests=5)
    assert bind.sent() == {SHARED_SLOT: 1}
    assert bind.counter("select_failed") == 1


def test_as_the_very_last_resort_the_kernel_hashes(bind: Bind):
    for slot in (SHARED_SLOT, 1, 2, 3):
        bind.dispatcher.close_slot(slot)
    assert bind.sent(5).total() == 5
    assert bind.counter("shared_failed") == 5


def test_what_is_sent_is_booked(bind: Bind):
    before = time.monotonic_ns()
    for slot in (2, 3):
        set_row(bind.table, slot, requests=9)
    bind.sent(4)
    row = bind.table.row(1)
    assert row.dispatched == 4
    assert before <= row.last_dispatch_ns <= time.monotonic_ns()
    assert bind.counter("dispatched") == 4


def test_the_program_runs_once_for_each_connection(bind: Bind, bpf_stats: None):
    bind.sent(20)
    stats = syscall.program_stats(bind.dispatcher.program_fd)
    assert stats.runs == 20
    assert stats.run_time_ns > 0


def test_two_binds_share_the_workers_and_keep_their_sockets_apart(bind: Bind, make_bind: MakeBind):
    other = make_bind(3, ("::1", 0))
    bind.connect(15)
    other.connect(15)
    first, second = bind.accepted(15), other.accepted(15)
    # The load on a worker is that of all binds together.
    assert first + second == {1: 10, 2: 10, 3: 10}
    assert (bind.counter("dispatched"), other.counter("dispatched")) == (15, 15)


def test_more_than_64_slots(make_bind: MakeBind):
    bind = make_bind(150)
    ready = {5, 63, 64, 100, 127, 128, 150}
    for slot in ready:
        bind.table.claim(slot)
        bind.table.set_state(slot, READY)
    taken = bind.sent(140)
    assert set(taken) == ready


def test_a_lone_group_that_is_not_the_first_is_found(make_bind: MakeBind):
    bind = make_bind(150)
    bind.table.claim(130)
    bind.table.set_state(130, READY)
    assert bind.sent(20) == {130: 20}


def test_any_content_of_the_table_leaves_every_connection_answered(bind: Bind):
    table = bind.table
    rows, control = len(table._rows) * 8, CONTROL.size
    for i in range(10_000):
        table._rows[:] = memoryview(os.urandom(rows)).cast("Q")
        table._control[:] = memoryview(os.urandom(control)).cast("Q")
        if i % 2:  # plausible states, so that any word can decide
            for slot in range(table.capacity):
                table._rows[slot * WORKER.words] = READY
        bind.connect()
        if i % 50 == 49:
            assert bind.accepted(50).total() == 50
            bind.forget_clients()

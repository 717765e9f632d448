"""Which worker the kernel program gives a connection to."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable

import pytest
from kernel_bind import Bind, MakeBind, check_hangs, set_row

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import (
    BOOTING,
    BY_BIND,
    BY_CLIENT,
    BY_DESTINATION,
    CASCADE,
    DEAD,
    DRAINING,
    FREE,
    LEAST_LOADED,
    MAX_SLOTS,
    READY,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
    WORKER,
)
from hermes_gunicorn.kernel import bpf


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
    hangs, well = check_hangs(bind.table)
    set_row(bind.table, 1, busy_since_ns=hangs)
    for slot in (2, 3):
        set_row(bind.table, slot, requests=5, busy_since_ns=well)
    assert bind.sent()[1] == 0
    assert bind.counter("hung_skipped") == 1


def test_a_worker_that_has_just_woken_is_not_hung(bind: Bind):
    _, now = check_hangs(bind.table)
    # In the future: it may have read the clock after the program did.
    for slot, age in ((1, now // 8), (2, 0), (3, -now)):
        set_row(bind.table, slot, busy_since_ns=now - age)
    assert bind.sent(30)[SHARED_SLOT] == 0
    assert bind.counter("hung_skipped") == 0


@pytest.mark.parametrize("threshold", [0, 2**64 - 1])
def test_the_hang_check_can_be_switched_off(bind: Bind, threshold: int):
    bind.table.hang_threshold_ns = threshold
    for slot in (1, 2, 3):
        set_row(bind.table, slot, busy_since_ns=1)
    assert bind.sent()[SHARED_SLOT] == 0


def test_with_all_workers_hung_the_first_to_come_back_takes_it(bind: Bind):
    hangs, _ = check_hangs(bind.table)
    for slot in (1, 2, 3):
        set_row(bind.table, slot, busy_since_ns=hangs)
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


def test_without_the_shared_listener_somebody_who_accepts_is_chosen(bind: Bind):
    """As for a moment during an upgrade, when all workers look hung or boot."""
    for slot in (SHARED_SLOT, 1):
        bind.dispatcher.close_slot(slot)
    for slot in (1, 2, 3):
        bind.table.set_state(slot, BOOTING)
    assert bind.sent(20) == {2: 20}
    assert bind.table.row(2).dispatched == 20
    assert bind.counter("shared_failed") == 0


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
    stats = bpf.program_stats(bind.dispatcher.program_fd)
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


def ready(bind: Bind, slots: Iterable[int]) -> None:
    """Let workers take up slots and wait in poll."""
    for slot in slots:
        bind.table.claim(slot)
        bind.table.set_state(slot, READY)


def select(bind: Bind, *slots: int) -> None:
    """Say what stage 1 of the cascade has selected."""
    for group in range(bind.table.capacity // SLOTS_PER_GROUP):
        here = [slot % SLOTS_PER_GROUP for slot in slots if slot // SLOTS_PER_GROUP == group]
        bind.table.select(group, sum(1 << bit for bit in here))


def test_more_than_64_slots(make_bind: MakeBind):
    bind = make_bind(150)
    slots = {5, 63, 64, 100, 127, 128, 150}
    ready(bind, slots)
    taken = bind.sent(140)
    # Groups of 2, 4 and 1: pairs of them are compared, so it is near 20 each.
    assert set(taken) == slots
    assert all(18 <= count <= 22 for count in taken.values())


def test_of_two_groups_the_better_worker_gets_it(make_bind: MakeBind):
    bind = make_bind(100)
    ready(bind, range(1, 101))
    for slot in range(1, 101):
        set_row(bind.table, slot, requests=5 if slot != 70 else 4)
    for _ in range(10):
        assert bind.sent() == {70: 1}
        set_row(bind.table, 70, settled=bind.table.row(70).dispatched)


def test_a_lone_group_that_is_not_the_first_is_found(make_bind: MakeBind):
    bind = make_bind(150)
    ready(bind, [130])
    assert bind.sent(20) == {130: 20}


def test_the_last_group_is_followed_by_the_first(bind: Bind):
    bind.table.slots = MAX_SLOTS
    assert SHARED_SLOT not in bind.sent(60)


def test_an_address_can_be_confined_to_some_slots(bind: Bind, make_bind: MakeBind):
    other = make_bind(3, ("::1", 0))
    bind.dispatcher.bind.allowed = 1 << 2
    assert bind.sent(9) == {2: 9}
    assert other.sent(8) == {1: 4, 3: 4}


def test_a_confined_address_waits_rather_than_use_other_slots(bind: Bind):
    bind.dispatcher.bind.allowed = 1 << 2
    bind.table.set_state(2, DRAINING)
    assert bind.sent() == {SHARED_SLOT: 1}


def test_cascade_picks_by_hash_among_the_selected_however_loaded(bind: Bind):
    bind.table.policy = CASCADE
    select(bind, 1, 3)
    set_row(bind.table, 1, requests=7, connections=9)
    counts = bind.sent(300)
    # Expected 150 each; chi-square with 1 degree of freedom, p = 1e-6.
    assert set(counts) == {1, 3}
    assert sum((count - 150) ** 2 / 150 for count in counts.values()) < 23.9


def test_cascade_picks_a_lone_survivor(bind: Bind):
    bind.table.policy = CASCADE
    select(bind, 2)
    assert bind.sent(10) == {2: 10}


def test_cascade_without_a_selection_takes_the_least_loaded(bind: Bind):
    bind.table.policy = CASCADE
    set_row(bind.table, 1, requests=1)
    set_row(bind.table, 3, requests=1)
    assert bind.sent() == {2: 1}


def test_cascade_does_not_send_to_a_selected_worker_that_hangs_by_now(bind: Bind):
    bind.table.policy = CASCADE
    hangs, _ = check_hangs(bind.table)
    select(bind, 1)
    set_row(bind.table, 1, busy_since_ns=hangs)
    set_row(bind.table, 2, requests=1)
    assert bind.sent() == {3: 1}
    assert bind.counter("hung_skipped") == 1


def test_the_policy_can_be_switched_while_it_runs(bind: Bind):
    select(bind, 1)
    for chosen, slot in ((CASCADE, 1), (LEAST_LOADED, 3), (CASCADE, 1)):
        bind.table.policy = chosen
        set_row(bind.table, 1, requests=9)
        set_row(bind.table, 2, requests=9)
        set_row(bind.table, 3, settled=bind.table.row(3).dispatched)
        assert bind.sent() == {slot: 1}


LOCALITIES = 3


@pytest.fixture
def localities(make_bind: MakeBind) -> Bind:
    """A bind on all addresses with three locality groups of two workers each."""
    bind = make_bind(LOCALITIES * SLOTS_PER_GROUP - 1, ("::", 0))
    ready(bind, (5, 6, 70, 71, 140, 141))
    bind.table.localities = LOCALITIES
    return bind


def sent_between(bind: Bind, client: str, server: str) -> int:
    """Connect from one address to another and return the locality group that got it."""
    with socket.socket(socket.AF_INET6 if ":" in client else socket.AF_INET) as sock:
        sock.settimeout(5)
        sock.bind((client, 0))
        sock.connect((server, bind.address[1]))
        (slot,) = bind.accepted(1)
    return slot // SLOTS_PER_GROUP % LOCALITIES


def packed(address: str) -> bytes:
    """Return an address as it stands in the packet."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@pytest.mark.parametrize("last", range(1, 9))
def test_clients_keep_their_locality_group(localities: Bind, last: int):
    localities.dispatcher.bind.group_by(BY_CLIENT, 7)
    client = f"127.0.0.{last}"
    group = policy.locality(packed(client), BY_CLIENT, 7, LOCALITIES)
    for server in ("127.0.1.1", "127.0.1.2", "127.0.1.3"):
        assert sent_between(localities, client, server) == group
    assert localities.counter("spilled") == 0


@pytest.mark.parametrize("server", [*(f"127.0.0.{last}" for last in range(1, 9)), "::1"])
def test_destinations_keep_their_locality_group(localities: Bind, server: str):
    localities.dispatcher.bind.group_by(BY_DESTINATION, 7)
    group = policy.locality(packed(server), BY_DESTINATION, 7, LOCALITIES)
    for client in ("127.0.1.1", "127.0.1.2", "127.0.1.3") if "." in server else ("::1",) * 3:
        assert sent_between(localities, client, server) == group


@pytest.mark.parametrize("seed", range(6))
def test_binds_keep_their_locality_group(localities: Bind, seed: int):
    localities.dispatcher.bind.group_by(BY_BIND, seed)
    group = policy.locality(b"", BY_BIND, seed, LOCALITIES)
    for last in range(1, 4):
        assert sent_between(localities, f"127.0.0.{last}", f"127.0.1.{last}") == group


def test_within_a_locality_group_the_least_loaded_gets_it(localities: Bind):
    group = policy.locality(b"", BY_BIND, 0, LOCALITIES)
    mine = {0: (5, 6), 1: (70, 71), 2: (140, 141)}[group]
    set_row(localities.table, mine[0], requests=3)
    assert localities.sent(3) == {mine[1]: 3}
    # Both are busier than all others by now, and stay at home all the same.
    set_row(localities.table, mine[1], requests=2)
    assert set(localities.sent(6)) == set(mine)


def test_another_locality_group_helps_out_when_the_own_one_has_no_healthy_worker(
    localities: Bind,
):
    table = localities.table
    hangs, _ = check_hangs(table)
    group = policy.locality(b"", BY_BIND, 0, LOCALITIES)
    mine = {0: (5, 6), 1: (70, 71), 2: (140, 141)}[group]
    for slot in mine:
        set_row(table, slot, busy_since_ns=hangs)
    assert not set(mine) & set(localities.sent(10))
    assert localities.counter("spilled") == 10
    for slot in mine:
        table.set_state(slot, DRAINING)
    assert not {*mine, SHARED_SLOT} & set(localities.sent(10))
    assert localities.counter("spilled") == 20


def test_any_content_of_the_table_leaves_every_connection_answered(bind: Bind):
    table = bind.table
    bind_memory = bind.dispatcher.bind
    memory = (table._control, table._groups, table._rows, bind_memory._words, bind_memory._allowed)
    for i in range(10_000):
        for words in memory:
            words[:] = memoryview(os.urandom(words.nbytes)).cast("Q")
        if i % 4:  # or hardly a random number would let a worker be searched
            table.slots = i % 200
            table.localities = i % 5
        if i % 2:  # plausible states, so that any word can decide
            for slot in range(table.capacity):
                table._rows[slot * WORKER.words] = READY
        bind.connect()
        if i % 50 == 49:
            assert bind.accepted(50).total() == 50
            bind.forget_clients()

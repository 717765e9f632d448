"""The kernel program and its model choose alike, over random tables."""

from __future__ import annotations

import random
import time

import pytest
from kernel_bind import Bind, MakeBind, set_row

from hermes_gunicorn import policy
from hermes_gunicorn.table import READY, SHARED_SLOT

SECOND = 1_000_000_000
TABLES = 3000


def scatter(chance: random.Random, bind: Bind, slots: int) -> None:
    """Fill the table with what workers might publish, crowded so that ties are common."""
    table, now = bind.table, time.monotonic_ns()
    table.hang_threshold_ns = chance.choice([0, SECOND, 10 * SECOND])
    for slot in range(1, slots + 1):
        dispatched = chance.randrange(2, 1000)
        set_row(
            table,
            slot,
            state=chance.choice([READY, READY, READY, chance.randrange(6)]),
            # Far from the thresholds, as the clock runs on until the program looks.
            busy_since_ns=chance.choice([0, 0, now, now - 5 * SECOND, now - 50 * SECOND]),
            requests=chance.choice([0, 0, 1, 2, 50]),
            connections=chance.choice([0, 1, 1, 2, 300]),
            capacity=chance.choice([1, 1, 4, 1000]),
            dispatched=dispatched,
            settled=dispatched - chance.choice([0, 0, 1, 2]),
        )
    for group in range(4):
        table.refresh_eligible(group)


@pytest.mark.parametrize("loader", ["object"], indirect=True)
@pytest.mark.parametrize("slots", [1, 3, 8, 63, 150])
def test_the_kernel_chooses_what_the_model_chooses(make_bind: MakeBind, slots: int):
    chance = random.Random(slots)
    bind = make_bind(slots)
    seen: set[bool] = set()
    for _ in range(TABLES // 5):
        scatter(chance, bind, slots)
        table = bind.table
        groups = policy.candidates(
            table.rows(), table.eligible(), time.monotonic_ns(), table.hang_threshold_ns
        )
        (slot,) = bind.sent()
        bind.forget_clients()
        assert any(slot in group for group in groups)
        seen.add(slot == SHARED_SLOT)
    assert False in seen


@pytest.mark.parametrize("loader", ["object"], indirect=True)
def test_never_a_worker_that_hangs_or_leaves_while_another_lives(make_bind: MakeBind):
    chance = random.Random(0)
    bind = make_bind(8)
    for _ in range(TABLES // 5):
        scatter(chance, bind, 8)
        now, threshold = time.monotonic_ns(), bind.table.hang_threshold_ns
        fit = {
            row.slot
            for row in bind.table.rows()
            if row.state == READY and not policy.is_hung(row.busy_since_ns, now, threshold)
        }
        (slot,) = bind.sent()
        bind.forget_clients()
        assert slot in (fit or {SHARED_SLOT})

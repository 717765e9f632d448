"""Tables as workers might publish them, crowded so that ties and edges are common."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hypothesis import strategies as st
from kernel_bind import Bind, set_row

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import (
    ALL_SLOTS,
    BY_BIND,
    CASCADE,
    GROUP,
    LEAST_LOADED,
    READY,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
    WEIGHT,
)

WORD = (1 << SLOTS_PER_GROUP) - 1
SECOND = 1_000_000_000
THRESHOLD = 10 * SECOND  # far from all ages, as the clock runs on until the program looks

SINCE_BOOT = -1

# Each byte of a drawn string picks one of each; the frequent ones are listed twice.
_STATES = (READY, READY, READY, READY, READY, READY, 0, 1, 3, 4, 77)
_FROZEN = (0, 0, 0, 0, 1, 1 << 63)
_AGES = (None, None, None, 0, 5 * SECOND, 50 * SECOND, -5 * SECOND, SINCE_BOOT)
_REQUESTS = (0, 0, 0, 1, 1, 2, 3, 50, (1 << 19) - 1, 1 << 19, (1 << 64) - 1)
_CONNECTIONS = (0, 0, 1, 1, 2, 3, 300, (1 << 24) - 1, 1 << 24)
_CAPACITIES = (1, 1, 1, 4, 1000)
_QUEUED = (0, 0, 0, 1, 1, 2, -1)


@dataclass(frozen=True)
class Filling:
    """The content of a table, apart from the clock.

    Attributes:
        slots: bytes, of which four describe a slot.
        policy: as in the control block.
        localities: number of locality groups.
        seed: decides which of them the bind's is.
        threshold_ns: 0 or ``THRESHOLD``.
        allowed: bitmap of the slots that may serve the bind.
        stale: bitmap of the slots whose eligibility is the wrong way round.
        selected: bitmap, what stage 1 of the cascade selected.
    """

    slots: bytes
    policy: int
    localities: int
    seed: int
    threshold_ns: int
    allowed: int
    stale: int
    selected: int

    def into(self, bind: Bind) -> None:
        """Write it into the table of a bind with as many slots."""
        table, now = bind.table, time.monotonic_ns()
        for slot in range(1, len(self.slots) // 4 + 1):
            a, b, c, d = self.slots[4 * slot - 4 : 4 * slot]
            age = _AGES[b % len(_AGES)]
            busy_since_ns = {None: 0, SINCE_BOOT: 1}.get(age, now - (age or 0))
            set_row(
                table,
                slot,
                state=_STATES[a % len(_STATES)],
                busy_since_ns=busy_since_ns,
                requests=_REQUESTS[b // 16 % len(_REQUESTS)],
                connections=_CONNECTIONS[c % len(_CONNECTIONS)],
                weight=WEIGHT // _CAPACITIES[c // 16 % len(_CAPACITIES)],
                frozen_since_ns=_FROZEN[a // 16 % len(_FROZEN)],
                dispatched=1000,
                settled=1000 - _QUEUED[d % len(_QUEUED)],
            )
        table.policy = self.policy
        table.localities = self.localities
        table.hang_threshold_ns = self.threshold_ns
        bind.dispatcher.bind.group_by(BY_BIND, self.seed)
        bind.dispatcher.bind.allowed = self.allowed
        for group in range(table.capacity // SLOTS_PER_GROUP):
            table.refresh_eligible(group)
            first = group * SLOTS_PER_GROUP
            table.select(group, self.selected >> first & WORD)
            table._groups[group * GROUP.words] ^= self.stale >> first & WORD


def fillings(slots: int) -> st.SearchStrategy[Filling]:
    """Draw the content of a table with that many slots beside the shared one."""
    bits = st.binary(min_size=slots // 8 + 1, max_size=slots // 8 + 1).map(
        lambda data: int.from_bytes(data, "little") << 1
    )
    return st.builds(
        Filling,
        slots=st.binary(min_size=4 * slots, max_size=4 * slots),
        policy=st.sampled_from([LEAST_LOADED, CASCADE]),
        localities=st.sampled_from([1, 1, 2, 3] if slots >= SLOTS_PER_GROUP else [1, 3]),
        seed=st.integers(0, 15),
        threshold_ns=st.sampled_from([0, THRESHOLD, THRESHOLD]),
        allowed=st.one_of(st.just(ALL_SLOTS), bits, st.just(0)),
        stale=st.one_of(st.just(0), bits),
        selected=st.one_of(st.just(ALL_SLOTS), bits, bits),
    )


def view(bind: Bind) -> policy.View:
    """Read what the program will see."""
    table = bind.table
    return policy.View(
        rows=table.rows(),
        eligible=table.eligible(),
        selected=table.selected(),
        allowed=bind.dispatcher.bind.allowed,
        policy=table.policy,
        threshold_ns=table.hang_threshold_ns,
        localities=table.localities,
    )


def fit(view: policy.View) -> set[int]:
    """Return the slots that may get a connection at all, however loaded they are."""
    now = time.monotonic_ns()
    return {
        row.slot
        for row in view.rows
        if row.slot != SHARED_SLOT
        and view.usable & 1 << row.slot
        and row.state == READY
        and not row.frozen_since_ns
        and not policy.is_hung(row.busy_since_ns, now, view.threshold_ns)
    }

"""Access to the worker status table: rows, columns, bitmaps and binds.

The table lives in memory that all workers, the arbiter and, with kernel dispatch,
the eBPF program share. A word is published by one aligned 8-byte store through a
memoryview of format ``Q``: no system call, no lock. Every word has one writer,
so counters are kept as Python ints and stored, never read back.
"""

from __future__ import annotations

from collections.abc import Collection
from time import monotonic_ns
from typing import Any, Final, NamedTuple

from hermes_gunicorn.core.binds import Buffer, read_bitmap
from hermes_gunicorn.core.layout import (
    BOOTING,
    CONTROL,
    DRAINING,
    FREE,
    GROUP,
    MAX_GROUPS,
    MAX_QUEUED,
    POLICIES,
    READY,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
    WEIGHT,
    WORD_MASK,
    WORKER,
    Row,
)

__all__ = ["Columns", "Table", "tuned"]

_STATE: Final = WORKER.index("state")
_GENERATION: Final = WORKER.index("generation")
_WEIGHT: Final = WORKER.index("weight")
_BUSY_SINCE: Final = WORKER.index("busy_since_ns")
_REQUESTS: Final = WORKER.index("requests")
_CONNECTIONS: Final = WORKER.index("connections")
_CAPACITY: Final = WORKER.index("capacity")
_SETTLED: Final = WORKER.index("settled")
_ACCEPTED: Final = WORKER.index("accepted")
_DISPATCHED: Final = WORKER.index("dispatched")
_LAST_DISPATCH: Final = WORKER.index("last_dispatch_ns")
_FROZEN: Final = WORKER.index("frozen_since_ns")
_RESCUED: Final = WORKER.index("rescued")
_RESCUED_AT: Final = WORKER.index("rescued_at_ns")
_PID: Final = WORKER.index("pid")
_DRAINED: Final = WORKER.index("drained")
_THETA: Final = CONTROL.index("theta")
_ELIGIBLE: Final = GROUP.index("eligible")
_SELECTED: Final = GROUP.index("selected")

_OWNED_WORDS: Final = (
    *(_BUSY_SINCE, _REQUESTS, _CONNECTIONS, _SETTLED, _ACCEPTED),
    *(_FROZEN, _RESCUED, _RESCUED_AT, _PID, _DRAINED),
)

_TRIES: Final = 4


class Columns(NamedTuple):
    """Some words of neighbouring slots."""

    state: list[int]
    busy_since_ns: list[int]
    frozen_since_ns: list[int]
    connections: list[int]
    weight: list[int]
    events: list[int]  # requests in flight or queued


def _control_word(name: str, decided: bool = False) -> Any:
    """Make a property of a table out of a word of its control block.

    Args:
        name: the word.
        decided: whether ``Table.restore`` stores again what was set last.
    """
    word = CONTROL.index(name)

    def read(table: Table) -> int:
        return table._control[word]

    def store(table: Table, value: int) -> None:
        table._control[word] = value

    def decide(table: Table, value: int) -> None:
        table._decided[word] = value
        store(table, value)

    return property(read, decide if decided else store)


def tuned(name: str, value: float | str) -> tuple[str, int | float]:
    """Check a setting of a running server that somebody wants to change.

    Returns:
        The attribute of ``Table`` to set, and its value.

    Raises:
        ValueError: saying what is wrong.
    """
    if name == "policy" and value in POLICIES:
        return "policy", POLICIES.index(str(value))
    if name == "threshold" and (value == 0 or 0.001 <= float(value) <= 3600):
        return "hang_threshold_ns", round(float(value) * 1e9)
    if name == "theta" and 0 <= float(value) <= 1000:
        return "theta", float(value)
    raise ValueError(f"{name} cannot be {value!r}")


class Table:
    """The control block and the rows.

    Args:
        control: writable buffer of ``CONTROL.size`` bytes or more.
        groups: writable buffer of ``MAX_GROUPS * GROUP.size`` bytes or more.
        rows: writable buffer of a multiple of ``WORKER.size`` bytes; slot 0 first.

    Attributes:
        slots: slots in use, the shared slot 0 included.
        hang_threshold_ns: how long a worker may be busy before it counts as hung; 0 means for ever.
        policy: which policy the kernel and the workers follow: an index into ``POLICIES``.
        localities: number of locality groups; group g of 64 slots belongs to g modulo this.
        scheduled_ns: when the cascade's first stage ran last, CLOCK_MONOTONIC.
        look_at_ns: when the workers' queues are to be looked at next, CLOCK_MONOTONIC.
        closing_since_ns: when responses first closed their connections, CLOCK_MONOTONIC; 0: none
            has yet.
    """

    slots: int = _control_word("slots", decided=True)
    hang_threshold_ns: int = _control_word("hang_threshold_ns", decided=True)
    policy: int = _control_word("policy", decided=True)
    localities: int = _control_word("localities", decided=True)
    scheduled_ns: int = _control_word("scheduled_ns")
    look_at_ns: int = _control_word("look_at_ns")
    closing_since_ns: int = _control_word("closing_since_ns")

    def __init__(self, control: Buffer, groups: Buffer, rows: Buffer) -> None:
        self._control = memoryview(control).cast("B")[: CONTROL.size].cast("Q")
        self._groups = memoryview(groups).cast("B")[: MAX_GROUPS * GROUP.size].cast("Q")
        self._rows = memoryview(rows).cast("B").cast("Q")
        self.capacity = len(self._rows) // WORKER.words
        self._decided: dict[int, int] = {}
        if not self.localities:  # new memory
            self.localities = 1

    @staticmethod
    def sizes(slots: int) -> tuple[int, int, int]:
        """Return how much memory the parts of a table of so many rows need, in bytes."""
        return CONTROL.size, MAX_GROUPS * GROUP.size, slots * WORKER.size

    @classmethod
    def private(cls) -> Table:
        """Make a table with a single row that nobody else sees."""
        return cls(*map(bytearray, cls.sizes(1)))

    @property
    def theta(self) -> float:
        """How far above the average the cascade's filters let through, relative to it."""
        return self._control[_THETA] / 1000

    @theta.setter
    def theta(self, value: float) -> None:
        self._decided[_THETA] = self._control[_THETA] = round(value * 1000)

    def decided(self, name: str) -> int:
        """Return what this process last stored in a word of the control block, or 0."""
        return self._decided.get(CONTROL.index(name), 0)

    def restore(self) -> None:
        """Store what this process decided once more, where somebody has overwritten it."""
        for word, value in self._decided.items():
            if self._control[word] != value:
                self._control[word] = value

    @property
    def in_use(self) -> int:
        """How many slots are in use, whatever the table says: 1 to ``capacity``."""
        return min(max(self.slots, 1), self.capacity)

    def row(self, slot: int) -> Row:
        """Read a slot's row."""
        at = slot * WORKER.words
        return Row(slot, *self._rows[at : at + WORKER.words])

    def rows(self) -> list[Row]:
        """Read the rows in use, the shared slot's first."""
        return [self.row(slot) for slot in range(self.in_use)]

    def eligible(self) -> int:
        """Read the eligibility bitmap as one number, bit s for slot s."""
        return read_bitmap(self._groups[_ELIGIBLE :: GROUP.words])

    def selected(self) -> int:
        """Read what the cascade's first stage selected, bit s for slot s."""
        return read_bitmap(self._groups[_SELECTED :: GROUP.words])

    def select(self, group: int, bits: int) -> None:
        """Publish what the cascade's first stage selected in a group of 64."""
        self._groups[group * GROUP.words + _SELECTED] = bits

    def group(self, first: int, last: int) -> Columns:
        """Read slots ``first`` to ``last - 1``, column by column: far faster than rows."""
        start, end = first * WORKER.words, last * WORKER.words

        def column(word: int) -> list[int]:
            return self._rows[start + word : end : WORKER.words].tolist()

        dispatched, settled = column(_DISPATCHED), column(_SETTLED)
        events = [
            requests + queued if (queued := (sent - taken) & WORD_MASK) <= MAX_QUEUED else requests
            for requests, sent, taken in zip(column(_REQUESTS), dispatched, settled, strict=True)
        ]
        state = column(_STATE)
        drained = column(_DRAINED)
        if 1 in drained:  # to others it is as if it left
            state = [
                DRAINING if d == 1 and s == READY else s
                for s, d in zip(state, drained, strict=True)
            ]
        return Columns(
            state=state,
            busy_since_ns=column(_BUSY_SINCE),
            frozen_since_ns=column(_FROZEN),
            connections=column(_CONNECTIONS),
            weight=column(_WEIGHT),
            events=events,
        )

    def set_state(self, slot: int, state: int) -> None:
        """Publish a slot's state and make the bitmap follow."""
        self._rows[slot * WORKER.words + _STATE] = state
        self.refresh_eligible(slot // SLOTS_PER_GROUP)

    def refresh_eligible(self, group: int) -> None:
        """Store the group's word of the bitmap as it follows from the rows.

        Anyone may do this at any time. A writer that was overtaken between reading
        and storing sees that afterwards and does it again, a few times: the rows may
        change without end. One that gives up, or is killed in between, leaves a stale
        word, which costs nothing worse than a detour, as the program checks the row
        too, and is mended at the next call.
        """
        first = group * SLOTS_PER_GROUP
        last = min(first + SLOTS_PER_GROUP, self.capacity)
        word = None
        for _ in range(_TRIES):
            if word == (word := self._ready_bits(first, last)):
                break
            self._groups[group * GROUP.words + _ELIGIBLE] = word

    def _ready_bits(self, first: int, last: int) -> int:
        start, end = first * WORKER.words, last * WORKER.words
        states = self._rows[start + _STATE : end : WORKER.words]
        drained = self._rows[start + _DRAINED : end : WORKER.words]
        word = 0
        for bit, state in enumerate(states):
            if state == READY and drained[bit] != 1:
                word |= 1 << bit
        return word & ~1 if first == SHARED_SLOT else word

    def restore_rows(self, owned: Collection[int], drained: Collection[int]) -> None:
        """Restore the arbiter's words of the rows, where somebody has overwritten them.

        Args:
            owned: the slots that have an owner; all others are free.
            drained: those of them that are to be sent nothing more.
        """
        states = self._rows[_STATE :: WORKER.words].tolist()
        marks = self._rows[_DRAINED :: WORKER.words].tolist()
        for slot, (state, mark) in enumerate(zip(states, marks, strict=True)):
            if slot not in owned:
                if state != FREE or mark:
                    self.release(slot)
            elif (mark == 1) != (slot in drained):
                self.drain(slot, slot in drained)
        for group in range(-(-self.capacity // SLOTS_PER_GROUP)):
            self.refresh_eligible(group)

    def has_others(self, slot: int) -> bool:
        """Tell whether a worker in another slot is ready, or about to be."""
        states = self._rows[WORKER.words + _STATE : self.in_use * WORKER.words : WORKER.words]
        return any(
            state in (BOOTING, READY) for other, state in enumerate(states, 1) if other != slot
        )

    def claim(self, slot: int, waiting: int = 0) -> None:
        """Prepare a slot for a new owner that is about to be forked.

        Args:
            slot: a slot without a living owner.
            waiting: connections left on its listeners by the last owner.
        """
        at = slot * WORKER.words
        self.set_state(slot, BOOTING)
        for word in _OWNED_WORDS:
            self._rows[at + word] = 0
        self._rows[at + _CAPACITY] = 1
        self._rows[at + _WEIGHT] = WEIGHT
        self._rows[at + _GENERATION] = (self._rows[at + _GENERATION] + 1) & WORD_MASK
        self._rows[at + _SETTLED] = (self._rows[at + _DISPATCHED] - waiting) & WORD_MASK

    def release(self, slot: int, waiting: int = 0) -> None:
        """Give a slot back after its owner is gone.

        Args:
            slot: the slot.
            waiting: connections left on its listeners.
        """
        self.set_state(slot, FREE)
        at = slot * WORKER.words
        for word in (_BUSY_SINCE, _REQUESTS, _CONNECTIONS, _FROZEN, _DRAINED):
            self._rows[at + word] = 0
        self.book(slot, waiting)

    def book(self, slot: int, waiting: int) -> int:
        """Have workers rescue what waits on a slot and was not sent there by the program.

        To be called by the arbiter alone. A living owner goes on with its own count, which
        its next store puts here again; one that hangs does not store.

        Args:
            slot: the slot.
            waiting: connections that wait on its listeners.

        Returns:
            How many of them the program has not booked.
        """
        row = self.row(slot)
        missing = max(waiting - row.queued, 0)
        # Or siblings have emptied it, and it has been filled again since.
        if missing or (waiting and row.rescued_at_ns > row.last_dispatch_ns):
            at = slot * WORKER.words
            self._rows[at + _LAST_DISPATCH] = monotonic_ns()
            self._rows[at + _SETTLED] = (row.dispatched - waiting) & WORD_MASK
            self.slots = max(self.slots, slot + 1)
        return missing

    def queues(self) -> list[int]:
        """List the workers' slots to which more connections were sent than were taken."""
        end = self.in_use * WORKER.words
        # Nobody settles what was sent to the shared slot.
        dispatched = self._rows[WORKER.words + _DISPATCHED : end : WORKER.words].tolist()
        settled = self._rows[WORKER.words + _SETTLED : end : WORKER.words].tolist()
        if dispatched == settled:  # as nearly always
            return []
        return [
            slot
            for slot, (sent, taken) in enumerate(zip(dispatched, settled, strict=True), 1)
            if 0 < (sent - taken) & WORD_MASK <= MAX_QUEUED
        ]

    def sent(self) -> int:
        """Count the connections dispatched to all slots."""
        end = self.in_use * WORKER.words
        return sum(self._rows[_DISPATCHED : end : WORKER.words].tolist())

    def drain(self, slot: int, drained: bool) -> None:
        """Say whether a worker is to be sent nothing more, until its end or until told else."""
        self._rows[slot * WORKER.words + _DRAINED] = drained
        self.refresh_eligible(slot // SLOTS_PER_GROUP)

    def mark_frozen(self, slot: int, now_ns: int) -> None:
        """Say that connections wait for a worker that does not leave poll; any sibling."""
        self._rows[slot * WORKER.words + _FROZEN] = now_ns

    def mark_rescued(self, slot: int, now_ns: int) -> None:
        """Say that what waited for a worker was taken; any sibling."""
        self._rows[slot * WORKER.words + _RESCUED_AT] = now_ns

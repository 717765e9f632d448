"""The worker status table: its layout, and single-writer access to it.

The layout is that of ``bpf/hermes.h``, which says what each word means. The
table lives in memory that all workers, the arbiter and, with kernel dispatch,
the eBPF program share. A word is published by one aligned 8-byte store through a
memoryview of format ``Q``: no system call, no lock. Every word has one writer,
so counters are kept as Python ints and stored, never read back.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from time import monotonic_ns
from typing import Final

__all__ = [
    "BIND",
    "BOOTING",
    "CONTROL",
    "DEAD",
    "DRAINING",
    "FREE",
    "LAYOUT_VERSION",
    "MAX_GROUPS",
    "MAX_SLOTS",
    "READY",
    "SHARED_SLOT",
    "SLOTS_PER_GROUP",
    "STATES",
    "WORKER",
    "Publisher",
    "Row",
    "Struct",
    "Table",
]

LAYOUT_VERSION: Final = 1
MAX_SLOTS: Final = 1024
SLOTS_PER_GROUP: Final = 64
MAX_GROUPS: Final = MAX_SLOTS // SLOTS_PER_GROUP
SHARED_SLOT: Final = 0

FREE, BOOTING, READY, DRAINING, DEAD = range(5)
STATES: Final = ("free", "booting", "ready", "draining", "dead")

_WORD: Final = 8
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True)
class Struct:
    """A C struct of 8-byte words: field names in order, with array lengths."""

    name: str
    fields: tuple[tuple[str, int], ...]

    @property
    def words(self) -> int:
        """Length in 8-byte words."""
        return sum(length for _, length in self.fields)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.words * _WORD

    def index(self, field: str) -> int:
        """Return the word index of a field within the struct."""
        at = 0
        for name, length in self.fields:
            if name == field:
                return at
            at += length
        raise KeyError(field)


CONTROL: Final = Struct(
    "hermes_control",
    (("slots", 1), ("hang_threshold_ns", 1), ("reserved", 6), ("eligible", MAX_GROUPS)),
)
WORKER: Final = Struct(
    "hermes_worker",
    (
        ("state", 1),
        ("generation", 1),
        ("busy_since_ns", 1),
        ("requests", 1),
        ("connections", 1),
        ("capacity", 1),
        ("settled", 1),
        ("accepted", 1),
        ("dispatched", 1),
        ("last_dispatch_ns", 1),
        ("reserved", 6),
    ),
)
BIND: Final = Struct(
    "hermes_bind",
    (
        ("dispatched", 1),
        ("hung_skipped", 1),
        ("none_eligible", 1),
        ("select_failed", 1),
        ("shared_failed", 1),
        ("no_table", 1),
        ("reserved", 2),
    ),
)

_STATE: Final = WORKER.index("state")
_GENERATION: Final = WORKER.index("generation")
_BUSY_SINCE: Final = WORKER.index("busy_since_ns")
_REQUESTS: Final = WORKER.index("requests")
_CONNECTIONS: Final = WORKER.index("connections")
_CAPACITY: Final = WORKER.index("capacity")
_SETTLED: Final = WORKER.index("settled")
_ACCEPTED: Final = WORKER.index("accepted")
_DISPATCHED: Final = WORKER.index("dispatched")
_LAST_DISPATCH: Final = WORKER.index("last_dispatch_ns")
_SLOTS: Final = CONTROL.index("slots")
_HANG_THRESHOLD: Final = CONTROL.index("hang_threshold_ns")
_ELIGIBLE: Final = CONTROL.index("eligible")

_OWNED_WORDS: Final = (_BUSY_SINCE, _REQUESTS, _CONNECTIONS, _SETTLED, _ACCEPTED)


@dataclass(frozen=True)
class Row:
    """One slot as it was read. Words of a live table change while they are read."""

    slot: int
    state: int
    generation: int
    busy_since_ns: int
    requests: int
    connections: int
    capacity: int
    settled: int
    accepted: int
    dispatched: int
    last_dispatch_ns: int

    @property
    def queued(self) -> int:
        """Connections sent here that nobody has taken yet."""
        queued = (self.dispatched - self.settled) & _MASK
        return 0 if queued >> 63 else queued


class Table:
    """The control block and the rows.

    Args:
        control: writable buffer of ``CONTROL.size`` bytes or more.
        rows: writable buffer of a multiple of ``WORKER.size`` bytes; slot 0 first.
    """

    def __init__(self, control: mmap.mmap | bytearray, rows: mmap.mmap | bytearray) -> None:
        self._control = memoryview(control).cast("B")[: CONTROL.size].cast("Q")
        self._rows = memoryview(rows).cast("B").cast("Q")
        self.capacity = len(self._rows) // WORKER.words

    @classmethod
    def anonymous(cls, slots: int) -> Table:
        """Make a table in memory that forked children share, for use without eBPF."""
        return cls(mmap.mmap(-1, CONTROL.size), mmap.mmap(-1, slots * WORKER.size))

    @property
    def slots(self) -> int:
        """Slots in use, the shared slot 0 included."""
        return self._control[_SLOTS]

    @slots.setter
    def slots(self, value: int) -> None:
        self._control[_SLOTS] = value

    @property
    def hang_threshold_ns(self) -> int:
        """How long a worker may be busy before it counts as hung; 0 means for ever."""
        return self._control[_HANG_THRESHOLD]

    @hang_threshold_ns.setter
    def hang_threshold_ns(self, value: int) -> None:
        self._control[_HANG_THRESHOLD] = value

    def row(self, slot: int) -> Row:
        """Read a slot's row."""
        at = slot * WORKER.words
        return Row(slot, *self._rows[at : at + _LAST_DISPATCH + 1])

    def rows(self) -> list[Row]:
        """Read the rows in use, the shared slot's first."""
        return [self.row(slot) for slot in range(min(self.slots, self.capacity))]

    def eligible(self) -> int:
        """Read the eligibility bitmap as one number, bit s for slot s."""
        words = self._control[_ELIGIBLE : _ELIGIBLE + MAX_GROUPS]
        return int.from_bytes(struct.pack(f"<{MAX_GROUPS}Q", *words), "little")

    def set_state(self, slot: int, state: int) -> None:
        """Publish a slot's state and make the bitmap follow."""
        self._rows[slot * WORKER.words + _STATE] = state
        self.refresh_eligible(slot // SLOTS_PER_GROUP)

    def refresh_eligible(self, group: int) -> None:
        """Store the group's word of the bitmap as it follows from the rows.

        Anyone may do this at any time. A writer that was overtaken between reading
        and storing sees that afterwards and does it again; one that is killed in
        between leaves a stale word, which costs nothing worse than a detour, as
        the program checks the row too, and is mended at the next call.
        """
        first = group * SLOTS_PER_GROUP
        last = min(first + SLOTS_PER_GROUP, self.capacity)
        word = None
        while word != (word := self._ready_bits(first, last)):
            self._control[_ELIGIBLE + group] = word

    def _ready_bits(self, first: int, last: int) -> int:
        states = self._rows[first * WORKER.words + _STATE : last * WORKER.words : WORKER.words]
        word = 0
        for bit, state in enumerate(states):
            if state == READY:
                word |= 1 << bit
        return word & ~1 if first == SHARED_SLOT else word

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
        self._rows[at + _GENERATION] = (self._rows[at + _GENERATION] + 1) & _MASK
        self._rows[at + _SETTLED] = (self._rows[at + _DISPATCHED] - waiting) & _MASK

    def release(self, slot: int) -> None:
        """Give a slot back after its owner is gone."""
        self.set_state(slot, FREE)
        at = slot * WORKER.words
        for word in (_BUSY_SINCE, _REQUESTS, _CONNECTIONS):
            self._rows[at + word] = 0


class Publisher:
    """A worker's pen: writes the words of its own row.

    The methods up to ``settle`` are the hot path: a few memory stores each. A
    child that the application forks keeps the mapping but must not speak for the
    worker, so it is given a row of its own that nobody reads.
    """

    def __init__(self, table: Table, slot: int) -> None:
        self.table = table
        self.slot = slot
        self.connections = 0
        self.requests = 0
        start = slot * WORKER.words
        self._words = table._rows[start : start + WORKER.words]
        self._settled = self._words[_SETTLED]
        self._accepted = 0
        self._capacity = 1
        self._state = BOOTING
        os.register_at_fork(after_in_child=self._disown)

    @classmethod
    def unseen(cls) -> Publisher:
        """Make a pen for a row that nobody reads, for a worker without a slot."""
        return cls(Table(bytearray(CONTROL.size), bytearray(WORKER.size)), SHARED_SLOT)

    def _disown(self) -> None:
        self.table = Table(bytearray(CONTROL.size), bytearray(WORKER.size))
        self.slot = 0
        self._words = self.table._rows

    def woke(self) -> None:
        """The loop has left poll with work to do."""
        self._words[_BUSY_SINCE] = monotonic_ns()

    def polls(self) -> None:
        """The loop is about to wait in poll."""
        self._words[_BUSY_SINCE] = 0

    def opened(self, own: bool) -> None:
        """A connection was accepted; its first request counts as in flight from here.

        Were it counted only when it arrives, a worker that accepts quickly would look
        idle and be sent a whole burst before a sibling has been scheduled at all.

        Args:
            own: taken from the slot's own listener, not from the shared one.
        """
        self.connections += 1
        self.requests += 1
        self._words[_CONNECTIONS] = self.connections
        self._words[_REQUESTS] = self.requests
        if own:
            self._accepted += 1
            self._settled += 1
            self._words[_ACCEPTED] = self._accepted
            # Last, so that the connection is at no time on neither account.
            self._words[_SETTLED] = self._settled & _MASK

    def closed(self) -> None:
        """A connection was closed."""
        self.connections -= 1
        self._words[_CONNECTIONS] = self.connections

    def began(self) -> None:
        """A further request on a connection is in flight."""
        self.requests += 1
        self._words[_REQUESTS] = self.requests

    def ended(self) -> None:
        """A request is done, or the first one never came."""
        self.requests -= 1
        self._words[_REQUESTS] = self.requests

    @property
    def queued(self) -> int:
        """Connections the kernel sent here that were not taken yet."""
        return self.table.row(self.slot).queued

    @property
    def drifted(self) -> bool:
        """Whether more or fewer connections were taken than were sent here."""
        return self._words[_DISPATCHED] != self._settled & _MASK

    def settle(self, quiet_ns: int) -> None:
        """Write off what was sent here and never became acceptable.

        To be called only when the own queue was seen empty. A dispatch is booked
        at the SYN and can be accepted a round trip later, so nothing is written
        off until no connection was sent here for ``quiet_ns`` nanoseconds. Taken
        without having been booked (SYN cookies) is put right at once.
        """
        dispatched = self._words[_DISPATCHED]
        ahead = (dispatched - self._settled) & _MASK
        age = monotonic_ns() - self._words[_LAST_DISPATCH]
        # A dispatch in the future is none: someone has scribbled over the row.
        if not 0 <= age < quiet_ns or ahead >> 63:
            self._settled = dispatched
            self._words[_SETTLED] = dispatched

    def ready(self, capacity: int) -> None:
        """Accept from now on; up to ``capacity`` requests at once."""
        self._capacity = max(capacity, 1)
        self._state = READY
        self.refresh()

    def refresh(self) -> None:
        """Publish anew all that stays as it is, should someone have scribbled over it."""
        self._words[_CAPACITY] = self._capacity
        self._words[_CONNECTIONS] = self.connections
        self._words[_REQUESTS] = self.requests
        self._words[_SETTLED] = self._settled & _MASK
        self.table.set_state(self.slot, self._state)

    def draining(self) -> None:
        """Take no more; what was sent here already is still accepted."""
        self._state = DRAINING
        self.refresh()

    def dead(self) -> None:
        """The process is about to end."""
        self._state = DEAD
        self.refresh()

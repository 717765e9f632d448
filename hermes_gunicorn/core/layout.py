"""The layout of the worker status table, as ``bpf/hermes.h`` has it, and its constants.

``bpf/hermes.h`` says what each word means. The loaders refuse a program whose layout differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

__all__ = [
    "ALLOWED",
    "ALL_SLOTS",
    "BIND",
    "BOOTING",
    "BY_BIND",
    "BY_CLIENT",
    "BY_DESTINATION",
    "CASCADE",
    "CONTROL",
    "COUNTERS",
    "DEAD",
    "DRAINING",
    "FREE",
    "GROUP",
    "GROUP_BY",
    "LAYOUT_VERSION",
    "LEAST_LOADED",
    "MAX_GROUPS",
    "MAX_QUEUED",
    "MAX_SLOTS",
    "POLICIES",
    "READY",
    "SHARED_SLOT",
    "SLOTS_PER_GROUP",
    "STATES",
    "TRANSITIONS",
    "WEIGHT",
    "WORD_MASK",
    "WORKER",
    "Row",
    "Struct",
]

LAYOUT_VERSION: Final = 4
MAX_SLOTS: Final = 1024
SLOTS_PER_GROUP: Final = 64
MAX_GROUPS: Final = MAX_SLOTS // SLOTS_PER_GROUP
SHARED_SLOT: Final = 0
ALL_SLOTS: Final = (1 << MAX_SLOTS) - 1  # as a bitmap

FREE, BOOTING, READY, DRAINING, DEAD = range(5)
STATES: Final = ("free", "booting", "ready", "draining", "dead")
# By the worker. The arbiter makes a free slot booting, and any state free, which
# nobody but the owner's end may cause.
TRANSITIONS: Final = {
    BOOTING: {READY, DRAINING, DEAD},
    READY: {DRAINING, DEAD},
    DRAINING: {DEAD},
    DEAD: set[int](),
}
LEAST_LOADED, CASCADE = range(2)
POLICIES: Final = ("least_loaded", "cascade")
BY_BIND, BY_DESTINATION, BY_CLIENT = range(3)
GROUP_BY: Final = ("bind", "destination", "client")
WEIGHT: Final = 1 << 20  # of a request that fills a worker

_WORD: Final = 8  # bytes
WORD_MASK: Final = (1 << 64) - 1
MAX_QUEUED: Final = WORD_MASK >> 1  # more is a negative number


@dataclass(frozen=True)
class Struct:
    """A C struct of 8-byte words: field names in order, with array lengths."""

    name: str
    fields: tuple[tuple[str, int], ...]

    @cached_property
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
    (
        ("slots", 1),
        ("hang_threshold_ns", 1),
        ("policy", 1),
        ("theta", 1),
        ("localities", 1),
        ("scheduled_ns", 1),
        ("look_at_ns", 1),
        ("closing_since_ns", 1),
    ),
)
GROUP: Final = Struct("hermes_group", (("eligible", 1), ("selected", 1)))
WORKER: Final = Struct(
    "hermes_worker",
    (
        ("state", 1),
        ("busy_since_ns", 1),
        ("requests", 1),
        ("connections", 1),
        ("weight", 1),
        ("settled", 1),
        ("accepted", 1),
        ("frozen_since_ns", 1),
        ("dispatched", 1),
        ("last_dispatch_ns", 1),
        ("generation", 1),
        ("capacity", 1),
        ("rescued", 1),
        ("rescued_at_ns", 1),
        ("pid", 1),
        ("drained", 1),
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
        ("spilled", 1),
        ("reserved", 1),
        ("group_by", 1),
        ("seed", 1),
        ("reserved2", 6),
    ),
)
ALLOWED: Final = Struct("hermes_allowed", (("slots", 1),))
COUNTERS: Final = tuple(name for name, _ in BIND.fields[: BIND.index("reserved")])


@dataclass(frozen=True)
class Row:
    """One slot as it was read. Words of a live table change while they are read."""

    slot: int
    state: int
    busy_since_ns: int
    requests: int
    connections: int
    weight: int
    settled: int
    accepted: int
    frozen_since_ns: int
    dispatched: int
    last_dispatch_ns: int
    generation: int
    capacity: int
    rescued: int
    rescued_at_ns: int
    pid: int
    drained: int

    @property
    def queued(self) -> int:
        """Connections sent here that nobody has taken yet."""
        queued = (self.dispatched - self.settled) & WORD_MASK
        return queued if queued <= MAX_QUEUED else 0

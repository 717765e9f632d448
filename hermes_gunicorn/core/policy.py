"""Which worker gets a connection: the decision alone.

The kernel decides (``bpf/hermes.bpf.c``). This says the same in Python, for tests to
hold the two against each other and for people to read; the workers run one part of it
themselves, ``select``. Pure functions, no I/O.

Theory of operation. A connection should meet a worker that can turn to it at once.
Two things stand in the way: a worker may hang, and it may have other work.

*Hung* is a worker whose loop left poll and did not come back for longer than the
threshold. It is skipped. One that waits in poll is not hung, however long it waits,
unless a sibling saw connections wait for it there: then it is frozen, and skipped until
its loop turns.

Policy ``least_loaded`` ranks the healthy ones, lowest first, by

1. load: requests in flight, a new connection's first one included, and connections
   that were sent to it and wait, for its capacity;
2. in poll before busy: of two with equal load, the idle one answers sooner;
3. open connections, so that kept-alive ones, which will send more, spread as well.

Queued connections are counted by the kernel itself as it sends them, so that a burst
within one scheduling interval sees its own effect. Ties are broken by the packet's hash.

Policy ``cascade`` is the paper's. The workers filter themselves every few milliseconds
(``select``); the kernel picks one of the survivors by hash. It costs less per
connection and knows less. A pick that is hung or gone by then, or an empty selection,
falls back to the search above.

Slots come in groups of 64. With more than one group in use the hash picks two that
have eligible workers, and the better of the two best workers is taken. With locality
groups, related connections have the same groups; another one is looked at only when
nobody healthy is found there.

When nobody healthy is found at all the connection goes to slot 0, the listener all
workers share, where the first of them to come back takes it: no worse than one shared
queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hermes_gunicorn.core.layout import (
    BY_CLIENT,
    CASCADE,
    DRAINING,
    READY,
    SHARED_SLOT,
    SLOTS_PER_GROUP,
    WEIGHT,
    Row,
)
from hermes_gunicorn.core.table import Columns

__all__ = [
    "NEVER",
    "REMARKABLE_NS",
    "View",
    "Way",
    "better",
    "candidates",
    "free_sibling",
    "has_its_own",
    "is_full",
    "is_hung",
    "is_live",
    "locality",
    "outcome",
    "rank",
    "rescue_at",
    "select",
    "ways",
]

NEVER: Final = 1 << 64  # later than any time
REMARKABLE_NS: Final = 200_000_000  # being busy for so long is told; for less it is work

# 63 requests of weight 2**20 // 63 are not quite 2**20.
_FULL = WEIGHT - WEIGHT // 1024

_WORD = (1 << 64) - 1
_HALF_WORD = (1 << 32) - 1
_REQUESTS_MASK = (1 << 19) - 1
_WEIGHT_MASK = 2 * WEIGHT - 1
_CONNECTIONS_MASK = (1 << 24) - 1


@dataclass(frozen=True)
class View:
    """What the kernel program reads when a connection to one address arrives.

    Attributes:
        rows: the table's rows in use, slot 0 first.
        eligible: bit s: slot s is ready.
        selected: bit s: slot s passed the cascade's filters.
        allowed: bit s: slot s may serve this address; no bit at all allows every slot.
        policy: ``LEAST_LOADED`` or ``CASCADE``.
        threshold_ns: as for ``is_hung``.
        localities: number of locality groups.
    """

    rows: Sequence[Row]
    eligible: int
    selected: int
    allowed: int
    policy: int
    threshold_ns: int
    localities: int = 1

    @property
    def groups(self) -> int:
        """How many groups of 64 are in use."""
        return -(-len(self.rows) // SLOTS_PER_GROUP)

    @property
    def usable(self) -> int:
        """Bit s: slot s may be sent connections to this address."""
        all_slots = (1 << self.groups * SLOTS_PER_GROUP) - 1
        return self.eligible & (self.allowed & all_slots or all_slots)


def is_hung(busy_since_ns: int, now_ns: int, threshold_ns: int) -> bool:
    """Tell whether a loop that woke at ``busy_since_ns`` counts as hung.

    Args:
        busy_since_ns: CLOCK_MONOTONIC at which it left poll; 0 while it is there.
        now_ns: CLOCK_MONOTONIC.
        threshold_ns: 0, or more than the machine's uptime, means never.
    """
    return threshold_ns > 0 and 0 < busy_since_ns < now_ns - threshold_ns


def rescue_at(row: Row, rescue_after_ns: int, threshold_ns: int) -> int:
    """Return from when on siblings may take what waits for a worker.

    Args:
        row: of a worker to which more connections were sent than it took.
        rescue_after_ns: how long it may be busy before they help.
        threshold_ns: how long it may stay in poll although something waits; 0: for ever.

    Returns:
        CLOCK_MONOTONIC, or ``NEVER``; 0 is at once: nobody will take it, or the one who would has
        no room until a request is done.
    """
    if row.state not in (READY, DRAINING) or row.frozen_since_ns:
        return 0
    if is_full(row):
        return 0
    if not row.busy_since_ns:
        return row.last_dispatch_ns + threshold_ns if threshold_ns else NEVER
    return row.busy_since_ns + rescue_after_ns


def is_full(row: Row) -> bool:
    """Tell whether a worker runs as many requests as it can."""
    return row.requests * row.weight >= _FULL


def rank(row: Row) -> tuple[int, bool, int]:
    """Return the order of preference, lowest first: load, busy, connections.

    The load is in units of 2**-20 of the worker's capacity. Values that no worker
    publishes are cut to what fits, as in the kernel.
    """
    load = ((row.requests + row.queued) & _REQUESTS_MASK) * (row.weight & _WEIGHT_MASK)
    return load & (1 << 39) - 1, row.busy_since_ns > 0, row.connections & _CONNECTIONS_MASK


def select(
    live: Sequence[int], connections: Sequence[int], events: Sequence[int], theta: float
) -> int:
    """Filter workers by connections, then by events: the paper's Algorithm 1.

    A worker stays while it has fewer than the average of those left plus theta. The
    paper's first filter, by time, has happened: its ``now - t < threshold`` is
    ``not is_hung``, except that a worker in poll need not wake up to prove itself.

    Args:
        live: positions of the workers that do not hang.
        connections: by position, open connections (the paper's c_i).
        events: by position, events to handle (e_i): requests in flight or queued.
        theta: relative to the average (theta/Avg); at least 1 is used, or an idle
            server would leave nobody.

    Returns:
        The survivors, bit i for position i; at least one if any is live.
    """
    for values in (connections, events):
        if not live:
            break
        average = sum([values[i] for i in live]) / len(live)
        limit = average + max(theta * average, 1)
        live = [i for i in live if values[i] < limit]
    bits = 0
    for i in live:
        bits |= 1 << i
    return bits


def better(columns: Columns, slot: int, now_ns: int, threshold_ns: int) -> list[int]:
    """List the workers that should have a connection rather than the one who sees it.

    Args:
        columns: of the table, slot 0 first.
        slot: who sees it, and has room.
        now_ns: CLOCK_MONOTONIC.
        threshold_ns: as for ``is_hung``.

    Returns:
        The slots of live workers with less load, or as much and fewer connections.
    """
    own_load = columns.events[slot] * columns.weight[slot]
    own_connections = columns.connections[slot]
    lower = [
        other
        for other, (events, weight, connections) in enumerate(
            zip(columns.events, columns.weight, columns.connections, strict=True)
        )
        if (load := events * weight) < own_load
        or (load == own_load and connections < own_connections)
    ]
    return [other for other in lower if is_live(columns, other, now_ns, threshold_ns)]


def free_sibling(columns: Columns, slot: int, among: int) -> bool:
    """Tell whether a worker in poll has room, and less to do than the one that asks.

    Args:
        columns: of the table, slot 0 first.
        slot: who asks; the request that it is about to answer counts.
        among: bit s: slot s may serve what it is asked for.
    """
    own_load = columns.events[slot] * columns.weight[slot]
    return any(
        among >> other & 1
        and not columns.busy_since_ns[other]
        and events * weight < min(own_load, _FULL)
        and is_live(columns, other, 0, 0)
        for other, (events, weight) in enumerate(zip(columns.events, columns.weight, strict=True))
    )


def has_its_own(columns: Columns, slot: int, among: int) -> bool:
    """Tell whether the one connection of a worker has it to itself, as each of them could.

    To move it would only exchange workers.

    Args:
        columns: of the table, slot 0 first.
        slot: whose connection it is.
        among: bit s: slot s could serve it as well.
    """
    workers = among.bit_count() + 1
    return columns.connections[slot] <= 1 and sum(columns.connections) <= workers


def is_live(columns: Columns, slot: int, now_ns: int, threshold_ns: int) -> bool:
    """Tell whether a worker is ready and neither hung nor frozen."""
    return (
        columns.state[slot] == READY
        and not columns.frozen_since_ns[slot]
        and not is_hung(columns.busy_since_ns[slot], now_ns, threshold_ns)
    )


def locality(address: bytes, by: int, seed: int, localities: int) -> int:
    """Return the locality group of a connection.

    Args:
        address: the IP address that counts, 4 or 16 bytes; empty when the bind alone does.
        by: ``BY_BIND``, ``BY_DESTINATION`` or ``BY_CLIENT``.
        seed: 32 bits that tell the bind from others; not used for clients, who are to
            have the same group everywhere.
        localities: how many there are.
    """
    key = 0 if by == BY_CLIENT else seed
    for i in range(0, 16, 4):
        # As the kernel loads it: little-endian on the machines the object is built for.
        key = _mix(key ^ int.from_bytes(address[i : i + 4], "little"))
    return key * localities >> 32


def _mix(key: int) -> int:
    key ^= key >> 16
    key = key * 0x85EBCA6B & _HALF_WORD
    key ^= key >> 13
    key = key * 0xC2B2AE35 & _HALF_WORD
    return key ^ key >> 16


class Way(NamedTuple):
    """How the hash may go: the two groups it draws.

    Attributes:
        first: where the search begins.
        second: the other one.
        compare: whether that counts even when the first has somebody.
    """

    first: int
    second: int
    compare: bool


def ways(view: View, own: int | None = None) -> list[Way]:
    """Return the ways the hash may go, each as likely as the others.

    Args:
        view: what the program sees.
        own: the connection's locality group; None without such groups.
    """
    usable, groups = view.usable, view.groups
    local = range(own or 0, groups, max(view.localities, 1))
    result = []
    for first in local or [0]:
        # The hash draws the other one as well; without another of the locality it is
        # the next, and looked at only in need.
        start = _group_from(usable, first, groups)
        for other in [g for g in local if g != first] or [start + 1]:
            result.append(Way(start, _group_from(usable, other, groups), len(local) > 1))
    return result


def candidates(view: View, now_ns: int, own: int | None = None) -> list[set[int]]:
    """Return the slots a connection may be sent to, one set for each of ``ways``.

    Args:
        view: what the program sees.
        now_ns: CLOCK_MONOTONIC.
        own: the connection's locality group; None without such groups.

    Returns:
        Sets of which the hash picks one, then a member.
    """
    return [outcome(view, way, now_ns) for way in ways(view, own)]


def _group_from(usable: int, index: int, groups: int) -> int:
    """Return the first group from ``index`` on where somebody is usable."""
    around = [(index + i) % groups for i in range(groups)]
    return next((g for g in around if usable >> g * SLOTS_PER_GROUP & _WORD), around[-1])


def outcome(view: View, way: Way, now_ns: int) -> set[int]:
    """Return the slots of which the hash picks one, once it has drawn the groups."""
    usable = view.usable
    first, second, compare = way
    if view.policy == CASCADE:
        picks = usable & view.selected
        fit = {row.slot for row in _members(view, picks, first) if _is_fit(view, row, now_ns)}
        if len(fit) == (picks >> first * SLOTS_PER_GROUP & _WORD).bit_count() > 0:
            return fit
    else:
        fit = set()
    best = _best(view, usable, now_ns, first)
    if compare or not best:
        best = min(best, _best(view, usable, now_ns, second), key=_lowest)
    return fit | {row.slot for row in best} or {SHARED_SLOT}


def _members(view: View, bits: int, group: int) -> list[Row]:
    start = group * SLOTS_PER_GROUP
    return [row for row in view.rows[start : start + SLOTS_PER_GROUP] if bits >> row.slot & 1]


def _is_fit(view: View, row: Row, now_ns: int) -> bool:
    hung = is_hung(row.busy_since_ns, now_ns, view.threshold_ns) or row.frozen_since_ns
    return row.state == READY and not hung


def _best(view: View, usable: int, now_ns: int, group: int) -> list[Row]:
    healthy = [row for row in _members(view, usable, group) if _is_fit(view, row, now_ns)]
    lowest = min(map(rank, healthy), default=None)
    return [row for row in healthy if rank(row) == lowest]


def _lowest(rows: list[Row]) -> tuple[float, bool, int]:
    return rank(rows[0]) if rows else (float("inf"), True, 0)

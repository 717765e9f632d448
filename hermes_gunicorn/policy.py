"""Which worker gets a connection: the decision alone, as a model.

The kernel decides (``bpf/hermes.bpf.c``); this says the same in Python, for tests to
hold the two against each other and for people to read. Pure functions, no I/O.

Theory of operation. A connection should meet a worker that can turn to it at once.
Two things stand in the way: a worker may hang, and it may have other work.

*Hung* is a worker whose loop left poll and did not come back for longer than the
threshold. It is skipped. One that waits in poll is never hung, however long it waits.

The others are ranked, lowest first, by

1. load: requests in flight, a new connection's first one included, and connections
   that were sent to it and wait, for its capacity;
2. in poll before busy: of two with equal load, the idle one answers sooner;
3. open connections, so that kept-alive ones, which will send more, spread as well.

Queued connections are counted by the kernel itself as it sends them, so that a burst
within one scheduling interval sees its own effect. Ties are broken by the packet's
hash. Slots come in groups of 64; the hash picks one among those with eligible workers,
and only that is searched.

When nobody healthy is found the connection goes to slot 0, the listener all workers
share, where the first of them to come back takes it: no worse than one shared queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hermes_gunicorn.table import READY, SHARED_SLOT, SLOTS_PER_GROUP, Row

__all__ = ["candidates", "is_hung", "rank"]

_MASK = (1 << 64) - 1
_LOAD_MASK = (1 << 19) - 1
_LOAD_FRACTION_BITS = 20
_CONNECTIONS_MASK = (1 << 24) - 1


def is_hung(busy_since_ns: int, now_ns: int, threshold_ns: int) -> bool:
    """Tell whether a loop that woke at ``busy_since_ns`` counts as hung.

    Args:
        busy_since_ns: CLOCK_MONOTONIC at which it left poll; 0 while it is there.
        now_ns: CLOCK_MONOTONIC.
        threshold_ns: 0, or more than the machine's uptime, means never.
    """
    if not threshold_ns or threshold_ns >= now_ns:
        return False
    return 0 < busy_since_ns < now_ns - threshold_ns


def rank(row: Row) -> tuple[int, bool, int]:
    """Return the order of preference, lowest first: load, busy, connections.

    The load is in units of 2**-20 of the worker's capacity. Values that no worker
    publishes are cut to what fits, as in the kernel.
    """
    load = ((row.requests + row.queued) & _MASK & _LOAD_MASK) << _LOAD_FRACTION_BITS
    load = load // row.capacity if row.capacity else 0
    return load, row.busy_since_ns > 0, row.connections & _CONNECTIONS_MASK


def candidates(
    rows: Sequence[Row], eligible: int, now_ns: int, threshold_ns: int
) -> list[set[int]]:
    """Return the slots a connection may be sent to, for each group the hash may pick.

    Args:
        rows: the table's rows in use, slot 0 first.
        eligible: the bitmap, bit s for slot s.
        now_ns: CLOCK_MONOTONIC.
        threshold_ns: as for ``is_hung``.

    Returns:
        One set for each group that has eligible bits, or for the first group if there
        is none. The hash chooses the group, then the slot within the set; with slot 0
        in it, that is the only one.
    """
    # With one group in use the program does not look at the others.
    bits = eligible.bit_length() if len(rows) > SLOTS_PER_GROUP else SLOTS_PER_GROUP
    picked = [g for g in range(0, bits, SLOTS_PER_GROUP) if eligible >> g & _MASK] or [0]
    return [
        _best(
            (rows[s] for s in range(g, min(g + SLOTS_PER_GROUP, len(rows))) if eligible >> s & 1),
            now_ns,
            threshold_ns,
        )
        for g in picked
    ]


def _best(rows: Iterable[Row], now_ns: int, threshold_ns: int) -> set[int]:
    healthy = [
        row
        for row in rows
        if row.state == READY and not is_hung(row.busy_since_ns, now_ns, threshold_ns)
    ]
    if not healthy:
        return {SHARED_SLOT}
    lowest = min(map(rank, healthy))
    return {row.slot for row in healthy if rank(row) == lowest}

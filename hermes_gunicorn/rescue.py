"""Rescue: nothing waits on a worker that cannot turn to it.

Every worker holds every slot's listener, so any of them can accept what waits there;
``accept`` decides who gets it. A worker looks at the table when it is about to go idle,
and on a timer of its own, and takes what waits for a sibling that hangs, is busy for
too long, has no room, is frozen or gone (``policy.rescue_at``).

The timers are slow while all is well: each worker has one, so they are spread, and the
more workers there are the slower is each. They tick while somebody waits for help, and
back off while nothing is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any, Final

from hermes_gunicorn import policy
from hermes_gunicorn.listener import waiting
from hermes_gunicorn.table import SHARED_SLOT, Publisher

__all__ = ["Rescuer"]

_MS: Final = 1_000_000
_TICK_NS: Final = _MS  # for all workers together, while somebody waits for help
_LOOK_NS: Final = 10 * _MS  # for all together, else; the hang threshold if that is longer
_LONGEST_NS: Final = 1000 * _MS
_HANDSHAKE_NS: Final = 1000 * _MS  # what was sent to a worker may arrive so much later
_AT_A_TIME: Final = 4  # so that those who look next have their share


class Rescuer:
    """Looks after a worker's siblings.

    Args:
        publisher: the worker's pen.
        rescue_after_ns: how long a sibling may be busy before others help.
        siblings: for each other slot its listeners, each with the index of the bind address
            it belongs to.
        take: accepts a connection from such a listener, and says if there was one.
        room: whether the worker could serve one more.
    """

    def __init__(
        self,
        publisher: Publisher,
        rescue_after_ns: int,
        siblings: Mapping[int, Sequence[tuple[int, Any]]],
        take: Callable[[int, Any], bool],
        room: Callable[[], bool],
    ) -> None:
        self._publisher = publisher
        self._table = publisher.table
        self._rescue_after_ns = rescue_after_ns
        self._siblings = siblings
        self._take = take
        self._room = room
        self._quiet = 1  # grows while nothing happens
        self._sent = 0

    def look(self) -> int:
        """Take what waits on siblings that need help.

        Returns:
            In how many nanoseconds to look again.
        """
        queues = self._table.queues()
        if not queues or not self._siblings:
            return self._period()
        self._quiet = 1
        now = monotonic_ns()
        wanted = now + self._period()
        tick = _TICK_NS * self._workers()
        for slot in queues:
            if slot in (SHARED_SLOT, self._publisher.slot) or slot not in self._siblings:
                continue
            row = self._table.row(slot)
            # Emptied, and what was sent there has had the time to arrive.
            if row.rescued_at_ns > row.last_dispatch_ns and (
                now - row.last_dispatch_ns > _HANDSHAKE_NS
            ):
                continue
            due = policy.rescue_at(row, self._rescue_after_ns, self._table.hang_threshold_ns)
            if due > now:
                wanted = min(wanted, due)
                continue
            wanted = min(wanted, now + tick)
            if due and policy.is_hung(row.busy_since_ns, now, self._table.hang_threshold_ns):
                due = 0
            # One that is merely busy may still be the best.
            own = self._table.row(self._publisher.slot)
            if due and row.busy_since_ns and policy.rank(own) >= policy.rank(row):
                continue
            if due and not row.busy_since_ns:
                # It could take what waits, and does not. The accept queue is the proof:
                # a handshake that does not complete is nothing that waits.
                if not any(waiting(listener) for _, listener in self._siblings[slot]):
                    continue
                self._table.mark_frozen(slot, now)
            self._help(slot, now)
        return max(wanted - now, _TICK_NS)

    def _help(self, slot: int, now: int) -> None:
        taken = 0
        for index, listener in self._siblings[slot]:
            while taken < _AT_A_TIME and self._room() and self._take(index, listener):
                self._publisher.rescued()
                taken += 1
        if taken < _AT_A_TIME and self._room():
            self._table.mark_rescued(slot, now)  # nothing is left there

    def _workers(self) -> int:
        return max(self._table.eligible().bit_count(), 1)

    def _period(self) -> int:
        sent = self._table.sent()
        self._quiet = 1 if sent != self._sent else self._quiet * 2
        self._sent = sent
        base = max(_LOOK_NS, self._table.hang_threshold_ns) * self._workers()
        return min(base * self._quiet, _LONGEST_NS)

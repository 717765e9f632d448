"""Shared mode: one listener for all workers, as in stock gunicorn, admission by the table.

Where the kernel cannot choose (a Unix socket, no permission, no eBPF), a worker that
sees a connection asks whether another one should have it: by the same order of
preference, from the same table. If so it sleeps for a moment and looks again. Nobody
spins, and nobody waits for a worker that does not come: one that is busy has a moment,
one that seems to be in poll has a few and then counts as frozen. The most preferable
live worker takes a connection at once, so one is always taken.
"""

from __future__ import annotations

import select
import sys
from time import monotonic_ns
from typing import Any, Final

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.layout import CASCADE
from hermes_gunicorn.core.row import Publisher

__all__ = ["PAUSE", "Admission"]

PAUSE: Final = 0.002  # seconds for which a connection is left to others
_PATIENCE: Final = 5  # pauses


def _poll() -> Any:
    # gevent's own would switch greenlets, even without a timeout.
    monkey = sys.modules.get("gevent.monkey")
    return monkey.get_original("select", "poll")() if monkey else select.poll()


class Admission:
    """Says whether a worker may accept from a listener that all share.

    Args:
        publisher: the worker's pen.
        bind: who may serve the address.
        listener: a socket, not blocking.
    """

    def __init__(self, publisher: Publisher, bind: Bind, listener: Any) -> None:
        self._publisher = publisher
        self._bind = bind
        self._poll = _poll()
        self._poll.register(listener.fileno(), select.POLLIN)
        self._pauses = 0
        self._until = 0

    def admits(self) -> bool:
        """Tell whether to accept what waits; if not, not before the pause is over."""
        drained = self._publisher.drained
        # A moment is enough for those who have something else to do.
        better = self._better(only_in_poll=self._pauses > 0 and not drained)
        if better and (drained or self._pauses < _PATIENCE):
            self._pauses += 1
            self._until = monotonic_ns() + round(PAUSE * 1e9)
            return False
        now = monotonic_ns()
        for slot in better:
            self._publisher.table.mark_frozen(slot, now)
        self._pauses = 0
        return True

    def until(self) -> float:
        """Return for how many seconds to leave the listener alone; 0 is not at all."""
        if not self._until:
            return 0.0
        left = self._until - monotonic_ns()
        if left > 0:
            return left / 1e9
        self._until = 0
        if not self._poll.poll(0):
            self._pauses = 0  # somebody has taken it
        return 0.0

    def _better(self, only_in_poll: bool) -> list[int]:
        table, slot = self._publisher.table, self._publisher.slot
        columns = table.group(0, max(table.in_use, slot + 1))
        now, threshold_ns = monotonic_ns(), table.hang_threshold_ns
        if self._publisher.drained:
            others = range(len(columns.state))
            better = [
                other for other in others if policy.is_live(columns, other, now, threshold_ns)
            ]
        elif table.policy == CASCADE:
            selected = table.selected()
            better = [
                other
                for other in range(len(columns.state))
                if selected >> other & ~selected >> slot & 1
                and policy.is_live(columns, other, now, threshold_ns)
            ]
        else:
            better = policy.better(columns, slot, now, threshold_ns)
        return [
            other
            for other in better
            if self._bind.allows(other) and not (only_in_poll and columns.busy_since_ns[other])
        ]

"""Stage 1 of the cascade: the workers' own filter, run for all by whoever is awake.

The paper runs it at the end of each turn of a loop that handled events. In Python a
scan over all workers at that rate would cost more than the requests, so the workers
share one clock: whichever ends a turn first, once the interval is over, scans for
all. The scan reads whole columns of the table, O(n) with a small constant.
"""

from __future__ import annotations

from typing import Final

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import CASCADE, SLOTS_PER_GROUP
from hermes_gunicorn.core.table import Table

__all__ = ["INTERVAL_NS", "Scheduler"]

INTERVAL_NS: Final = 5_000_000  # the paper's loops time out as often


class Scheduler:
    """Keeps the selection of all workers fresh while the policy is ``cascade``."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __call__(self, now_ns: int) -> int:
        """Run stage 1 if it is due.

        Args:
            now_ns: CLOCK_MONOTONIC, or a little before it.

        Returns:
            When to ask again.
        """
        table = self._table
        if table.policy == CASCADE:
            elapsed = now_ns - table.scheduled_ns
            if 0 <= elapsed < INTERVAL_NS:
                return now_ns - elapsed + INTERVAL_NS
            table.scheduled_ns = now_ns
            self.run(now_ns)
        return now_ns + INTERVAL_NS

    def run(self, now_ns: int) -> None:
        """Filter each group of 64, by averages of its own as in the paper."""
        table = self._table
        threshold_ns, theta = table.hang_threshold_ns, table.theta
        slots = table.in_use
        for first in range(0, slots, SLOTS_PER_GROUP):
            group = table.group(first, min(first + SLOTS_PER_GROUP, slots))
            live = [
                i for i in range(len(group.state)) if policy.is_live(group, i, now_ns, threshold_ns)
            ]
            table.select(
                first // SLOTS_PER_GROUP,
                policy.select(live, group.connections, group.events, theta),
            )

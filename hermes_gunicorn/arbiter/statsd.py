"""What gunicorn's statsd logger (``--statsd-host``) is told besides gunicorn's own metrics.

By the arbiter, once a second: it has the logger, and lives as long as the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import Logger
from time import monotonic, monotonic_ns
from typing import Any

from gunicorn.instrument.statsd import Statsd

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.layout import READY
from hermes_gunicorn.core.table import Table

__all__ = ["Reporter"]


class Reporter:
    """Sends metrics of a table; ``hermes.`` stands before their names.

    Gauges: ``workers.hung``, ``requests``, ``connections.open``, ``connections.queued``.
    Counters: ``connections.dispatched``, ``connections.rescued``, ``connections.no_worker``.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._told: dict[str, int] = {}
        self._next = 0.0

    def report(self, log: Logger | Any, binds: Iterable[Bind], queued: Callable[[], int]) -> None:
        """Send all, if the logger is for statsd and a second has passed.

        Args:
            log: gunicorn's logger.
            binds: what the table holds for each address.
            queued: counts the connections that wait on all listeners.
        """
        if not isinstance(log, Statsd) or monotonic() < self._next:
            return
        self._next = monotonic() + 1
        rows, now = self._table.rows()[1:], monotonic_ns()
        ready = [row for row in rows if row.state == READY]
        threshold_ns = self._table.hang_threshold_ns
        hung = sum(
            policy.is_hung(row.busy_since_ns, now, threshold_ns) or row.frozen_since_ns > 0
            for row in ready
        )
        # Not by log.info, which drops a gauge of 0 before gunicorn 24.
        log.gauge("hermes.workers.hung", hung)
        log.gauge("hermes.requests", sum(row.requests for row in ready))
        log.gauge("hermes.connections.open", sum(row.connections for row in ready))
        log.gauge("hermes.connections.queued", queued())
        counters = {
            "dispatched": sum(row.dispatched for row in rows),
            "rescued": sum(row.rescued for row in rows),
            "no_worker": sum(bind.counters()["none_eligible"] for bind in binds),
        }
        for name, count in counters.items():
            # A slot's next owner begins to count anew.
            if (more := count - self._told.get(name, 0)) > 0:
                log.increment(f"hermes.connections.{name}", more)
            self._told[name] = count

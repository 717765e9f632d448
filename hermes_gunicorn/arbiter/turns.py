"""What the arbiter does about once a second, beside gunicorn's own work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter

__all__ = ["Turns"]

_AT_LEAST: Final = 0.5  # seconds between two turns


class Turns:
    """Has things called about once a second for as long as the arbiter has listeners.

    Its loop turns every second, but not in a reload: there it waits for the old workers, up to
    ``graceful_timeout``, and only reaps them. So this goes with two methods of the arbiter.

    Args:
        server: gunicorn's arbiter.
    """

    def __init__(self, server: Arbiter) -> None:
        self._server = server
        self._calls: list[Callable[[], None]] = []
        self._failing: set[str] = set()
        self._due = 0.0
        server.murder_workers = self._then_turn(server.murder_workers)
        server.reap_workers = self._then_turn(server.reap_workers)

    def add(self, *calls: Callable[[], None]) -> None:
        """Have these called as well, in this order."""
        self._calls += calls

    def _then_turn(self, method: Callable[[], None]) -> Callable[[], None]:
        def method_and_turn() -> None:
            method()
            self._turn()

        return method_and_turn

    def _turn(self) -> None:
        server = self._server
        # A child gets here by a signal that comes before it has its own handlers.
        if time.monotonic() < self._due or not server.LISTENERS or os.getpid() != server.pid:
            return
        self._due = time.monotonic() + _AT_LEAST
        for call in self._calls:
            self.call_safely(call)

    def call_safely(self, call: Callable[[], None]) -> None:
        """Call it now; an error is logged, and no more until it works again."""
        name = call.__name__
        try:
            call()
            self._failing.discard(name)
        except Exception:
            if name not in self._failing:
                self._server.log.exception(
                    "hermes: error in %s; traffic is not affected, trying again every second", name
                )
            self._failing.add(name)

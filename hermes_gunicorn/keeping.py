"""Whether connections are worth keeping: a kept one ties its next request to this worker.

The kernel chooses a worker for a connection, not for a request. Where requests hold a worker
for long, one that comes on a kept connection waits for them, though a sibling may be idle;
on a new connection it would go there. So while the expected wait is longer than a new
connection takes, and a request much longer than that, responses close their connection.

Not where it is cores that are short: then siblings are no faster, and a connection costs
what is short. For the same reason workers do not look after each other at every turn then.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

__all__ = ["Keeping", "waited_for_cores"]

_CONNECTS_NS: Final = 500_000  # a new connection, for the client, with its place in the queue
_LONG_NS: Final = 2_000_000  # a request; a connection costs both ends a tenth of this
_SHORT_OF_CORES: Final = 0.2  # of the time for which requests hold the worker
_STARVED: Final = 0.1  # of all the time
_REMEMBERED: Final = 0.8  # of what was, each second
_SECOND_NS: Final = 1_000_000_000


def waited_for_cores() -> int:
    """Sum for how many nanoseconds this process's threads wanted a core and had none.

    Returns:
        The second number of ``/proc/self/task/*/schedstat``, of all; 0 where there is none.
    """
    total = 0
    with contextlib.suppress(OSError):  # other systems
        for task in os.listdir("/proc/self/task"):
            with (
                contextlib.suppress(OSError, ValueError, IndexError),  # it has just ended
                open(f"/proc/self/task/{task}/schedstat", "rb") as file,
            ):
                total += int(file.read().split()[1])
    return total


class Keeping:
    """Follows how long requests hold a worker.

    Args:
        always: keep whatever happens.

    Attributes:
        short_of_cores: what seemed to hold it was in good part waiting for a core.
        starved: and that is a good part of its time. A sibling that is late then is late
            for the same reason, most likely, and help would come no sooner.
    """

    short_of_cores = False
    starved = False

    def __init__(self, always: bool) -> None:
        self._always = always
        self._requests = 0.0
        self._time_ns = 0.0
        self._held_ns = 0.0
        self._squares = 0.0
        self._waited_ns = 0.0
        self._waited_before = 0
        self._close = False

    def start(self, waited_ns: int) -> None:
        """Forget what was waited for cores until now, by ``waited_for_cores()``: to boot."""
        self._waited_before = waited_ns

    def closes(self) -> bool:
        """Count a request; say whether to close its connection after it."""
        self._requests += 1
        return self._close

    def held(self, ns: int) -> None:
        """Nothing else could be served for so many nanoseconds."""
        self._held_ns += ns
        self._squares += ns * ns

    def weigh(self, elapsed_ns: float, waited_ns: int, alone: bool = False) -> bool:
        """Decide anew.

        Args:
            elapsed_ns: nanoseconds since the last time, a second or less.
            waited_ns: ``waited_for_cores()``.
            alone: there is no sibling that could serve the next request.

        Returns:
            Whether connections are closed from now on.
        """
        self._time_ns += elapsed_ns
        self._waited_ns += max(waited_ns - self._waited_before, 0)  # less when a thread ended
        self._waited_before = waited_ns
        # What comes at a random time into holds h waits for the sum of h * h / 2 over the time.
        waits = self._squares > 2 * max(self._time_ns, _SECOND_NS) * _CONNECTS_NS
        long = self._held_ns > self._requests * _LONG_NS
        self.short_of_cores = self._waited_ns > self._held_ns * _SHORT_OF_CORES
        self.starved = self.short_of_cores and self._waited_ns > self._time_ns * _STARVED
        self._close = waits and long and not (self.short_of_cores or alone or self._always)
        remembered = _REMEMBERED ** (elapsed_ns / _SECOND_NS)
        self._requests *= remembered
        self._time_ns *= remembered
        self._held_ns *= remembered
        self._squares *= remembered
        self._waited_ns *= remembered
        return self._close

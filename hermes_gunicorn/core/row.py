"""One row of the worker status table, and the worker that writes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic_ns
from typing import Final

from hermes_gunicorn.core.layout import (
    BOOTING,
    DEAD,
    DRAINING,
    MAX_QUEUED,
    READY,
    SHARED_SLOT,
    TRANSITIONS,
    WEIGHT,
    WORD_MASK,
    WORKER,
)
from hermes_gunicorn.core.table import Table

__all__ = ["Publisher"]

_WEIGHT: Final = WORKER.index("weight")
_BUSY_SINCE: Final = WORKER.index("busy_since_ns")
_REQUESTS: Final = WORKER.index("requests")
_CONNECTIONS: Final = WORKER.index("connections")
_CAPACITY: Final = WORKER.index("capacity")
_SETTLED: Final = WORKER.index("settled")
_ACCEPTED: Final = WORKER.index("accepted")
_DISPATCHED: Final = WORKER.index("dispatched")
_LAST_DISPATCH: Final = WORKER.index("last_dispatch_ns")
_FROZEN: Final = WORKER.index("frozen_since_ns")
_RESCUED: Final = WORKER.index("rescued")
_RESCUED_AT: Final = WORKER.index("rescued_at_ns")
_PID: Final = WORKER.index("pid")
_DRAINED: Final = WORKER.index("drained")

_PERIOD_NS: Final = 100_000_000
_PERIODS: Final = 11  # all but the current one are the second that a handshake may take


class _RecentMinimum:
    """The lowest value of a number over the last second, or a little more.

    Between two looks the number must not fall. It is zero before the first.
    """

    def __init__(self) -> None:
        self._lows = [0] * _PERIODS
        self._period = 0
        self._last = 0

    def see(self, value: int, now_ns: int) -> int:
        """Take a value, and return the lowest."""
        passed = min(now_ns // _PERIOD_NS - self._period, _PERIODS)
        if passed:
            self._lows = self._lows[passed:] + [self._last] * passed
            self._period = now_ns // _PERIOD_NS
        self._last = value
        if value < self._lows[-1]:
            self._lows[-1] = value
        return min(self._lows) if value else 0

    def shift(self, by: int) -> None:
        """Take all values as they would be without so many."""
        self._lows = [low - by for low in self._lows]
        self._last -= by


class Publisher:
    """A worker's pen: writes the words of its own row.

    The methods up to ``settle`` are the hot path: a few memory stores each. A
    child that the application forks keeps the mapping but must not speak for the
    worker, so it is given a row of its own that nobody reads.

    Args:
        table: the table.
        slot: the row.

    Attributes:
        turn: when the loop woke last, CLOCK_MONOTONIC in nanoseconds.
        accepted: connections taken from the slot's own listeners.
    """

    def __init__(self, table: Table, slot: int) -> None:
        self.table = table
        self.turn = 0
        self._turned: Callable[[int], int] = lambda woke_ns: WORD_MASK
        self._turned_at = 0
        self.slot = slot
        self.connections = 0
        self.requests = 0
        start = slot * WORKER.words
        self._words = table._rows[start : start + WORKER.words]
        self._settled = self._words[_SETTLED]
        self.accepted = 0
        self._overdue = _RecentMinimum()  # of what is queued
        self._capacity = 1
        self._state = BOOTING
        self._pid = self._words[_PID] = os.getpid()
        os.register_at_fork(after_in_child=self._disown)

    @classmethod
    def unseen(cls) -> Publisher:
        """Make a pen for a row that nobody reads, for a worker without a slot."""
        return cls(Table.private(), SHARED_SLOT)

    def _disown(self) -> None:
        self.table = Table.private()
        self.slot = 0
        self._words = self.table._rows
        self._turned_at = WORD_MASK

    def at_turn(self, call: Callable[[int], int]) -> None:
        """Have something called at the end of a turn of the loop that had work.

        Args:
            call: takes when the loop woke, CLOCK_MONOTONIC in nanoseconds, and returns
                the earliest such time at which it wants to be called again.
        """
        self._turned = call
        self._turned_at = 0
        self.turn = self.turn or monotonic_ns()  # the loop may not have been in poll yet

    def woke(self) -> None:
        """The loop has left poll with work to do."""
        self._words[_BUSY_SINCE] = self.turn = monotonic_ns()
        self._words[_FROZEN] = 0

    def turns(self) -> None:
        """The loop has left poll, for something that may not count as work."""
        self._words[_FROZEN] = 0

    def polls(self) -> None:
        """The loop is about to wait in poll."""
        # By the end of the turn: the one that took long began soon after another, often.
        if monotonic_ns() >= self._turned_at:
            self._turned_at = self._turned(self.turn)
        self._words[_BUSY_SINCE] = 0

    def opened(self, own: bool, requests: int = 1) -> None:
        """A connection was accepted; its first request counts as in flight from here.

        Were it counted only when it arrives, a worker that accepts quickly would look
        idle and be sent a whole burst before a sibling has been scheduled at all.

        Args:
            own: taken from the slot's own listener, not from the shared one.
            requests: 0 if its first request is counted by ``began``.
        """
        self.connections += 1
        self.requests += requests
        self._words[_CONNECTIONS] = self.connections
        self._words[_REQUESTS] = self.requests
        if own:
            self.accepted += 1
            self._settled += 1
            self._words[_ACCEPTED] = self.accepted
            # Last, so that the connection is at no time on neither account.
            self._words[_SETTLED] = self._settled & WORD_MASK

    def closed(self) -> None:
        """A connection was closed."""
        if self.connections:  # a miscount is no reason for a worker to die
            self.connections -= 1
            self._words[_CONNECTIONS] = self.connections

    def began(self) -> None:
        """A further request on a connection is in flight."""
        self.requests += 1
        self._words[_REQUESTS] = self.requests

    def ended(self) -> None:
        """A request is done, or the first one never came."""
        if self.requests:
            self.requests -= 1
            self._words[_REQUESTS] = self.requests

    def rescued(self) -> None:
        """A connection was taken from a sibling's listener."""
        self._words[_RESCUED] = (self._words[_RESCUED] + 1) & WORD_MASK

    @property
    def drained(self) -> bool:
        """Whether this worker is to leave what comes to others."""
        return self._words[_DRAINED] == 1

    @property
    def lost(self) -> bool:
        """Whether siblings have taken what waited here since the last dispatch."""
        return self._words[_RESCUED_AT] > self._words[_LAST_DISPATCH]

    @property
    def queued(self) -> int:
        """Connections the kernel sent here that were not taken yet."""
        return self.table.row(self.slot).queued

    @property
    def drifted(self) -> bool:
        """Whether more or fewer connections were taken than were sent here."""
        return self._words[_DISPATCHED] != self._settled & WORD_MASK

    @property
    def expects(self) -> bool:
        """Whether something that the kernel sent here lately may still be on its way."""
        ahead = self._ahead()
        return 0 < ahead <= MAX_QUEUED and ahead > self._overdue.see(ahead, monotonic_ns())

    def _ahead(self) -> int:
        return (self._words[_DISPATCHED] - self._settled) & WORD_MASK

    def has_overdue(self) -> bool:
        """Tell whether some of what was sent here has not come for a second.

        A dispatch is booked at the SYN. Scanners and half-open health checks send nothing
        more. What was queued at all times within a second is theirs, or siblings have
        taken it, or it waits to be accepted. A handshake rarely takes that long, and what comes
        later all the same is put right when it does.

        To be called at the end of a turn, when what could be accepted has been.
        """
        return self._overdue.see(self._ahead(), monotonic_ns()) > 0

    def settle(self, quiet_ns: int, waiting: int = 0) -> None:
        """Write off what was sent here and never became acceptable.

        A dispatch is booked at the SYN and can be accepted a round trip later, so only
        what is overdue is written off, and all when no connection was sent here for
        ``quiet_ns`` nanoseconds. Taken without having been booked (SYN cookies) is put
        right at once, and so is what siblings took.

        Args:
            quiet_ns: see above.
            waiting: connections that wait to be accepted.
        """
        ahead, now = self._ahead(), monotonic_ns()
        # A dispatch in the future is none: someone has scribbled over the row.
        quiet = not 0 <= now - self._words[_LAST_DISPATCH] < quiet_ns
        never_came = ahead - waiting
        if quiet or ahead > MAX_QUEUED or self.lost:
            self._overdue = _RecentMinimum()
        else:
            never_came = self._overdue.see(max(never_came, 0), now)
            self._overdue.shift(never_came)
        if never_came:
            self._settled = (self._settled + never_came) & WORD_MASK
            self._words[_SETTLED] = self._settled

    def ready(self, capacity: int) -> None:
        """Accept from now on; up to ``capacity`` requests at once."""
        self._capacity = min(max(capacity, 1), WEIGHT)
        self._enter(READY)

    def refresh(self) -> None:
        """Publish anew all that stays as it is, should someone have scribbled over it."""
        self._words[_PID] = self._pid
        self._words[_FROZEN] = 0  # the loop turns, for it calls this
        if self._words[_RESCUED_AT] > monotonic_ns():
            self._words[_RESCUED_AT] = 0
        if self._words[_DRAINED] > 1:
            self._words[_DRAINED] = 0
        self._words[_CAPACITY] = self._capacity
        self._words[_WEIGHT] = WEIGHT // self._capacity
        self._words[_CONNECTIONS] = self.connections
        self._words[_REQUESTS] = self.requests
        self._words[_SETTLED] = self._settled & WORD_MASK
        self.table.set_state(self.slot, self._state)

    def draining(self) -> None:
        """Take no more; what was sent here already is still accepted."""
        self._enter(DRAINING)

    def dead(self) -> None:
        """The process is about to end."""
        self._enter(DEAD)

    def _enter(self, state: int) -> None:
        """Change to a state, unless that would be a step back: who drains stays so."""
        if state in TRANSITIONS[self._state]:
            self._state = state
        self.refresh()

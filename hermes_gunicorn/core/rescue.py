"""Rescue: nothing waits on a worker that cannot turn to it.

Every worker holds every slot's listener, so any of them can accept what waits there;
``accept`` decides who gets it. A worker looks at the table when it is about to go idle,
and takes what waits for a sibling that hangs, is busy for too long, has no room, is
frozen or gone (``policy.rescue_at``).

A worker whose requests hold the loop, as those of a driver that does not yield, looks at
the end of each turn, and takes one connection: what it has accepted nobody else can serve.
For all others one look every 10 ms is enough, so they share a clock: whoever looks says in
the table when that is to happen again.

For the case that no loop turns each worker has a timer, of a phase of its own, so that
their turns are evenly spread and the more there are the fewer each has. It obeys when it
is known who will need help soon, and ticks fast while somebody waits for help, unless all
are late for want of cores, which looks would only make worse. It slows down while nothing
is dispatched, and in a worker that goes to sleep without a request while nothing waits,
under the policy that prefers idle ones: as long as it sleeps, what comes wakes it or
another idle one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any, Final

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.layout import LEAST_LOADED, Row
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.socket_info import waiting

__all__ = ["Rescuer"]

_MS: Final = 1_000_000
_TICK_NS: Final = _MS  # between looks while somebody waits for help
_LOOK_NS: Final = 10 * _MS  # between looks else
_IDLE_NS: Final = 50 * _MS  # between looks by workers without a request
_LONGEST_NS: Final = 1000 * _MS  # between one worker's looks
_HANDSHAKE_NS: Final = 1000 * _MS  # what was sent to a worker may arrive so much later
_AT_A_TIME: Final = 4  # so that those who look next have their share


def _waits_since(row: Row) -> int:
    return row.last_dispatch_ns


def _retry_at(row: Row, now: int) -> int:
    """Return when to try again where siblings took all they found; 0 where they did not."""
    # In the future is nonsense that somebody has scribbled there.
    if not row.last_dispatch_ns < row.rescued_at_ns <= now:
        return 0
    # A handshake takes a round trip, which may be short or long: each try doubles the time.
    emptied_after = row.rescued_at_ns - row.last_dispatch_ns
    return row.last_dispatch_ns + max(2 * emptied_after, _LOOK_NS)


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
        self._relaxed = False  # sleeps longer, as long as nothing waits
        self._sent = 0
        self._taken = 0
        self.next_ns = 0

    def look(self, one: bool, patient: bool = False) -> None:
        """Take what waits on siblings that need help; say in ``next_ns`` when to come again.

        Args:
            one: a request holds the worker. Then one connection is taken at a look, of those
                that wait longest, and looks are as frequent as requests.
            patient: who waits for help has a look no sooner than others, as cores are short.
        """
        now = monotonic_ns()
        tick = _LOOK_NS if patient and not one else _TICK_NS
        # Further ahead than it is ever set is nonsense that somebody has scribbled there.
        recently = 0 < self._table.look_at_ns - now <= _LOOK_NS
        asleep = self._relaxed and self._publisher.requests
        if recently and now < self.next_ns and not one and not asleep:
            return  # as nearly always: whoever looked has seen to it
        rows = self._waiting(now)
        busy = bool(rows or self._publisher.requests)
        if self.next_ns <= now or (busy and self._relaxed):
            self._plan(now, busy)
        if not rows or (recently and not one):
            if not recently:
                self._table.look_at_ns = now + _LOOK_NS
            return
        if one:
            rows.sort(key=_waits_since)
        wanted, taken = now + _LOOK_NS, self._taken
        for row in rows:
            due = self._help_if_due(row, now, 1 if one else _AT_A_TIME)
            wanted = min(wanted, max(due, now + tick))
            if due <= now:  # each has its tick while help is needed
                self.next_ns = min(self.next_ns, now + self._round(tick))
            # One that has just woken up most likely accepts it, unless a request holds it.
            elif one or 0 < row.busy_since_ns < now - tick:
                self.next_ns = min(self.next_ns, due)
            if one and self._taken != taken:
                self.next_ns = now  # after what waits for this worker itself
                break
        self._table.look_at_ns = wanted

    def _waiting(self, now: int) -> list[Row]:
        """Read the rows of those siblings on which connections wait."""
        rows = [self._table.row(slot) for slot in self._table.queues() if slot in self._siblings]
        return [
            row
            for row in rows
            # Unless emptied, and what was sent there has had the time to arrive.
            if row.rescued_at_ns <= row.last_dispatch_ns
            or now - row.last_dispatch_ns <= _HANDSHAKE_NS
        ]

    def _plan(self, now: int, busy: bool) -> None:
        """Choose this worker's next turn: those of equal length follow each other."""
        sent = self._table.sent()
        self._quiet = 1 if sent != self._sent else min(2 * self._quiet, _LONGEST_NS // _LOOK_NS)
        self._sent = sent
        eligible = self._table.eligible()
        self._relaxed = not busy and self._table.policy == LEAST_LOADED
        pace = _IDLE_NS if self._relaxed else _LOOK_NS
        workers = max(eligible.bit_count(), 1)
        length = min(pace * self._quiet * workers, _LONGEST_NS)
        before = (eligible & (1 << self._publisher.slot) - 1).bit_count()
        phase = before * length // workers
        self.next_ns = now + length - (now - phase) % length

    def _help_if_due(self, row: Row, now: int, most: int) -> int:
        """Help the owner of a slot on which connections wait; return when to look again."""
        slot = row.slot
        threshold_ns = self._table.hang_threshold_ns
        due = policy.rescue_at(row, self._rescue_after_ns, threshold_ns)
        not_before = max(due, _retry_at(row, now))
        if not_before > now:
            return not_before
        if due and policy.is_hung(row.busy_since_ns, now, threshold_ns):
            due = 0
        if due and row.busy_since_ns:
            # One that is merely busy may still be the best.
            if policy.rank(self._table.row(self._publisher.slot)) >= policy.rank(row):
                return now
        elif due:
            # It could take what waits, and does not. The accept queue is the proof: a
            # handshake that does not complete is nothing that waits.
            if not self._waits_on(slot):
                return now
            self._table.mark_frozen(slot, now)
        self._help(slot, now, most)
        return now

    def _help(self, slot: int, now: int, most: int) -> None:
        before, enough = self._taken, self._taken + most
        for index, listener in self._siblings[slot]:
            while self._taken < enough and self._room() and self._take(index, listener):
                self._publisher.rescued()
                self._taken += 1
        found_none = self._taken < enough and self._room()
        if found_none or (self._taken > before and not self._waits_on(slot)):
            self._table.mark_rescued(slot, now)  # nothing is left there

    def _waits_on(self, slot: int) -> bool:
        return any(waiting(listener) for _, listener in self._siblings[slot])

    def _round(self, pace: int) -> int:
        """Return how long it takes at that pace until each worker had a turn."""
        return min(pace * max(self._table.eligible().bit_count(), 1), _LONGEST_NS)

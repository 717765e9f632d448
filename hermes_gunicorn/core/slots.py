"""Who sits where: slots for workers, and seats that make shares of them stable.

Pure bookkeeping, no I/O.

A **slot** is a row of the table. Slots come in groups of 64, which the kernel program
searches one or two at a time, so workers are spread over no more groups than needed,
evenly. Locality group L is made of the groups g with ``g % localities == L``.

A **seat** is a worker's place among its equals, 0 to workers - 1. A share of the
workers is a range of seats. A replacement takes the seat of the one it replaces, also
while both live, so the share stays the same through restarts, whatever the slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hermes_gunicorn.core.layout import SHARED_SLOT, SLOTS_PER_GROUP

__all__ = ["Slots"]


class Slots:
    """The slots of one arbiter's workers.

    Args:
        capacity: rows of the table, the shared slot 0 included.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._owners: dict[int, object] = {}
        self._seats: dict[int, int] = {}

    def owned(self) -> dict[int, object]:
        """Return the owners by slot."""
        return dict(self._owners)

    def take(
        self, owner: object, workers: int, localities: int, waiting: Callable[[int], int]
    ) -> int | None:
        """Give a worker a slot and a seat.

        Args:
            owner: the worker.
            workers: how many there are to be.
            localities: number of locality groups.
            waiting: counts the connections left on a slot's listeners; where some wait,
                an owner is needed first.

        Returns:
            The slot; None when all are taken.
        """
        population = Counter(slot // SLOTS_PER_GROUP for slot in self._owners)
        per_locality = -(-workers // localities)
        # One more, as group 0 has the shared slot.
        groups = localities * (per_locality // SLOTS_PER_GROUP + 1)

        def preference(slot: int) -> tuple[int, int, int, int]:
            group = slot // SLOTS_PER_GROUP
            return -waiting(slot), group // groups, population[group], slot

        free = [s for s in range(SHARED_SLOT + 1, self.capacity) if s not in self._owners]
        if not free:
            return None
        slot = min(free, key=preference)
        self._owners[slot] = owner
        holders = Counter(self._seats.values())
        self._seats[slot] = min(range(max(workers, 1)), key=lambda seat: (holders[seat], seat))
        return slot

    def preview(self, count: int, workers: int, localities: int) -> list[int]:
        """Return the slots that so many more workers would get."""
        other = Slots(self.capacity)
        other._owners = dict(self._owners)
        taken = (other.take(object(), workers, localities, lambda slot: 0) for _ in range(count))
        return [slot for slot in taken if slot is not None]

    def give_back(self, slot: int, workers: int) -> None:
        """Free a slot; when the server has shrunk, close the gap that leaves."""
        del self._owners[slot]
        del self._seats[slot]
        held = set(self._seats.values())
        gaps = [seat for seat in range(workers) if seat not in held]
        for other, seat in self._seats.items():
            if gaps and seat >= workers:
                self._seats[other] = gaps.pop(0)

    def share(self, start: float, end: float, workers: int) -> int:
        """Return the slots of a share of the workers, bit s for slot s.

        Args:
            start: where the share begins, as a fraction of all seats; it wraps around.
            end: where it ends; at least one seat is in it.
            workers: how many seats there are.
        """
        first = round(start * workers)
        seats = {seat % workers for seat in range(first, max(first + 1, round(end * workers)))}
        return sum(1 << slot for slot, seat in self._seats.items() if seat in seats)

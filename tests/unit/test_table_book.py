"""What waits where the kernel program did not send it is booked, so that siblings take it."""

from __future__ import annotations

from hermes_gunicorn.core.layout import DEAD, READY, WORKER
from hermes_gunicorn.core.table import Table


def table(slots: int = 4) -> Table:
    """A table in private memory."""
    made = Table(*map(bytearray, Table.sizes(slots)))
    made.slots = 1
    return made


def store(made: Table, slot: int, **words: int) -> None:
    """Write words of a row as the program and siblings do."""
    for name, value in words.items():
        made._rows[slot * WORKER.words + WORKER.index(name)] = value


def test_what_nobody_booked_is_seen_by_siblings():
    made = table()
    assert made.queues() == []
    assert made.book(2, 3) == 3
    assert made.queues() == [2]
    assert made.row(2).queued == 3
    assert made.book(2, 3) == 0


def test_what_the_program_has_booked_is_left_as_it_is():
    made = table()
    store(made, 2, dispatched=5, last_dispatch_ns=7)
    assert made.book(2, 3) == 0  # two have not completed their handshakes
    assert (made.row(2).queued, made.row(2).last_dispatch_ns) == (5, 7)
    assert made.book(2, 0) == 0
    assert made.row(2).queued == 5


def test_what_comes_after_siblings_have_emptied_it_is_booked_anew():
    made = table()
    made.book(2, 3)
    made.mark_rescued(2, made.row(2).last_dispatch_ns + 1)
    assert made.book(2, 1) == 0
    row = made.row(2)
    assert row.queued == 1
    assert row.last_dispatch_ns >= row.rescued_at_ns - 1


def test_what_an_owner_leaves_unbooked_is_rescued_from_its_slot():
    made = table()
    made.claim(1)
    made.set_state(1, READY)
    made.set_state(1, DEAD)
    made.release(1, waiting=2)
    assert made.queues() == [1]

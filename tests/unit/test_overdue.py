"""What never comes is written off while more is sent; what is on its way is not."""

from __future__ import annotations

import pytest

from hermes_gunicorn.core import row
from hermes_gunicorn.core.layout import WORKER
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table

MS = 1_000_000
QUIET_NS = 3000 * MS


class Worker:
    """A worker in slot 1 whose loop turns each 10 ms, on a clock of the test's own."""

    def __init__(self) -> None:
        shared = Table(*map(bytearray, Table.sizes(2)))
        shared.slots = 2
        shared.claim(1)
        self.now = 1_000_000 * MS
        self.sent = 0
        self.arrivals: list[int] = []
        self.pen = Publisher(shared, 1)

    def send(self, count: int, round_trip: int | None = None) -> None:
        """Do what the kernel does at a SYN, whose handshake takes so long, or for ever."""
        self.sent += count
        words = self.pen._words
        words[WORKER.index("dispatched")] = self.sent
        words[WORKER.index("last_dispatch_ns")] = self.now
        if round_trip is not None:
            self.arrivals += count * [self.now + round_trip]

    def turn(self) -> None:
        """Accept what has arrived, and end the turn as ``HermesMixin`` does."""
        self.now += 10 * MS
        for _ in [at for at in self.arrivals if at <= self.now]:
            self.pen.opened(own=True)
        self.arrivals = [at for at in self.arrivals if at > self.now]
        if self.pen.has_overdue():
            self.pen.settle(QUIET_NS)


@pytest.fixture
def worker(monkeypatch) -> Worker:
    """The worker, and the table on its clock."""
    result = Worker()
    monkeypatch.setattr(row, "monotonic_ns", lambda: result.now)
    return result


def test_half_open_handshakes_do_not_pile_up_under_traffic(worker):
    for _ in range(1000):
        worker.send(1)
        worker.send(2, round_trip=0)
        worker.turn()
    assert worker.pen.queued <= 120  # those of the last second, or a little more
    for _ in range(120):
        worker.send(2, round_trip=0)
        worker.turn()
    assert worker.pen.queued == 0


def test_a_burst_over_a_round_trip_of_50_ms_is_not_written_off(worker):
    for _ in range(200):
        worker.turn()
    for _ in range(20):
        worker.send(3, round_trip=50 * MS)
        worker.turn()
        assert worker.pen.queued == len(worker.arrivals) > 0


def test_a_late_handshake_is_not_written_off_within_a_second(worker):
    worker.send(5, round_trip=900 * MS)
    for _ in range(89):
        worker.turn()
    assert worker.pen.queued == 5


def test_a_worker_that_slept_meanwhile_writes_them_off_as_well(worker):
    worker.turn()
    worker.send(5)
    worker.turn()
    worker.now += 1500 * MS
    worker.turn()
    assert worker.pen.queued == 0


def test_what_waits_to_be_accepted_is_not_written_off(worker):
    worker.send(5)
    for _ in range(300):
        worker.now += 10 * MS
        worker.send(1, round_trip=0)
        worker.pen.opened(own=True)
        if worker.pen.has_overdue():
            worker.pen.settle(QUIET_NS, waiting=3)
    assert worker.pen.queued == 3


def test_what_came_after_it_was_written_off_is_put_right(worker):
    worker.send(4, round_trip=2000 * MS)
    for _ in range(400):
        worker.turn()
    worker.pen.settle(QUIET_NS)
    worker.send(1)
    assert worker.pen.queued == 1

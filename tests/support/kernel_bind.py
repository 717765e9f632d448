"""A bind address with the real program on it, without gunicorn's processes around."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections import Counter
from collections.abc import Callable

from gunicorn.config import Config
from gunicorn.sock import TCP6Socket, TCPSocket

import hermes_gunicorn  # noqa: F401  (registers the settings)
from hermes_gunicorn.core.layout import SHARED_SLOT, WEIGHT, WORKER
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.table import KernelTable

ANSWERED_WITHIN = 60.0  # seconds; ends a test that hangs


class Bind:
    """A bind address with a dispatcher and a listener for each slot."""

    def __init__(self, kernel: KernelTable, slots: int, address: tuple[str, int]) -> None:
        kind = TCP6Socket if ":" in address[0] else TCPSocket
        cfg = Config()
        cfg.set("backlog", 1024)
        self.shared = kind(address, cfg, logging.getLogger(__name__))
        self.address = self.shared.getsockname()
        self.kernel = kernel
        self.table: Table = kernel.table
        self.dispatcher = KernelDispatcher(self.shared, kernel)
        self.listeners = {SHARED_SLOT: self.shared}
        self.table.slots = max(self.table.slots, slots + 1)
        for slot in range(1, slots + 1):
            self.listeners[slot] = self.dispatcher.open_slot(slot)
        self._clients: list[socket.socket] = []

    def close(self) -> None:
        """Close everything, clients first."""
        self.forget_clients()
        self.shared.close()

    def forget_clients(self) -> None:
        """Close the clients' ends."""
        while self._clients:
            self._clients.pop().close()

    def connect(self, count: int = 1) -> None:
        """Open connections and keep them."""
        for _ in range(count):
            client = socket.create_connection(self.address[:2], timeout=ANSWERED_WITHIN)
            self._clients.append(client)

    def accepted(self, count: int) -> Counter[int]:
        """Take ``count`` connections, wherever they wait; return how many by slot."""
        slots = {listener.fileno(): slot for slot, listener in self.listeners.items()}
        taken: Counter[int] = Counter()
        deadline = time.monotonic() + ANSWERED_WITHIN
        poll = select.poll()
        for fd in slots:
            poll.register(fd, select.POLLIN)
        while taken.total() < count:
            assert time.monotonic() < deadline, f"{count} connections, found {dict(taken)}"
            for fd, _ in poll.poll(100):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self.listeners[slots[fd]].accept()[0].close()
                        taken[slots[fd]] += 1
        return taken

    def sent(self, count: int = 1) -> Counter[int]:
        """Open connections and say where they went."""
        self.connect(count)
        return self.accepted(count)

    def counter(self, name: str) -> int:
        """Read one of the bind's counters."""
        return self.dispatcher.bind.counters()[name]


def set_row(table: Table, slot: int, **words: int) -> None:
    """Write words of a row as its owner would."""
    if "capacity" in words:
        words["weight"] = WEIGHT // words["capacity"]
    for name, value in words.items():
        table._rows[slot * WORKER.words + WORKER.index(name)] = value


def check_hangs(table: Table) -> tuple[int, int]:
    """Switch the hang check on, with a threshold that a busy machine does not come near.

    Returns:
        When a worker has woken up that hangs, and when one that does not: longer ago than the
        threshold, which is half of the time since the machine was booted, and just now.
    """
    now = time.monotonic_ns()
    table.hang_threshold_ns = now // 2
    return 1, now


MakeBind = Callable[..., Bind]

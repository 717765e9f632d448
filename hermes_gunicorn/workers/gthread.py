"""``hermes_gthread``: gunicorn's threaded worker.

It accepts no more than its threads can run: what it has accepted waits in a queue of
its own where nobody else can get at it, what it has not can be taken by a sibling.
"""

from __future__ import annotations

import selectors
import time
from typing import Any

from gunicorn.workers import gthread

from hermes_gunicorn.workers.mixin import HANDSHAKE_GRACE, HermesMixin

__all__ = ["HermesThreadWorker"]


class _PublishingSelector(selectors.DefaultSelector):
    """Publishes both edges of poll, and wakes the worker when it is to look around."""

    def __init__(self, worker: HermesThreadWorker) -> None:
        super().__init__()
        self._worker = worker

    def select(self, timeout: float | None = None) -> Any:
        publisher = self._worker.publisher
        publisher.polls()
        until_look = self._worker.until_look()
        events = super().select(until_look if timeout is None else min(timeout, until_look))
        publisher.woke()
        return events


class HermesThreadWorker(HermesMixin, gthread.ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with a slot of its own."""

    _connections = 0
    _leaving = False

    @property
    def nr_conns(self) -> int:
        """Open connections, as gunicorn counts them up and down."""
        return self._connections

    @nr_conns.setter
    def nr_conns(self, count: int) -> None:
        if count < self._connections:
            self.publisher.closed()
        self._connections = count

    def run(self) -> None:
        """Serve until told to stop."""
        self.poller.close()
        self.poller: Any = _PublishingSelector(self)
        self._listening: set[int] = set()
        for sock in self.sockets:
            sock.setblocking(False)
        self.begin(self.cfg.threads, self._accept_from, self._has_room)
        super().run()

    def _has_room(self) -> bool:
        return self.publisher.requests < self.cfg.threads and self.alive

    def set_accept_enabled(self, enabled: bool) -> None:
        """Watch the listeners while there is a thread for what comes (gunicorn 24+)."""
        if not self.alive:
            self._drain()
        enabled = enabled and self._has_room()
        for index, listener in enumerate(self.sockets):
            if (enabled and self.serves(index)) == (index in self._listening):
                continue
            if enabled:
                self.poller.register(listener, selectors.EVENT_READ, self.accept)
                self._listening.add(index)
            else:
                self.poller.unregister(listener)
                self._listening.discard(index)
        self._accepting = enabled

    def accept(self, *arguments: Any) -> None:
        """Accept a connection, if there is a thread for it."""
        # gunicorn 23 passes the listener's name first.
        listener = arguments[-1]
        own = self.exclusive()[self.sockets.index(listener)]
        if self._has_room() or not hasattr(gthread.ThreadWorker, "set_accept_enabled"):
            self._count(arguments, own)
        if not self._has_room() and hasattr(gthread.ThreadWorker, "set_accept_enabled"):
            self.set_accept_enabled(False)

    def _count(self, arguments: tuple[Any, ...], own: bool) -> bool:
        before = self.nr_conns
        super().accept(*arguments)
        if self.nr_conns == before:
            return False
        self.publisher.opened(own, requests=0)
        return True

    def _accept_from(self, index: int, listener: Any) -> bool:
        name = (
            () if hasattr(gthread.ThreadWorker, "set_accept_enabled") else (listener.getsockname(),)
        )
        return self._count((*name, listener), False)

    def enqueue_req(self, conn: Any) -> None:
        """Count the request from here on, until ``finish_request``."""
        self.publisher.began()
        super().enqueue_req(conn)

    def finish_request(self, *arguments: Any) -> None:
        """The request is done."""
        self.publisher.ended()
        super().finish_request(*arguments)

    def _drain(self) -> None:
        """Leave without losing a connection."""
        if self._leaving:
            return
        self._leaving = True
        self.leave()
        own = [s for s, exclusive in zip(self.sockets, self.exclusive(), strict=True) if exclusive]
        deadline = time.monotonic() + min(HANDSHAKE_GRACE, self.cfg.graceful_timeout)
        while True:
            if any(self._count((listener,), True) for listener in own):
                continue
            if not self.publisher.queued or time.monotonic() > deadline:
                return
            self.notify()
            time.sleep(0.01)

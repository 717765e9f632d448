"""``hermes_gthread``: gunicorn's threaded worker.

It accepts no more than its threads can run: what it has accepted waits in a queue of
its own where nobody else can get at it, what it has not can be taken by a sibling.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections import deque
from functools import partial
from time import monotonic_ns
from typing import Any

from gunicorn import util
from gunicorn.workers import gthread

from hermes_gunicorn.workers import closing
from hermes_gunicorn.workers.mixin import HermesMixin

__all__ = ["HermesThreadWorker"]


# gunicorn 24 and later control themselves when they accept, and finish requests in
# the main thread.
_SINCE_24 = hasattr(gthread.ThreadWorker, "set_accept_enabled")


def _name(listener: Any) -> tuple[Any, ...]:
    """Return what gunicorn 23 passes to ``accept`` before the listener: its name."""
    return () if _SINCE_24 else (listener.getsockname(),)


class HermesThreadWorker(HermesMixin, gthread.ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with a slot of its own."""

    never_called = ("set_accept_enabled",)
    _connections = 0
    _leaving = False
    _enabled = True
    _full_since_ns = 0
    _silent = 0  # gunicorn 23: accepted, but nothing has been said yet
    poller: Any
    tpool: Any
    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._listening: set[int] = set()
        super().__init__(*args, **kwargs)

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
        self._watch_poll()
        self.wsgi = closing.wsgi(self, self.wsgi)
        for sock in self.sockets:
            sock.setblocking(False)
        if not _SINCE_24:
            self._listening = set(range(len(self.sockets)))  # it begins so
            self._done: deque[Any] = deque()
            self._wake, woken = socket.socketpair()
            self._wake.setblocking(False)
            self.poller.register(woken, selectors.EVENT_READ, self._finish)
            self._drain_before_shutdown()
        self.begin(self.cfg.threads, self._accept_from, self._has_room)
        super().run()

    def _watch_poll(self) -> None:
        """Have both edges of poll published, and wake up to look around."""
        poll = self.poller.select

        def select(timeout: float | None = None) -> Any:
            pause = self.until_served() or 1.0
            self.watch_listeners()
            self.publisher.polls()
            longest = min(self.until_look(), pause)
            events = poll(longest if timeout is None else min(timeout, longest))
            self.publisher.woke()
            return events

        self.poller.select = select

    def _has_room(self) -> bool:
        return self.publisher.requests < self.cfg.threads and self.alive

    def set_accept_enabled(self, enabled: bool) -> None:
        """Watch the listeners, or not (gunicorn 24+)."""
        self._accepting = self._enabled = enabled
        self.watch_listeners()
        if not enabled and (not self.alive or self.ppid != os.getppid()):
            self.drain()

    def _drain_before_shutdown(self) -> None:
        """Gunicorn 23 shuts its pool down as the first thing after its loop."""
        shutdown = self.tpool.shutdown

        def drain_and_shutdown(*arguments: Any, **options: Any) -> None:
            self.drain()
            shutdown(*arguments, **options)

        self.tpool.shutdown = drain_and_shutdown

    def watch_listeners(self) -> None:
        """Watch those which are to be served now, while there is a thread for what comes."""
        enabled = self._enabled and self._has_room()
        for index, listener in enumerate(self.sockets):
            if (enabled and self.serves(index)) == (index in self._listening):
                continue
            if index in self._listening:
                self.poller.unregister(listener)
                self._listening.discard(index)
            else:
                self.poller.register(listener, selectors.EVENT_READ, self._acceptor(listener))
                self._listening.add(index)

    def _acceptor(self, listener: Any) -> Any:
        return partial(self.accept, *_name(listener))

    def accept(self, *arguments: Any) -> None:
        """Accept a connection, if there is a thread for it."""
        listener = arguments[-1]
        own = False
        if listener in self.sockets:  # else a sibling's, and there is
            index = self.sockets.index(listener)
            own = self.exclusive()[index]
            if not (self._leaving or (self._has_room() and self.admits(index))):
                return
        before = self.nr_conns
        super().accept(*arguments)
        if self.nr_conns > before:
            self.publisher.opened(own, requests=0)
            self._silent += 1

    def _accept_from(self, index: int, listener: Any) -> bool:
        before = self.nr_conns
        self.accept(*_name(listener), listener)
        return self.nr_conns > before

    def accept_own(self, index: int) -> bool:
        """Accept what the poller did not report."""
        listener = self.sockets[index]
        return self._has_room() and self._accept_from(index, listener)

    def enqueue_req(self, conn: Any) -> None:
        """Count the request from here on, until ``finish_request``."""
        if not conn.initialized:
            self._silent -= 1
        self.publisher.began()
        if self.publisher.requests == self.cfg.threads:
            self._full_since_ns = monotonic_ns()
        super().enqueue_req(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Serve a request, in one of the threads."""
        kept = super().handle_request(req, conn)
        if getattr(req, "hermes_closes", False):
            # Nothing is unread, so do not wait for the client to close, in the main thread, as
            # gunicorn 26 and later do.
            conn.close = lambda **_: util.close(conn.sock)
        return kept

    def finish_request(self, *arguments: Any) -> None:
        """The request is done."""
        if _SINCE_24 or self._leaving:
            self._count_out(*arguments)
        else:  # in one of the threads, which must not count
            self._done.append(arguments)
            with contextlib.suppress(BlockingIOError):  # there are wakes enough
                self._wake.send(b"1")

    def _count_out(self, *arguments: Any) -> None:
        if self.publisher.requests >= self.cfg.threads:
            # Also while more wait for a thread, as kept connections do: else the busiest of all,
            # which is never without a queue, would look idle.
            now = monotonic_ns()
            self.held(now - self._full_since_ns)
            self._full_since_ns = now
        self.publisher.ended()
        super().finish_request(*arguments)

    def _finish(self, woken: socket.socket) -> None:
        woken.recv(4096)
        while self._done:
            self._count_out(*self._done.popleft())

    def drain(self) -> None:
        """Leave without losing a connection."""
        if self._leaving:
            return
        self._leaving = True
        self.alive = False  # also when it is the arbiter that has gone
        self.leave()
        self.watch_listeners()
        own = {i: self.sockets[i] for i, exclusive in enumerate(self.exclusive()) if exclusive}
        while self._hears() or self.awaits(own.values()):
            self.notify()
            if not any(self._accept_from(i, listener) for i, listener in own.items()):
                time.sleep(0.001)

    def _hears(self) -> bool:
        """Listen to who has not spoken, whom gunicorn 23 forgets; say whether some are left."""
        if _SINCE_24 or not self._silent:
            return False
        for key, _ in self.poller.select(0):
            key.data(key.fileobj)
        return self._silent > 0 and self.in_grace()

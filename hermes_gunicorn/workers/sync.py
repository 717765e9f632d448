"""``hermes_sync``: gunicorn's sync worker, one request at a time.

It is busy for as long as a request takes, so nothing should wait for it: its siblings
take what does as soon as one of them is free, as from one queue for all.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import Any

from gunicorn.workers import sync

from hermes_gunicorn.workers.mixin import HermesMixin

__all__ = ["HermesSyncWorker"]

_NOBODY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)


class HermesSyncWorker(HermesMixin, sync.SyncWorker):  # type: ignore[misc]
    """gunicorn's sync worker with a slot of its own."""

    serves_inline = True
    may_close = False  # it never keeps one
    never_called = ("run", "run_for_one", "run_for_multiple", "wait")
    _accepts_own = False  # from a listener of its own, at the moment

    def run(self) -> None:
        """Serve until told to stop, then take what was sent here. Follows ``SyncWorker.run``."""
        self._poll = select.poll()  # unlike select(), at home with fds above 1023
        self._poll.register(self.PIPE[0], select.POLLIN)
        self._listeners = {sock.fileno(): i for i, sock in enumerate(self.sockets)}
        self._watched: set[int] = set()
        for sock in self.sockets:
            sock.setblocking(0)
        self.begin(1, self._accept_from, lambda: self.alive)
        timeout = self.timeout or 0.5
        while self.alive:
            self.notify()
            self._follow()
            self._serve(timeout)
            if not self.is_parent_alive():
                break
        self._drain()

    def _follow(self) -> None:
        """Watch the listeners that are this worker's to serve."""
        for fd, index in self._listeners.items():
            serves = self.serves(index)
            if serves and fd not in self._watched:
                self._poll.register(fd, select.POLLIN)
                self._watched.add(fd)
            elif not serves and fd in self._watched:
                self._poll.unregister(fd)
                self._watched.remove(fd)

    def _serve(self, timeout: float) -> None:
        """Wait, for siblings in need as well, and serve one connection of each listener."""
        self.publisher.polls()
        events = self._poll.poll(min(timeout, self.until_look()) * 1000)
        self.publisher.woke()
        for fd, _ in events:
            if fd == self.PIPE[0]:
                os.read(fd, 1)
            elif self.alive:
                index = self._listeners[fd]
                self._accept_from(index, self.sockets[index], self.exclusive()[index])

    def _accept_from(self, index: int, listener: Any, own: bool = False) -> bool:
        self._accepts_own = own
        try:
            self.accept(listener)
        except OSError as error:
            if error.errno in _NOBODY:
                return False
            raise
        return True

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection, whose request has the whole of ``timeout`` as under gunicorn."""
        self.publisher.opened(self._accepts_own)
        try:
            self.notify()
            super().handle(listener, client, addr)
        finally:
            self.publisher.ended()
            self.publisher.closed()

    def _drain(self) -> None:
        """Leave without losing a connection."""
        self.leave()
        own = []
        for index, (listener, exclusive) in enumerate(
            zip(self.sockets, self.exclusive(), strict=True)
        ):
            if exclusive:
                own.append((index, listener))
            else:
                listener.close()
        while self.awaits(listener for _, listener in own):
            self.notify()
            if not any(self._accept_from(i, listener, True) for i, listener in own):
                time.sleep(0.001)

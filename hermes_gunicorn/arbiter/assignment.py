"""A worker's place in the server."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.layout import SHARED_SLOT
from hermes_gunicorn.core.row import Publisher

if TYPE_CHECKING:
    from gunicorn.sock import BaseSocket

    from hermes_gunicorn.arbiter.manager import DispatchManager

__all__ = ["Assignment"]

_STOP: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Assignment:
    """A worker's place, made in the arbiter and taken up after the fork.

    Attributes:
        slot: its row; None when the table is full.
        exclusive: for each of ``worker.sockets``, whether it is the slot's own.
        contested: for each of them, whether connections come to it that any worker may
            take, rather than in need only.
        binds: for each of ``worker.sockets``, what the table holds for its address.
    """

    def __init__(
        self,
        manager: DispatchManager,
        slot: int | None,
        exclusive: list[bool],
        contested: list[bool],
        binds: list[Bind],
        indexes: dict[BaseSocket, int],
    ) -> None:
        self.slot = slot
        self.exclusive = exclusive
        self.contested = contested
        self.binds = binds
        self._manager = manager
        self._indexes = indexes  # in worker.sockets, by gunicorn's listener for the address

    def serves(self, index: int) -> bool:
        """In the worker: whether to accept from ``worker.sockets[index]`` now."""
        return self.exclusive[index] or self.may_rescue(index)

    def may_rescue(self, index: int) -> bool:
        """In the worker: whether siblings' connections to that address are for it as well."""
        return self.binds[index].allows(self.slot or SHARED_SLOT)

    def take_up(self) -> Publisher:
        """In the worker: drop what is the arbiter's and get the pen for the row."""
        self._manager.mirror()  # a post_fork hook may have set something
        self._manager.leave_to_arbiter()
        if self.slot is None:
            return Publisher.unseen()
        return Publisher(self._manager.table, self.slot)

    def siblings(self) -> dict[int, list[tuple[int, BaseSocket]]]:
        """In the worker: the other slots' listeners.

        Each with the index of its address's own listener in ``worker.sockets``, or of the one
        that all share where there is no own one.
        """
        result: dict[int, list[tuple[int, BaseSocket]]] = {}
        if self.slot is not None and any(self.exclusive):
            for shared, dispatcher in self._manager.dispatchers.items():
                for slot, listener in dispatcher.listeners().items():
                    if slot != self.slot:
                        result.setdefault(slot, []).append((self._indexes[shared], listener))
        return result

    def leave_siblings(self) -> None:
        """In a worker that stops: let go of the other slots' listeners."""
        for dispatcher in self._manager.dispatchers.values():
            dispatcher.leave_siblings(self.slot or SHARED_SLOT)

    def told_to_stop(self) -> bool:
        """In the worker: whether a signal to stop went to the arbiter's handlers."""
        queue = self._manager.server.SIG_QUEUE
        if isinstance(queue, list):  # gunicorn 23
            return not _STOP.isdisjoint(queue)
        return any(queue.get_nowait() in _STOP for _ in range(queue.qsize()))

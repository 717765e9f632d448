"""How a bind address's connections reach the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gunicorn.sock import BaseSocket

__all__ = ["Dispatcher"]


class Dispatcher(Protocol):
    """Gives one bind address's connections to the owners of slots."""

    def open_slot(self, slot: int) -> BaseSocket:
        """Return the listener of the slot's next owner, and have it dispatched to."""

    def close_slot(self, slot: int) -> None:
        """Stop dispatching to the slot; its listener keeps what waits there."""

    def waiting(self, slot: int) -> int:
        """Count the connections that wait on the slot's listener."""

    def keep_only(self, slot: int) -> None:
        """In a worker: close what belongs to the arbiter and to other slots."""

    def hand_over(self) -> None:
        """Make way for the arbiter that is about to be executed (USR2)."""

"""The worker, as its servers see it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hermes_gunicorn.core.keepalive import Keeping
from hermes_gunicorn.core.row import Publisher

if TYPE_CHECKING:
    from hermes_gunicorn.aio.server import Connection

__all__ = ["Serving"]


class Serving(Protocol):
    """The worker, as its servers see it.

    Attributes:
        sockets: its listeners.
        turns_to_start: turns of the loop for which nothing more is accepted.
        handshake_grace: seconds for which a connection may be silent at a stop.
    """

    publisher: Publisher
    keeping: Keeping
    log: logging.Logger
    sockets: Sequence[Any]
    turns_to_start: int
    handshake_grace: float

    def exclusive(self) -> list[bool]:
        """Say for each of ``sockets`` whether it is this worker's alone."""

    def serves(self, index: int) -> bool:
        """Say whether to watch ``sockets[index]`` now."""

    def admits(self, index: int) -> bool:
        """Say whether to accept what waits on ``sockets[index]``."""

    def until_served(self) -> float:
        """Return in how many seconds to ask ``serves`` again; 0 is no such time."""

    def alone(self) -> bool:
        """Tell whether there is no other worker."""

    def awaits(self, own: Iterable[Any]) -> bool:
        """Tell whether to go on accepting from these at a stop."""

    def in_grace(self) -> bool:
        """Tell whether it is too early, at a stop, to give up those who say nothing."""

    def has_room(self) -> bool:
        """Tell whether one more connection may be accepted."""

    def closes(self, sock: Any) -> bool:
        """Decide whether a response closes its connection."""

    def keepalive_failed(self) -> None:
        """Log an error in that decision."""

    def begin_serving(self) -> None:
        """Accept from now on."""

    def wait_for(self, connection: Connection) -> None:
        """Accept no more until this connection's request has begun."""

    def starts(self, connection: Connection) -> None:
        """A connection's first request has begun, or will never come."""

    def out_of_files(self, error: OSError) -> None:
        """Leave what comes to other workers for a while."""

    def cannot_count(self, protocol: Any) -> None:
        """Say that this protocol's requests are not seen."""

    def server_closed(self) -> None:
        """One of the servers accepts no more."""

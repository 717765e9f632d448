"""What a dispatcher needs of a listener, and one for programs without gunicorn."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final, Protocol

__all__ = ["Listener", "TcpListener"]

_BACKLOG: Final = 128


class Listener(Protocol):
    """A TCP listener; gunicorn's has this form.

    Its class makes another one for the same address out of ``conf``, ``log`` and a descriptor.

    Attributes:
        sock: the socket; None when it is closed.
        conf: what the class is configured with.
        log: where to say what cannot be had.
    """

    sock: Any
    conf: Any
    log: logging.Logger

    def __init__(self, address: Any, conf: Any, log: Any, fd: int | None = None) -> None: ...

    def close(self) -> None:
        """Close it."""

    def fileno(self) -> int:
        """Return its descriptor."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """Read an option as bytes."""


class TcpListener:
    """Listens on a TCP address.

    Args:
        address: host and port.
        conf: the backlog; None for the default.
        log: see ``Listener``.
        fd: a bound socket; None to bind one.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(
        self,
        address: tuple[str, int],
        conf: int | None = None,
        log: logging.Logger | None = None,
        fd: int | None = None,
    ) -> None:
        self.conf = conf
        self.log = log or logging.getLogger("hermes")
        self.sock = socket.socket() if fd is None else socket.socket(fileno=fd)
        try:
            if fd is None:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.sock.bind(address)
            self.sock.listen(_BACKLOG if conf is None else conf)
        except OSError:
            self.sock.close()
            raise

    def __str__(self) -> str:
        return "{}:{}".format(*self.sock.getsockname()[:2])

    def close(self) -> None:
        """Close it."""
        self.sock.close()

    def fileno(self) -> int:
        """Return its descriptor."""
        return self.sock.fileno()

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """Read an option as bytes."""
        return self.sock.getsockopt(level, option, length)

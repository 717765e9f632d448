"""What the kernel tells about a listening socket."""

from __future__ import annotations

import socket
import struct
from typing import Any, Protocol

__all__ = ["address_of", "waiting"]

_TCPI_UNACKED = 24  # offset in struct tcp_info; a listener's accept queue length
_TCP_INFO = getattr(socket, "TCP_INFO", 11)


class _HasOptions(Protocol):
    def getsockopt(self, level: int, option: int, length: int, /) -> bytes: ...


def waiting(listener: _HasOptions) -> int:
    """Count the connections that wait to be accepted from a TCP listener; 0 if unknown.

    gunicorn's class has no such attribute once it is closed.
    """
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCPI_UNACKED + 4)
        return int(struct.unpack_from("=I", info, _TCPI_UNACKED)[0])
    except (AttributeError, OSError, struct.error):
        return 0


def address_of(listener: Any) -> tuple[str, int] | str:
    """Return where a listener is bound: host and port, or a Unix socket's path."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return name[:2]
    return name.decode() if isinstance(name, bytes) else str(name)

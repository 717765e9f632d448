"""What the arbiter and the monitor have to agree on."""

from __future__ import annotations

import socket
import struct
from typing import Final

__all__ = ["ASKED", "LOGGED", "MESSAGE", "NAMES", "peer"]

NAMES: Final = "\0hermes-gunicorn/"  # what the sockets' names begin with
MESSAGE: Final = 1 << 18  # bytes
ASKED: Final = "asked"  # a message that hands over connections
LOGGED: Final = "logged"  # a message for the log


def peer(sock: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end of a Unix socket, as the kernel knows them.

    On a socket that has connected that is who listens. The process is 0 if it is in
    another pid namespace.
    """
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid

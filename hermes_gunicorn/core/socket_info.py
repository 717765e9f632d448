"""What the kernel tells about a listening socket."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, Final, Protocol

__all__ = ["address_of", "backlog", "waiting"]

_TCPI_UNACKED = 24  # offset in struct tcp_info; a listener's accept queue length
_TCP_INFO = getattr(socket, "TCP_INFO", 11)

# sock_diag(7), which knows the accept queue of a Unix socket.
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_ANY_STATE: Final = 0xFFFFFFFF
_UDIAG_SHOW_RQLEN: Final = 0x10
_UNIX_DIAG_RQLEN: Final = 4
_NO_COOKIE: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST: Final = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_ATTRIBUTE: Final = struct.Struct("=HHII")  # struct nlattr with struct unix_diag_rqlen
_MESSAGE_SIZE: Final = 16  # struct unix_diag_msg


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


def backlog(listener: Any) -> int:
    """Count the connections that wait to be accepted, on a Unix socket as well; 0 if unknown."""
    if listener.family == socket.AF_UNIX:
        return _waiting_on_unix(listener.fileno())
    return waiting(listener)


def _waiting_on_unix(fd: int) -> int:
    try:
        inode = os.fstat(fd).st_ino
        request = _REQUEST.pack(
            socket.AF_UNIX, 0, 0, _ANY_STATE, inode, _UDIAG_SHOW_RQLEN, _NO_COOKIE, _NO_COOKIE
        )
        header = _HEADER.pack(
            _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0
        )
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.setblocking(False)  # it has answered when send returns
            kernel.send(header + request)
            answer = kernel.recv(4096)
        if _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
            return 0
        _, kind, queued, _ = _ATTRIBUTE.unpack_from(answer, _HEADER.size + _MESSAGE_SIZE)
        return int(queued) if kind == _UNIX_DIAG_RQLEN else 0
    except (AttributeError, OSError, struct.error):
        return 0


def address_of(listener: Any) -> tuple[str, int] | str:
    """Return where a listener is bound: host and port, or a Unix socket's path."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return name[:2]
    return name.decode() if isinstance(name, bytes) else str(name)

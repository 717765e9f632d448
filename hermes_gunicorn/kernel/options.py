"""Options of gunicorn's listener, copied to the listeners that stand beside it.

The user configures one socket: in a systemd unit, in a hook such as ``when_ready``, or
before gunicorn was given it. A connection inherits the options of the listener that it
came by, so all listeners of an address must have the same ones. ``OPTIONS`` is all that
Linux lets a program read back; it is a table of numbers because Python does not name
most of them. Sources: include/uapi/asm-generic/socket.h, linux/in.h, in6.h, tcp.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from hermes_gunicorn.core.errors import KernelError

__all__ = ["OPTIONS", "Option", "Snapshot"]

_SOCKET, _IP, _IPV6, _TCP = socket.SOL_SOCKET, 0, 41, 6
_LEVELS: Final = {_SOCKET: "SO", _IP: "IP", _IPV6: "IPV6", _TCP: "TCP"}


class Option(NamedTuple):
    """A socket option.

    Attributes:
        length: of its value in bytes; 0 is an int.
        force: a buffer size: the option that ignores the system's limit, for the privileged.
        vital: what the listener is for; without it connections would be lost.
    """

    level: int
    number: int
    name: str
    length: int = 0
    force: int = 0
    vital: bool = False

    def __str__(self) -> str:
        return f"{_LEVELS[self.level]}_{self.name}"

    def read(self, sock: socket.socket) -> int | bytes:
        """Return the value that ``write`` takes."""
        if self.length:
            return sock.getsockopt(self.level, self.number, self.length)
        return sock.getsockopt(self.level, self.number)

    def write(self, sock: socket.socket, value: int | bytes) -> None:
        """Set the value; the kernel doubles the size of a buffer, and limits it quietly."""
        if not self.force:
            sock.setsockopt(self.level, self.number, value)
            return
        half = int(value) // 2
        sock.setsockopt(self.level, self.number, half)
        if self.read(sock) != value:
            sock.setsockopt(self.level, self.force, half)


# In the order in which they are set: sizes before SO_BUF_LOCK, which tells whether they were
# set at all (else they grow by themselves), and IP_TOS before SO_PRIORITY, which it changes.
OPTIONS: Final = (
    Option(_SOCKET, 25, "BINDTODEVICE", 16, vital=True),
    Option(_IP, 15, "FREEBIND", vital=True),
    Option(_IP, 19, "TRANSPARENT", vital=True),
    Option(_IPV6, 26, "V6ONLY", vital=True),
    Option(_IPV6, 75, "TRANSPARENT", vital=True),
    Option(_IPV6, 78, "FREEBIND", vital=True),
    Option(_IP, 1, "TOS"),
    Option(_IP, 2, "TTL"),
    Option(_IP, 6, "RECVOPTS"),
    Option(_IP, 8, "PKTINFO"),
    Option(_IP, 10, "MTU_DISCOVER"),
    Option(_IP, 11, "RECVERR"),
    Option(_IP, 12, "RECVTTL"),
    Option(_IP, 13, "RECVTOS"),
    Option(_IP, 21, "MINTTL"),
    Option(_IP, 24, "BIND_ADDRESS_NO_PORT"),
    Option(_IP, 26, "RECVERR_RFC4884"),
    Option(_IP, 50, "UNICAST_IF"),
    Option(_IP, 51, "LOCAL_PORT_RANGE"),
    Option(_IPV6, 16, "UNICAST_HOPS"),
    Option(_IPV6, 23, "MTU_DISCOVER"),
    Option(_IPV6, 25, "RECVERR"),
    Option(_IPV6, 33, "FLOWINFO_SEND"),
    Option(_IPV6, 49, "RECVPKTINFO"),
    Option(_IPV6, 51, "RECVHOPLIMIT"),
    Option(_IPV6, 62, "DONTFRAG"),
    Option(_IPV6, 66, "RECVTCLASS"),
    Option(_IPV6, 67, "TCLASS"),
    Option(_IPV6, 70, "AUTOFLOWLABEL"),
    Option(_IPV6, 72, "ADDR_PREFERENCES"),
    Option(_IPV6, 73, "MINHOPCOUNT"),
    Option(_IPV6, 76, "UNICAST_IF"),
    Option(_SOCKET, 1, "DEBUG"),
    Option(_SOCKET, 5, "DONTROUTE"),
    Option(_SOCKET, 6, "BROADCAST"),
    Option(_SOCKET, 7, "SNDBUF", force=32),
    Option(_SOCKET, 8, "RCVBUF", force=33),
    Option(_SOCKET, 72, "BUF_LOCK"),
    Option(_SOCKET, 9, "KEEPALIVE"),
    Option(_SOCKET, 10, "OOBINLINE"),
    Option(_SOCKET, 12, "PRIORITY"),
    Option(_SOCKET, 13, "LINGER", 8),
    Option(_SOCKET, 18, "RCVLOWAT"),
    Option(_SOCKET, 20, "RCVTIMEO", 16),
    Option(_SOCKET, 21, "SNDTIMEO", 16),
    Option(_SOCKET, 29, "TIMESTAMP"),
    Option(_SOCKET, 35, "TIMESTAMPNS"),
    Option(_SOCKET, 36, "MARK"),
    Option(_SOCKET, 37, "TIMESTAMPING", 8),
    Option(_SOCKET, 40, "RXQ_OVFL"),
    Option(_SOCKET, 46, "BUSY_POLL"),
    Option(_SOCKET, 47, "MAX_PACING_RATE", 8),
    Option(_SOCKET, 49, "INCOMING_CPU"),
    Option(_SOCKET, 60, "ZEROCOPY"),
    Option(_SOCKET, 61, "TXTIME", 8),
    Option(_SOCKET, 69, "PREFER_BUSY_POLL"),
    Option(_SOCKET, 70, "BUSY_POLL_BUDGET"),
    Option(_SOCKET, 73, "RESERVE_MEM"),
    Option(_SOCKET, 74, "TXREHASH"),
    Option(_SOCKET, 75, "RCVMARK"),
    Option(_SOCKET, 82, "RCVPRIORITY"),
    Option(_TCP, 1, "NODELAY"),
    Option(_TCP, 2, "MAXSEG"),
    Option(_TCP, 3, "CORK"),
    Option(_TCP, 4, "KEEPIDLE"),
    Option(_TCP, 5, "KEEPINTVL"),
    Option(_TCP, 6, "KEEPCNT"),
    Option(_TCP, 7, "SYNCNT"),
    Option(_TCP, 8, "LINGER2"),
    Option(_TCP, 9, "DEFER_ACCEPT"),
    Option(_TCP, 10, "WINDOW_CLAMP"),
    Option(_TCP, 12, "QUICKACK"),
    Option(_TCP, 13, "CONGESTION", 16),
    Option(_TCP, 16, "THIN_LINEAR_TIMEOUTS"),
    Option(_TCP, 18, "USER_TIMEOUT"),
    Option(_TCP, 23, "FASTOPEN"),
    Option(_TCP, 25, "NOTSENT_LOWAT"),
    Option(_TCP, 27, "SAVE_SYN"),
    Option(_TCP, 33, "FASTOPEN_KEY", 32),
    Option(_TCP, 34, "FASTOPEN_NO_COOKIE"),
    Option(_TCP, 36, "INQ"),
    Option(_TCP, 37, "TX_DELAY"),
    Option(_TCP, 44, "RTO_MAX_MS"),
    Option(_TCP, 45, "RTO_MIN_US"),
    Option(_TCP, 46, "DELACK_MAX_US"),
)

_TCP_INFO: Final = 11
_TCPI_SACKED: Final = 28  # offset in struct tcp_info; a listener's longest accept queue
_NO_LIMIT: Final = (1 << 31) - 1


class Snapshot:
    """The options and the backlog of a listener at one time.

    Args:
        sock: the listener.
        options: which options; all that this kernel has for it, by default.

    Attributes:
        values: by option.
        backlog: how many connections may wait; None if the kernel does not tell.
    """

    def __init__(self, sock: socket.socket, options: Iterable[Option] = OPTIONS) -> None:
        self.values: dict[Option, int | bytes] = {}
        for option in options:
            try:
                self.values[option] = option.read(sock)
            except OSError:
                continue
        self.backlog = _backlog(sock)

    def again(self, sock: socket.socket) -> Snapshot:
        """Take another one, of those options only that are known to exist."""
        return Snapshot(sock, self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it is compared, and never a key

    def apply(self, sock: socket.socket) -> dict[Option, OSError]:
        """Make another listener of that address the same.

        Returns:
            What the kernel refuses, for lack of privilege as a rule.

        Raises:
            KernelError: it refuses something vital.
        """
        refused = {}
        for option, value in self.values.items():
            try:
                if option.read(sock) != value:
                    option.write(sock, value)
            except OSError as error:
                if option.vital:
                    raise KernelError(error.errno or errno.EINVAL, str(option), "option") from error
                refused[option] = error
        # listen(2) on one that listens changes its backlog.
        if self.backlog is not None and _backlog(sock) not in (None, self.backlog):
            sock.listen(min(self.backlog, _NO_LIMIT))
        return refused


def _backlog(sock: socket.socket) -> int | None:
    try:
        if not sock.getsockopt(_SOCKET, socket.SO_ACCEPTCONN):
            return None
        info = sock.getsockopt(_TCP, _TCP_INFO, _TCPI_SACKED + 4)
        return int(struct.unpack_from("=I", info, _TCPI_SACKED)[0])
    except (OSError, struct.error):
        return None

"""Whether connections are worth keeping: a kept one ties its next request to this worker.

The kernel chooses a worker for a connection, not for a request. Where requests hold a worker
for long, one that comes on a kept connection waits for them, though a sibling may be idle;
on a new connection it would go there. What is decided here, and how often:

1. *May this worker close connections at all?* (``Keeping.weigh``, a few times a second.) Only
   while requests block it for a third of the time, and not where it is cores that are short:
   then siblings are no faster, and a connection costs what is short. For the same reason
   workers do not look after each other at every turn then.
2. *Is it worth it for this client now?* (``Keeping.pays``, and ``policy.free_siblings`` by the
   caller, once for each response while the answer to 1 is yes.) Only if the wait that is
   expected here clearly exceeds what a connection costs, and a sibling is free.
3. *Is it safe?* (``unread``; for what a server has buffered, ``workers/closing.py`` and
   ``aio/last_response.py``.) The kernel resets a connection that is closed while something in it
   has not been read, and the client may lose the response with it.

Stock gunicorn does none of this, so every doubt is decided for keeping the connection.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
from typing import Any, Final

__all__ = [
    "NO_BODY",
    "SHORT_RESPONSE",
    "Keeping",
    "round_trip_ns",
    "unread",
    "waited_for_cores",
]

# Bytes of a response that a socket takes at once. While a longer one is sent everything may
# change, and a connection that has carried one is worth keeping for its congestion window.
SHORT_RESPONSE: Final = 65536
NO_BODY: Final = (204, 304)

_BUSY: Final = 1 / 3  # of the time held by requests: from here on connections are closed
_CALM: Final = 1 / 5  # the same: from here on they are kept again
_BUSIEST: Final = 0.9  # a queue cannot be told from an endless one by a share close to 1
# What a new connection costs at least. Not a TCP handshake, which is a tenth of that: what
# looks like the client may be a proxy that passes bytes on, and pays with a TLS handshake.
_CONNECTS_NS: Final = 3_000_000
_ROUND_TRIPS: Final = 3  # a TCP and a TLS 1.2 handshake
_LONG_NS: Final = 2_000_000  # a request; a connection costs both ends a tenth of this
_SHORT_OF_CORES: Final = 0.2  # of the time for which requests hold the worker
_STARVED: Final = 0.1  # of all the time
_REMEMBERED: Final = 0.5  # of what was, each second
_SECOND_NS: Final = 1_000_000_000

_TCP_INFO: Final = getattr(socket, "TCP_INFO", 11)
_TCPI_MIN_RTT: Final = 148  # offset in struct tcp_info, Linux 4.6
_UNKNOWN_RTT: Final = (1 << 32) - 1


def unread(fd: int) -> bool:
    """Tell whether a connection has received something that nobody has read; true if in doubt."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except (OSError, ValueError):
        return True
    return count[0] != 0


def round_trip_ns(sock: Any) -> int | None:
    """Return a connection's shortest round trip so far, in nanoseconds; None if unknown.

    The shortest, as the usual mean holds the client's delayed acknowledgements. 0 on a Unix
    socket.
    """
    if sock.family == socket.AF_UNIX:
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCPI_MIN_RTT + 4)
        (microseconds,) = struct.unpack_from("=I", info, _TCPI_MIN_RTT)
    except (OSError, struct.error):
        return None
    return None if microseconds == _UNKNOWN_RTT else microseconds * 1000


def waited_for_cores() -> int:
    """Sum for how many nanoseconds this process's threads wanted a core and had none.

    Returns:
        The second number of ``/proc/self/task/*/schedstat``, of all; 0 where there is none.
    """
    total = 0
    with contextlib.suppress(OSError):  # other systems
        for task in os.listdir("/proc/self/task"):
            with (
                contextlib.suppress(OSError, ValueError, IndexError),  # it has just ended
                open(f"/proc/self/task/{task}/schedstat", "rb") as file,
            ):
                total += int(file.read().split()[1])
    return total


class Keeping:
    """Follows how long requests hold a worker.

    Args:
        always: keep whatever happens.

    Attributes:
        closing: whether responses may close their connection now.
        failed: whether an error has been logged that made connections be kept.
        short_of_cores: what seemed to hold it was in good part waiting for a core.
        starved: and that is a good part of its time. A sibling that is late then is late
            for the same reason, most likely, and help would come no sooner.
    """

    closing = False
    failed = False
    short_of_cores = False
    starved = False

    def __init__(self, always: bool) -> None:
        self.always = always
        self._requests = 0.0
        self._holds = 0.0
        self._time_ns = 0.0
        self._held_ns = 0.0
        self._squares = 0.0
        self._waited_ns = 0.0
        self._waited_before = 0
        self._wait_ns = 0.0
        self._blocked = False

    def start(self, waited_ns: int) -> None:
        """Forget what was waited for cores until now, by ``waited_for_cores()``: to boot."""
        self._waited_before = waited_ns

    def began(self) -> None:
        """Count a request."""
        self._requests += 1

    def held(self, ns: int) -> None:
        """Nothing else could be served for so many nanoseconds."""
        self._holds += 1
        self._held_ns += ns
        self._squares += ns * ns

    def pays(self, round_trip_ns: int | None) -> bool:
        """Tell whether a client's next request comes sooner by a new connection.

        Args:
            round_trip_ns: of the connection it has; None if unknown.
        """
        if not self.closing or round_trip_ns is None:
            return False
        return self._wait_ns > _CONNECTS_NS + _ROUND_TRIPS * round_trip_ns

    def weigh(self, elapsed_ns: float, waited_ns: int, alone: bool = False) -> bool:
        """Decide anew.

        Args:
            elapsed_ns: nanoseconds since the last time, a second or less.
            waited_ns: ``waited_for_cores()``.
            alone: there is no sibling that could serve the next request.

        Returns:
            Whether connections may be closed from now on.
        """
        self._time_ns += elapsed_ns
        self._waited_ns += max(waited_ns - self._waited_before, 0)  # less when a thread ended
        self._waited_before = waited_ns
        time_ns = max(self._time_ns, _SECOND_NS)
        busy = self._held_ns / time_ns
        # What comes at a random time into holds h finds h * h / 2 over the time left of one, and
        # others that wait already (Pollaczek and Khinchine).
        self._wait_ns = self._squares / (2 * time_ns) / (1 - min(busy, _BUSIEST))
        # More than once: a single request that takes seconds is an accident.
        self._blocked = self._holds > 1 and busy >= (_CALM if self._blocked else _BUSY)
        waits = self._wait_ns > _CONNECTS_NS
        long = self._held_ns > self._requests * _LONG_NS
        self.short_of_cores = self._waited_ns > self._held_ns * _SHORT_OF_CORES
        self.starved = self.short_of_cores and self._waited_ns > self._time_ns * _STARVED
        keeps = self.always or alone or self.short_of_cores
        self.closing = self._blocked and waits and long and not keeps
        remembered = _REMEMBERED ** (elapsed_ns / _SECOND_NS)
        self._requests *= remembered
        self._holds *= remembered
        self._time_ns *= remembered
        self._held_ns *= remembered
        self._squares *= remembered
        self._waited_ns *= remembered
        return self.closing

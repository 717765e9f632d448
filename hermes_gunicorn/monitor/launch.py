"""The arbiter's side of the monitor.

The arbiter listens on a Unix socket of the abstract namespace and never accepts. Whoever
wants to see something connects and sends SIGURG, which a process ignores by default and
which only root and its own user may send; then the arbiter starts the monitor and hands it
the socket. So nothing runs that nobody asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["Monitor", "socket_name"]

_CODE: Final = (
    "import sys; sys.path.append(sys.argv[1]);"
    " from hermes_gunicorn.monitor.process import main; main(*map(int, sys.argv[2:]))"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_BACKLOG: Final = 16
_PAUSE: Final = 3.0  # seconds between attempts to start it unasked


def socket_name(arbiter: int) -> str:
    """Return the name of the socket on which an arbiter's monitor answers."""
    return f"\0hermes-gunicorn/{arbiter}"


class Monitor:
    """Starts the monitor and keeps it informed; whatever fails here, the server goes on.

    Args:
        arbiter: its process.
        log: gunicorn's.
        shown: returns what the monitor is to know, and the descriptors that it maps.
    """

    def __init__(
        self,
        arbiter: int,
        log: logging.Logger,
        shown: Callable[[], tuple[dict[str, Any], list[int]]],
    ) -> None:
        self._arbiter = arbiter
        self._log = log
        self._shown = shown
        self._channel: socket.socket | None = None
        self._stats = ""
        self._start_again = 0.0
        self._listener: socket.socket | None = None
        try:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(socket_name(arbiter))
            self._listener.listen(_BACKLOG)
            signal.signal(signal.SIGURG, self._asked)
        except (OSError, ValueError) as error:
            # Another system, or not the main thread.
            log.debug("hermes: hermesctl cannot reach this server: %s", error)
            self._close_listener()

    def update(self) -> None:
        """What there is to see has changed."""
        try:
            about, fds = self._shown()
            if about["stats"] != self._stats:
                self.close()  # it opened the old address before it dropped its privileges
                self._stats = about["stats"]
            if self._channel is not None or self._stats:
                self._show(about, fds)
        except Exception:
            self._log.exception("hermes: no monitor")

    def keep(self) -> None:
        """Have the process that serves ``hermes_stats`` started again if it is gone."""
        if self._stats and time.monotonic() >= self._start_again and not self._is_running():
            self._show(*self._shown())

    def _is_running(self) -> bool:
        if self._channel is None:
            return False
        try:
            self._channel.recv(1, socket.MSG_PEEK)  # it sends nothing: this is its end
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Have the process end, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def leave_to_arbiter(self) -> None:
        """In a worker: close what is the arbiter's."""
        self.close()
        if self._listener is not None:
            signal.signal(signal.SIGURG, signal.SIG_DFL)
            self._close_listener()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _asked(self, *_: Any) -> None:
        if os.getpid() != self._arbiter:
            return
        try:
            self._show(*self._shown())
        except Exception:
            self._log.exception("hermes: no monitor")

    def _show(self, about: dict[str, Any], fds: list[int]) -> None:
        if min(fds) < 0:
            return  # this system has no memory that could be shown
        if not self._send(about, fds):
            self._start()
            self._send(about, fds)

    def _send(self, about: dict[str, Any], fds: list[int]) -> bool:
        if self._channel is None:
            return False
        try:
            socket.send_fds(self._channel, [json.dumps(about).encode()], fds)
        except OSError:  # it has ended, or does not listen
            self.close()
            return False
        return True

    def _start(self) -> None:
        self._start_again = time.monotonic() + _PAUSE
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        passed = [theirs, *filter(None, [self._listener])]
        command = [sys.executable, "-I", "-c", _CODE, _PACKAGES]
        command += [str(each.fileno()) for each in passed]
        try:
            for each in passed:
                each.set_inheritable(True)
            # Not fork: the arbiter may have threads, or be patched by gevent.
            os.posix_spawn(sys.executable, command, dict(os.environ))
        finally:
            for each in passed:
                each.set_inheritable(False)
            with contextlib.suppress(OSError):
                theirs.close()

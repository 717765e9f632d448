"""The arbiter's side of the monitor.

The arbiter listens on a Unix socket of the abstract namespace and never accepts. Whoever
wants to see something connects and sends SIGURG, which a process ignores by default and
which only root and its own user may send; then the arbiter starts the monitor and hands it
the socket. So nothing runs that nobody asked for.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["Monitor", "socket_name"]

_CODE: Final = (
    "import sys; sys.path.append(sys.argv[1]);"
    " from hermes_gunicorn.monitor.process import main; main(*map(int, sys.argv[2:]))"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_BACKLOG: Final = 16
_MESSAGE: Final = 4096  # bytes of what the monitor tells


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
        self._told: tuple[dict[str, Any], list[int]] | None = None
        self._showing = False
        self._wanted = False
        self._stats = ""
        self._listener: socket.socket | None = None
        try:
            # Whoever finds the socket asks at once: not before it can be answered.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(socket_name(arbiter))
            self._listener.listen(_BACKLOG)
            signal.signal(signal.SIGURG, self._asked)
        except (OSError, ValueError) as error:
            # Another system, or not the main thread.
            log.debug("hermes: hermesctl cannot reach this server: %s", error)
            self._close_listener()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGURG})

    def update(self) -> None:
        """What there is to see has changed."""
        self._showing = True  # who asks meanwhile need not be answered twice
        try:
            about, fds = self._shown()
            if about["stats"] != self._stats:
                self.close()  # it opened the old address before it dropped its privileges
                self._stats = about["stats"]
            if self._channel is not None or self._stats or self._wanted:
                self._show(about, fds)
            self._wanted = False
        except Exception:
            self._log.exception("hermes: no monitor")
        finally:
            self._showing = False

    def catch_up(self) -> None:
        """Start the monitor if that failed when somebody asked."""
        if self._wanted:
            self.update()

    def heard(self) -> Iterator[dict[str, Any]]:
        """Yield what somebody has changed through the monitor since the last time."""
        while self._channel is not None:
            try:
                message = self._channel.recv(_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:  # it has ended
                self.close()
                return
            yield json.loads(message)

    def close(self) -> None:
        """Have the process end, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = self._told = None

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
        # A signal handler: whatever the arbiter does is interrupted, and may be half done.
        if os.getpid() != self._arbiter or self._showing:
            self._wanted = True
            return
        self._showing = True
        try:
            self._show(*self._shown())
        except Exception:
            self._wanted = True  # at the next turn of the arbiter's loop
        finally:
            self._showing = False

    def _show(self, about: dict[str, Any], fds: list[int]) -> None:
        if min(fds) < 0:
            return  # this system has no memory that could be shown
        if self._told == (about, fds) and self._is_there():
            return
        if not self._send(about, fds):
            self._start()
            self._send(about, fds)

    def _is_there(self) -> bool:
        if self._channel is None:
            return False
        try:
            return bool(self._channel.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _send(self, about: dict[str, Any], fds: list[int]) -> bool:
        if self._channel is None:
            return False
        try:
            socket.send_fds(self._channel, [json.dumps(about).encode()], fds)
        except OSError:  # it has ended, or does not listen
            self.close()
            return False
        self._told = about, fds
        return True

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel, self._told = ours, None
        passed = [theirs, *filter(None, [self._listener])]
        command = [sys.executable, "-I", "-c", _CODE, _PACKAGES]
        command += [str(each.fileno()) for each in passed]
        # Inheritable in the new process only: a thread may execute another program meanwhile.
        kept = [(os.POSIX_SPAWN_DUP2, each.fileno(), each.fileno()) for each in passed]
        with theirs:
            # Not fork: the arbiter may have threads, or be patched by gevent.
            os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=kept)

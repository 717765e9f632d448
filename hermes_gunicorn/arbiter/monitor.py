"""The arbiter's side of the monitor.

The arbiter listens on a Unix socket of the abstract namespace, whose name nobody can guess,
and once a second looks whether somebody has connected. If it is somebody who may ask, it starts
the monitor and hands it the socket. So nothing runs that nobody asked for, and others can
neither start anything nor keep the queue full.

What may need the arbiter's privileges it does itself: it opens the address of
``hermes_stats`` and keeps it, whatever becomes of the monitor. What the monitor has to say
it sends back, and the arbiter writes that into gunicorn's error log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hermes_gunicorn.arbiter import stats_address
from hermes_gunicorn.monitor.channel import ASKED, LOGGED, MESSAGE, NAMES, peer

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter

__all__ = ["Monitor"]


_CODE: Final = (
    "import sys; sys.path.append(sys.argv[1]);"
    " from hermes_gunicorn.monitor.process import main; main(*map(int, sys.argv[2:]))"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_BACKLOG: Final = 16
_A_TURN: Final = 64  # connections, and messages, that are taken at a turn
_LONGEST_PAUSE: Final = 60.0  # seconds between starts of a monitor that ends at once
_LONGEST_TEXT: Final = 4000  # characters of a message


class Monitor:
    """Starts the monitor and keeps it informed; whatever fails here, the server goes on.

    Args:
        server: gunicorn's arbiter.
        shown: returns what the monitor is to know, and the descriptors that it maps.
    """

    def __init__(
        self, server: Arbiter, shown: Callable[[], tuple[dict[str, Any], list[int]]]
    ) -> None:
        self._server = server
        self._log: logging.Logger = server.log
        self._shown = shown
        self._channel: socket.socket | None = None
        self._listener: socket.socket | None = None
        # The address of hermes_stats that is open, and what was said of one that is not.
        self._stats, self._where = stats_address.handed_on()
        self._handed_on = self._stats is not None
        self._complaint = ""
        self._started_at = self._start_at = 0.0
        self._pause = 1.0
        self._works = True
        self._changes: list[dict[str, Any]] = []
        try:
            self._listener = self._open()
        except OSError as error:
            self._log.log(
                logging.WARNING if sys.platform == "linux" else logging.DEBUG,
                "hermes: no control socket: %s. hermesctl cannot reach this server; requests are"
                " not affected. Allow Unix sockets (systemd: RestrictAddressFamilies=AF_UNIX)",
                error,
            )

    def _open(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            # The number is for people; hermesctl asks the kernel who listens.
            listener.bind(f"{NAMES}{self._server.pid}/{secrets.token_hex(16)}")
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        return listener

    def update(self) -> None:
        """What there is to see has changed."""
        self._look(changed=True)

    def turn(self) -> None:
        """See who has asked and whether the monitor is well: once a second."""
        self._look()

    def _look(self, changed: bool = False) -> None:
        try:
            self._hear()
            self._open_stats()
            asked = self._accept()
            try:
                if asked or self._due() or (changed and self._channel is not None):
                    self._show(asked)
            finally:
                for each in asked:
                    each.close()
            self._works = True
        except Exception:
            if self._works:  # once, until it has worked again
                self._works = False
                self._log.exception(
                    "hermes: the monitor cannot be started; requests are not affected"
                )

    # The address of hermes_stats.

    def _open_stats(self) -> None:
        """Have the address open that the setting names, and no other."""
        where = self._server.cfg.hermes_stats
        if where == self._where:
            return
        if self._stats is not None:
            self._close_stats()
            self.close()
        if not where:
            return
        try:
            self._stats = stats_address.listen(where, self._server.cfg)
        except OSError as error:
            if self._complaint != f"{where}: {error}":
                self._complaint = f"{where}: {error}"
                self._log.warning(
                    "hermes: no statistics on %s. Requests are not affected; trying again every"
                    " second. Free that address or change hermes_stats",
                    self._complaint,
                )
            return
        self._where, self._complaint, self._start_at = where, "", 0.0
        self.close()  # started to answer hermesctl, without the address

    def _close_stats(self) -> None:
        if self._stats is not None:
            self._stats.close()
            self._stats = None
        self._where, self._handed_on = "", False

    def _due(self) -> bool:
        """Say whether a monitor that is there all the time has to be started."""
        if self._stats is None or self._channel is not None or time.monotonic() < self._start_at:
            return False
        # One that is handed on serves the last arbiter's statistics as long as that is there.
        return not (self._handed_on and self._server.master_pid)

    def hand_over(self) -> None:
        """Before exec: let the next arbiter have the address."""
        stats_address.hand_on(self._stats, self._where, self._server.cfg.env_orig)

    # Who asks.

    def _accept(self) -> list[socket.socket]:
        """Take the connections of those who may ask; others go away again."""
        asked: list[socket.socket] = []
        if self._listener is None:
            return asked
        with contextlib.suppress(OSError):  # no more of them
            for _ in range(_A_TURN):
                connection, _ = self._listener.accept()
                if peer(connection)[1] in (0, os.geteuid()) and not _is_closed(connection):
                    asked.append(connection)
                else:
                    connection.close()
        return asked

    # The process.

    def close(self) -> None:
        """Have the process end, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def leave_to_arbiter(self) -> None:
        """In a worker: close what is the arbiter's."""
        self.close()
        self._close_stats()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _hear(self) -> None:
        """Take what the monitor has said, and see whether it has ended."""
        if self._channel is None:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(_A_TURN):
                try:
                    message = self._channel.recv(MESSAGE)
                except ConnectionError:
                    message = b""
                if not message:
                    self._ended()
                    return
                told = json.loads(message)
                if LOGGED in told:
                    self._log_for_it(told["level"], str(told[LOGGED]))
                else:
                    self._changes.append(told)

    def _log_for_it(self, level: str, text: str) -> None:
        lines = text[:_LONGEST_TEXT].splitlines()
        clean = "\n".join("".join(filter(str.isprintable, line)) for line in lines)
        self._log.log(logging.INFO if level == "INFO" else logging.WARNING, "%s", clean)

    def heard(self) -> list[dict[str, Any]]:
        """Return what somebody has changed through the monitor since the last time."""
        self._hear()
        changes, self._changes = self._changes, []
        return changes

    def _ended(self) -> None:
        """Have it started again when that is due: at once, later the more often it ends."""
        self.close()
        if self._stats is None:
            return  # nobody has asked for a minute
        lived = time.monotonic() - self._started_at
        self._pause = 1.0 if lived > _LONGEST_PAUSE else min(2 * self._pause, _LONGEST_PAUSE)
        self._start_at = self._started_at + self._pause
        self._log.warning(
            "hermes: the monitor has ended. hermes_stats does not answer until it is started again,"
            " in %.0f s; requests are not affected",
            max(self._start_at - time.monotonic(), 0),
        )

    def _show(self, asked: list[socket.socket]) -> None:
        about, fds = self._shown()
        if min(fds) < 0:
            return  # this system has no memory that could be shown
        if not self._send(about, fds):
            self._start()
            self._send(about, fds)
        if asked:
            self._send({ASKED: len(asked)}, [each.fileno() for each in asked])

    def _send(self, message: dict[str, Any], fds: list[int]) -> bool:
        if self._channel is None:
            return False
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], fds)
        except OSError:  # it has ended, or does not listen
            self.close()
            return False
        return True

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        passed = [theirs, self._listener, self._stats]
        command = [sys.executable, "-I", "-c", _CODE, _PACKAGES]
        command += ["-1" if each is None else str(each.fileno()) for each in passed]
        # Inheritable in the new process only: a thread may execute another program meanwhile.
        kept = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (s.fileno() for s in passed if s)]
        with theirs:
            # Not fork: the arbiter may have threads, or be patched by gevent.
            os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=kept)


def _is_closed(connection: socket.socket) -> bool:
    """Say whether it was only to see who listens."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True

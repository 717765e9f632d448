"""The socket that hermesctl asks at: a request and an answer, each a line of JSON.

It has no permissions of its own, being in the abstract namespace, where anybody may also open
others that are called alike. So neither end believes a name: the kernel says who connects
and who listens (SO_PEERCRED). Only root and the arbiter's own user are answered. hermesctl
asks only its own user's servers, or, as root, everybody's, and takes what those say as what
anybody might say: it is short, comes in time, and is what ``answers.py`` declares.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.monitor import answers
from hermes_gunicorn.monitor.channel import NAMES, peer
from hermes_gunicorn.monitor.watch import Watch

__all__ = ["Found", "Server", "ask", "servers", "user_name"]

_ANSWERED_WITHIN: Final = 5.0  # seconds for a whole exchange, and the monitor's start
_FOUND_WITHIN: Final = 2.0  # seconds; the arbiter empties its queue once a second
_RETRY: Final = 0.02  # seconds
_AGAIN_AFTER: Final = 0.5  # seconds
_LONGEST_REQUEST: Final = 4096  # bytes
_LONGEST_ANSWER: Final = 4 << 20  # bytes; a full table of nonsense takes 0.8 MB
_AT_ONCE: Final = 8  # connections
_IDLE: Final = 60.0  # seconds
# A line of /proc/net/unix with the flag __SO_ACCEPTCON. A name may hold any byte, line ends too.
_SOCKET: Final = re.compile(
    rb"[0-9A-Fa-f]+: [0-9A-F]{8} [0-9A-F]{8} 00010000 [0-9A-F]{4} [0-9A-F]{2} +[0-9]+ @(%b[\w/]+)"
    % NAMES[1:].encode()
)


def _line(sock: socket.socket, deadline: float, longest: int) -> bytes:
    """Receive a line, without its end; less if the other end closes first.

    Raises:
        OSError: it is not there in time, or too long.
    """
    received = bytearray()
    while b"\n" not in received[-(1 << 16) :]:
        sock.settimeout(max(deadline - time.monotonic(), 1e-6))
        more = sock.recv(1 << 16)
        if not more:
            break
        received += more
        if len(received) > longest:
            raise OSError("it sends without end")
    return bytes(received.partition(b"\n")[0])


def _send(sock: socket.socket, message: Any, deadline: float) -> None:
    sock.settimeout(max(deadline - time.monotonic(), 1e-6))
    sock.sendall(json.dumps(message).encode() + b"\n")


class Server:
    """Answers hermesctl, in threads.

    Args:
        listener: the arbiter's.
        watch: what to answer from.
        allowed: users that are answered.

    Attributes:
        asked_at: when somebody asked last, CLOCK_MONOTONIC in seconds.
    """

    def __init__(self, listener: socket.socket, watch: Watch, allowed: set[int]) -> None:
        self._listener = listener
        self._watch = watch
        self._allowed = allowed
        self._room = threading.Semaphore(_AT_ONCE)
        self.asked_at = time.monotonic()

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        # The arbiter has the same socket and must not block in it: no settimeout(None).
        self._listener.settimeout(_IDLE)
        while True:
            try:
                connection, _ = self._listener.accept()
                self.serve(connection)
            except TimeoutError:
                pass
            except (OSError, RuntimeError):  # no more files, or no more threads: for a while
                time.sleep(_AGAIN_AFTER)

    def serve(self, connection: socket.socket) -> None:
        """Answer a connection, if it is from somebody who is answered."""
        if peer(connection)[1] in self._allowed:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        else:
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with self._room, connection, contextlib.suppress(OSError):
            deadline = time.monotonic() + _ANSWERED_WITHIN
            if request := _line(connection, deadline, _LONGEST_REQUEST):
                self.asked_at = time.monotonic()
                _send(connection, self._answer(request), deadline)

    def _answer(self, request: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(request)
            return {"ok": self._do(asked.pop("do"), asked)}
        except Exception as error:
            return {"error": str(error) or repr(error)}

    def _do(self, what: str, asked: dict[str, Any]) -> Any:
        watch = self._watch
        actions: dict[str, Callable[[], Any]] = {
            "status": watch.status,
            "events": watch.events,
            "points": watch.points,
            "raw": watch.raw,
            "set": lambda: watch.tune(asked["name"], asked["value"]),
            "drain": lambda: watch.drain(int(asked["slot"]), bool(asked["drained"])),
        }
        if what not in actions:
            raise ValueError(f"unknown request {what!r}")
        return actions[what]()


@dataclass(frozen=True)
class Found:
    """A socket that is called like a server's, and whose it is as the kernel says.

    Attributes:
        name: of the socket.
        pid: the process that listens; 0 if it is in another pid namespace.
        uid: its user.
    """

    name: bytes
    pid: int
    uid: int

    @property
    def allowed(self) -> bool:
        """Whether we may ask it."""
        return os.geteuid() in (0, self.uid)

    @property
    def user(self) -> str:
        """The user's name, or number."""
        return user_name(self.uid)

    def __str__(self) -> str:
        ours = self.uid == os.geteuid()
        return f"server {self.pid}" if ours else f"server {self.pid} (user {self.user})"


def user_name(uid: int) -> str:
    """Return a user's name, or number."""
    try:
        return answers.plain(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def servers(wanted: int | None = None) -> list[Found]:
    """Find the servers in this network namespace: one for each process that listens.

    Args:
        wanted: the process of the only one that matters, if so.
    """
    found: dict[int, Found] = {}
    names, deadline = _names(), time.monotonic() + _FOUND_WITHIN
    while names and wanted not in found and time.monotonic() < deadline:
        waiting = []
        for name in names:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                try:
                    sock.connect(name)
                    pid, uid = peer(sock)
                    found.setdefault(pid, Found(name, pid, uid))
                except BlockingIOError:  # others fill its queue
                    waiting.append(name)
                except OSError:
                    continue  # it has ended since
        names = waiting
        if names:
            time.sleep(_RETRY)
    return sorted(found.values(), key=lambda each: each.pid)


def _names() -> list[bytes]:
    """List the listening sockets that are called like a server's."""
    lines = Path("/proc/net/unix").read_bytes().split(b"\n")
    return [b"\0" + match[1] for match in map(_SOCKET.fullmatch, lines) if match]


def ask(server: Found, what: str, **asked: Any) -> Any:
    """Ask a server; the answer is as ``answers.py`` declares it, whoever gives it.

    Raises:
        HermesError: it does not answer, refuses, or answers nonsense; says which.
    """
    deadline = time.monotonic() + _ANSWERED_WITHIN
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            _connect(sock, server.name, deadline)
            if peer(sock) != (server.pid, server.uid):
                raise HermesError(f"{server}: its socket belongs to another process now")
            _send(sock, {"do": what, **asked}, deadline)
            line = _line(sock, deadline, _LONGEST_ANSWER)
    except OSError as error:
        raise HermesError(f"{server} does not answer: {error}") from error
    if not line:
        raise HermesError(f"{server} does not answer")
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise HermesError(f"{server}: malformed answer") from None
    try:
        if isinstance(answer, dict) and "ok" in answer:
            return answers.read(answers.ANSWERS[what], answer["ok"])
        raise HermesError(answers.read(answers.Refusal, answer)["error"])
    except HermesError as error:
        raise HermesError(f"{server}: {error}") from None


def _connect(sock: socket.socket, name: bytes, deadline: float) -> None:
    """Connect, in time also where the queue is full at first."""
    while True:
        sock.setblocking(False)
        try:
            return sock.connect(name)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY)

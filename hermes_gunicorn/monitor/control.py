"""The socket that hermesctl asks at: a request and an answer, each a line of JSON.

It has no permissions of its own, being in the abstract namespace: the kernel says who
connects (SO_PEERCRED), and only root and the arbiter's own user are answered. The other way
round, hermesctl asks the kernel who listens, and believes that process only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from hermes_gunicorn.errors import HermesError
from hermes_gunicorn.monitor.launch import socket_name
from hermes_gunicorn.monitor.watch import Watch

__all__ = ["Server", "ask", "servers"]

_ANSWERED_WITHIN: Final = 5.0  # seconds
_LONGEST: Final = 4096  # bytes of a request
_AGAIN_AFTER: Final = 0.5  # seconds
_AT_ONCE: Final = 8  # connections


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end, as the kernel knows them."""
    pid, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return pid, uid


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
        while True:
            self._room.acquire()
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # no more files, or no more threads: for a while
                self._room.release()
                time.sleep(_AGAIN_AFTER)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_ANSWERED_WITHIN)
                if _peer(connection)[1] not in self._allowed:
                    return
                file = connection.makefile("rwb")
                while request := file.readline(_LONGEST):
                    self.asked_at = time.monotonic()
                    file.write(json.dumps(self._answer(request)).encode() + b"\n")
                    file.flush()
        finally:
            self._room.release()

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
    """A server on this host: its arbiter, and whether we may ask it."""

    arbiter: int
    uid: int
    allowed: bool


def servers() -> list[Found]:
    """Find the servers in this network namespace, by their sockets' names."""
    prefix = "@" + socket_name(0)[1:].removesuffix("0")
    names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    found = []
    for name in sorted(name for name in names if name.startswith(prefix)):
        # Not by connecting: nobody accepts there until a monitor is wanted.
        with contextlib.suppress(psutil.Error, ValueError):
            arbiter = int(name.removeprefix(prefix))
            uid = psutil.Process(arbiter).uids().effective
            found.append(Found(arbiter, uid, os.geteuid() in (0, uid)))
    return found


def _connect(sock: socket.socket, name: str) -> None:
    """Connect, in time also where the queue is full at first."""
    deadline = time.monotonic() + _ANSWERED_WITHIN
    while True:
        try:
            return sock.connect(name)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def ask(arbiter: int, what: str, **asked: Any) -> Any:
    """Ask a server.

    Raises:
        HermesError: there is none, it does not answer, or it refuses; says why.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_ANSWERED_WITHIN)
        try:
            # First, so that somebody accepts: others may have filled the queue.
            os.kill(arbiter, signal.SIGURG)
            _connect(sock, socket_name(arbiter))
            if _peer(sock)[0] != arbiter:  # which opened the socket
                raise HermesError(f"it is not server {arbiter} that answers for it")
            file = sock.makefile("rwb")
            file.write(json.dumps({"do": what, **asked}).encode() + b"\n")
            file.flush()
            line = file.readline()
        except PermissionError:
            raise HermesError(
                f"server {arbiter} belongs to another user; ask as that user or as root"
            ) from None
        except (ConnectionRefusedError, ProcessLookupError):
            raise HermesError(f"there is no server with pid {arbiter}") from None
        except OSError as error:
            raise HermesError(f"server {arbiter} does not answer: {error}") from error
    if not line:
        raise HermesError(f"server {arbiter} does not answer")
    answer = json.loads(line)
    if "error" in answer:
        raise HermesError(answer["error"])
    return answer["ok"]

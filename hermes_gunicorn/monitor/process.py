"""The monitor's process: a new interpreter, started by the arbiter, without its files."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final

from hermes_gunicorn.core import privileges
from hermes_gunicorn.core.binds import Bind
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.monitor import control
from hermes_gunicorn.monitor.channel import ASKED, LOGGED, MESSAGE
from hermes_gunicorn.monitor.watch import EVERY, Watch

__all__ = ["main"]

_IDLE: Final = 60.0  # seconds after which it ends when nobody has asked
_FDS: Final = 253  # SCM_MAX_FD
_LONGEST_TEXT: Final = 4000  # characters of a message to the arbiter
_PR_SET_NAME: Final = 15

log = logging.getLogger("hermes")


def main(channel: int, listener: int, stats: int) -> None:
    """Serve until the arbiter is gone or nobody wants to know any more.

    Args:
        channel: a socket on which the arbiter tells what there is to see.
        listener: the one that hermesctl connects to; -1 for none.
        stats: the one at the address of ``hermes_stats``; -1 for none.
    """
    if os.fork():  # so that it is not the arbiter's to reap
        os._exit(0)
    _close_all_but(channel, listener, stats)
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal; meant for the arbiter
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"hermes-monitor", 0, 0, 0)
    arbiter = socket.socket(fileno=channel)
    _log_to(arbiter)
    try:
        _serve(arbiter, listener, stats)
    except Exception:
        log.exception("hermes: the monitor ends after an error")


def _serve(arbiter: socket.socket, listener: int, stats: int) -> None:
    watch = Watch()
    watch.tell = lambda change: arbiter.send(json.dumps(change).encode())
    message, fds = _received(arbiter)
    if not message:
        return
    _show(watch, message, fds)
    allowed = {0, os.geteuid()}
    if stats >= 0:
        # Before it becomes a user who may not be able to read what is imported there.
        from hermes_gunicorn.monitor import web
    _drop_privileges(message)
    if stats >= 0:
        web.serve(watch, socket.socket(fileno=stats), message["stats"])
    server = None
    if listener >= 0:
        server = control.Server(socket.socket(fileno=listener), watch, allowed)
        server.start()
    arbiter.settimeout(EVERY)
    while stats >= 0 or (server and time.monotonic() - server.asked_at < _IDLE):
        with contextlib.suppress(TimeoutError):
            message, fds = _received(arbiter)
            if not message:
                return
            if ASKED not in message:
                _show(watch, message, fds)
            elif server:
                for fd in fds:
                    server.serve(socket.socket(fileno=fd))
        watch.sample()


class _ToArbiter(logging.Handler):
    """Has the arbiter write into gunicorn's error log, which is its alone."""

    def __init__(self, arbiter: socket.socket) -> None:
        super().__init__()
        self._arbiter = arbiter

    def emit(self, record: logging.LogRecord) -> None:
        told = {"level": record.levelname, LOGGED: self.format(record)[:_LONGEST_TEXT]}
        with contextlib.suppress(OSError):  # it has ended, or has much to read
            self._arbiter.send(json.dumps(told).encode(), socket.MSG_DONTWAIT)


def _log_to(arbiter: socket.socket) -> None:
    log.addHandler(_ToArbiter(arbiter))
    log.propagate = False

    def failed(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            log.error("hermes: error in the monitor", exc_info=args.exc_value)

    threading.excepthook = failed


def _received(arbiter: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Take what the arbiter tells; nothing when it is gone."""
    try:
        message, fds, _, _ = socket.recv_fds(arbiter, MESSAGE, _FDS)
    except ConnectionError:
        return {}, []
    return (json.loads(message) if message else {}), list(fds)


def _show(watch: Watch, about: dict[str, Any], fds: list[int]) -> None:
    sizes = [*Table.sizes(about["rows"]), *len(about["binds"]) * Bind.sizes()]
    if len(sizes) == len(fds):  # else it was asked while it changed, and will tell more
        watch.show(about, fds, sizes)
    for fd in fds:
        os.close(fd)


def _drop_privileges(about: dict[str, Any]) -> None:
    """Become who the workers are."""
    if os.geteuid() == 0 and (about["uid"], about["gid"]) != (0, 0):
        os.setgroups([])
        os.setgid(about["gid"])
        os.setuid(about["uid"])
    privileges.drop()


def _close_all_but(*kept: int) -> None:
    for name in [path.name for path in Path("/proc/self/fd").iterdir()]:
        fd = int(name)
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)

"""The monitor's process: a new interpreter, started by the arbiter, without its files."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from hermes_gunicorn import privileges
from hermes_gunicorn.monitor import control
from hermes_gunicorn.monitor.watch import EVERY, Watch
from hermes_gunicorn.table import Bind, Table

__all__ = ["main"]

_IDLE: Final = 60.0  # seconds after which it ends when nobody has asked
_MESSAGE: Final = 1 << 18  # bytes
_FDS: Final = 253  # SCM_MAX_FD
_PR_SET_NAME: Final = 15


def main(channel: int, listener: int = -1) -> None:
    """Serve until the arbiter is gone or nobody wants to know any more.

    Args:
        channel: a socket on which the arbiter tells what there is to see.
        listener: the one that hermesctl connects to.
    """
    if os.fork():  # so that it is not the arbiter's to reap
        os._exit(0)
    _close_all_but(channel, listener)
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal; meant for the arbiter
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"hermes-monitor", 0, 0, 0)
    arbiter = socket.socket(fileno=channel)
    watch = Watch()
    watch.tell = lambda change: arbiter.send(json.dumps(change).encode())
    about = _told(arbiter, watch)
    if about is None:
        return
    allowed = {0, os.geteuid()}
    where, served = about["stats"], False
    if where:
        served = _serve_stats(watch, where, complain=True)
    _drop_privileges(about)
    server = None
    if listener >= 0:
        server = control.Server(socket.socket(fileno=listener), watch, allowed)
        server.start()
    arbiter.settimeout(EVERY)
    while where or (server and time.monotonic() - server.asked_at < _IDLE):
        with contextlib.suppress(TimeoutError):
            if _told(arbiter, watch) is None:
                return
        if where and not served:  # an older server's monitor may have it still
            served = _serve_stats(watch, where, complain=False)
        watch.sample()


def _told(arbiter: socket.socket, watch: Watch) -> dict[str, Any] | None:
    """Take what the arbiter tells; None when it is gone."""
    try:
        message, fds, _, _ = socket.recv_fds(arbiter, _MESSAGE, _FDS)
    except ConnectionError:  # it ended without reading what it was told
        return None
    if not message:
        return None
    about: dict[str, Any] = json.loads(message)
    sizes = [*Table.sizes(about["rows"]), *len(about["binds"]) * Bind.sizes()]
    if len(sizes) == len(fds):  # else it was asked while it changed, and will tell more
        watch.show(about, fds, sizes)
    for fd in fds:
        os.close(fd)
    return about


def _serve_stats(watch: Watch, where: str, complain: bool) -> bool:
    from hermes_gunicorn.monitor import web

    try:
        web.serve(watch, where)
    except OSError as error:
        if complain:
            text = f"hermes: no statistics on {where}: {error}; trying again every {EVERY:g} s"
            print(text, file=sys.stderr, flush=True)
        return False
    return True


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

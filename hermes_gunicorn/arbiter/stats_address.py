"""The address of ``hermes_stats``, opened by the arbiter while it has its privileges."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gunicorn.config import Config

__all__ = ["hand_on", "handed_on", "listen"]

_BACKLOG: Final = 128
_HANDED_ON: Final = "HERMES_STATS_FD"  # descriptor and address, as gunicorn's GUNICORN_FD


def listen(where: str, cfg: Config) -> socket.socket:
    """Listen where ``hermes_stats`` says.

    A Unix socket gets the mode and the owner that gunicorn gives its own: those of its
    settings ``umask``, ``user`` and ``group``.

    Raises:
        OSError: the address cannot be had.
    """
    if not where.startswith("unix:"):
        host, _, port = where.rpartition(":")
        family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # for [::]
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    path = where.removeprefix("unix:")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(cfg.umask)
    try:
        listener.bind(path)
        os.chown(path, cfg.uid, cfg.gid)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens any more."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if Path(path).is_socket():
                os.unlink(path)
        except BlockingIOError:
            pass  # somebody does, and is busy


def hand_on(listener: socket.socket | None, where: str, environ: dict[str, str]) -> None:
    """Before exec: let the next arbiter have the listener."""
    environ.pop(_HANDED_ON, None)
    if listener is not None:
        listener.set_inheritable(True)
        environ[_HANDED_ON] = f"{listener.fileno()} {where}"


def handed_on() -> tuple[socket.socket | None, str]:
    """After exec: take the listener that the last arbiter had, and the address it has."""
    number, _, where = os.environ.pop(_HANDED_ON, "").partition(" ")
    with contextlib.suppress(ValueError, OSError):
        listener = socket.socket(fileno=int(number))
        listener.set_inheritable(False)
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return listener, where
        listener.close()
    return None, ""

"""The servers that are compared, all with the same application and as many workers.

Each of them can run as many requests at once as it has workers; gthread has half of the
processes and two threads in each. Workers, keep-alive and the backlog are the same,
all else is as it comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness

__all__ = ["GUNICORN", "OURS", "PACKAGES", "RIVALS", "Rival", "label"]

# gunicorn's HTTP parser in C, which it uses where it is installed, is all gunicorns' here.
PACKAGES = ("uWSGI", "granian", "uvicorn", "gunicorn_h1c")

_BIN = Path(sys.executable).parent
_BACKLOG = 2048  # gunicorn's


@dataclass(frozen=True)
class Rival:
    """A server.

    Attributes:
        command: makes the command line from a port, the number of workers, and whether
            clients keep their connections.
        processes: how many children serve, by the number of workers.
    """

    command: Callable[[int, int, bool], list[str]]
    processes: Callable[[int], int] = lambda workers: workers


def _gunicorn(worker: str, *flags: str) -> Rival:
    app = "app:asgi" if "asgi" in worker else "app:wsgi"
    threaded = "gthread" in worker

    def command(port: int, workers: int, keep: bool) -> list[str]:
        count = max(workers // 2, 1) if threaded else workers
        extra = ["--threads", "2"] if threaded else []
        extra += ["--asgi-loop", "asyncio"] if "asgi" in worker else []
        return [
            *(sys.executable, "-m", "gunicorn", "-k", worker, "-w", str(count), *extra, *flags),
            *("-b", f"127.0.0.1:{port}", "--keep-alive", str(harness.KEEP_ALIVE)),
            *("-c", "/dev/null", "--log-level", "warning", *harness.no_control_socket(), app),
        ]

    return Rival(command, lambda workers: max(workers // 2, 1) if threaded else workers)


def _uwsgi(*flags: str) -> Rival:
    def command(port: int, workers: int, keep: bool) -> list[str]:
        address = f"127.0.0.1:{port}"
        # Its workers do not keep connections; its HTTP router does, in front of them.
        kept = ["--http", address, f"--http-keepalive={harness.KEEP_ALIVE}"]
        return [
            *(str(_BIN / "uwsgi"), "--master", "--die-on-term", "--processes", str(workers)),
            *(kept if keep else ["--http-socket", address]),
            *("--listen", str(_BACKLOG), "--disable-logging", "--need-app", *flags),
            *("--module", "app:wsgi"),
        ]

    return Rival(command)


def _granian(port: int, workers: int, keep: bool) -> list[str]:
    return [
        *(str(_BIN / "granian"), "--interface", "wsgi", "--workers", str(workers)),
        *("--host", "127.0.0.1", "--port", str(port), "--backlog", str(_BACKLOG)),
        *("--blocking-threads", "1", "--no-ws", "--log-level", "warning", "app:wsgi"),
    ]


def _uvicorn(port: int, workers: int, keep: bool) -> list[str]:
    return [
        *(str(_BIN / "uvicorn"), "--workers", str(workers), "--loop", "asyncio"),
        *("--host", "127.0.0.1", "--port", str(port), "--backlog", str(_BACKLOG)),
        *("--timeout-keep-alive", str(harness.KEEP_ALIVE), "--no-access-log"),
        *("--log-level", "warning", "app:asgi"),
    ]


def _ours(worker: str, mode: str, *flags: str) -> Rival:
    strict = ["--hermes-strict"] if mode == "kernel" else []
    return _gunicorn(worker, "--hermes-mode", mode, *strict, *flags)


OURS: dict[str, Rival] = {
    "hermes": _ours("hermes", "kernel"),
    "hermes, cascade": _ours("hermes", "kernel", "--hermes-policy", "cascade"),
    "hermes, shared": _ours("hermes", "shared"),
    "hermes_sync": _ours("hermes_sync", "kernel"),
    "hermes_gthread": _ours("hermes_gthread", "kernel"),
    "hermes_asgi": _ours("hermes_asgi", "kernel"),
}
GUNICORN: dict[str, Rival] = OURS | {
    f"{worker}{suffix}": _gunicorn(worker, *flags)
    for worker in ("gevent", "sync", "gthread", "asgi")
    for suffix, flags in (("", ()), (", reuse-port", ("--reuse-port",)))
}
RIVALS: dict[str, Rival] = {
    **GUNICORN,
    "uwsgi": _uwsgi(),
    "uwsgi, thunder-lock": _uwsgi("--thunder-lock"),
    "uwsgi, reuse-port": _uwsgi("--reuse-port"),
    "granian": Rival(_granian),
    # Alone, its worker is the process that was started.
    "uvicorn": Rival(_uvicorn, lambda workers: workers if workers > 1 else 0),
}


def label(rival: str) -> str:
    """Return its name as tables show it: ours stand out."""
    return f"**{rival}**" if rival in OURS else rival

"""hermes_stats: the live page, /metrics and /stats.json, read only.

The standard library's server in threads, of which there are few: who is slow or sends
nonsense costs one of them for some seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from hermes_gunicorn.monitor.watch import Watch

__all__ = ["serve"]

_AT_ONCE: Final = 16  # connections
_SLOWEST: Final = 5.0  # seconds
_PAGE: Final = Path(__file__).with_name("page.html")
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " connect-src 'self'"
    ),
}


class _Handler(BaseHTTPRequestHandler):
    timeout = _SLOWEST
    server_version = "hermes"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        if path == "/":
            self._send("text/html; charset=utf-8", _PAGE.read_bytes())
        elif path == "/stats.json":
            watch = self.server.watch
            stats = watch.status() | {"events": watch.events(), "points": watch.points()}
            self._send("application/json", json.dumps(stats).encode())
        elif path == "/metrics":
            self._metrics()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return lambda: self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
        raise AttributeError(name)

    def _metrics(self) -> None:
        try:
            from hermes_gunicorn.monitor import metrics
        except ImportError:
            self.send_error(
                HTTPStatus.NOT_IMPLEMENTED, "pip install 'hermes-gunicorn[metrics]' to have these"
            )
            return
        self._send(*metrics.render(self.server.watch, self.headers.get("Accept", "")))

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, watch: Watch, family: int, address: Any) -> None:
        self.watch = watch
        self.address_family = family
        self._room = threading.Semaphore(_AT_ONCE)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(timeout=_SLOWEST):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whatever a client does is its own affair."""


def serve(watch: Watch, where: str) -> None:
    """Answer from now on, in threads.

    Args:
        watch: what to show.
        where: ``host:port`` or ``unix:/path``.

    Raises:
        OSError: the address cannot be had.
    """
    if where.startswith("unix:"):
        path = where.removeprefix("unix:")
        with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) != 0 and Path(path).is_socket():
                os.unlink(path)
        server = _Server(watch, socket.AF_UNIX, path)
    else:
        host, _, port = where.rpartition(":")
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        server = _Server(watch, family, address)
    threading.Thread(target=server.serve_forever, daemon=True).start()

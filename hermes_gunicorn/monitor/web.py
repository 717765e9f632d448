"""hermes_stats: the live page, /metrics and /stats.json, read only.

The standard library's server in threads, of which there are few. A connection has a few
seconds for everything, however busily it says nothing; where there are too many the oldest
makes way, since a request that is all there takes milliseconds.

Imported before the monitor changes its user, who may not be able to read what is needed here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from hermes_gunicorn.monitor.watch import Watch

log = logging.getLogger("hermes")

try:
    from hermes_gunicorn.monitor import metrics
except Exception as error:
    metrics = None  # type: ignore[assignment]
    if not isinstance(error, ModuleNotFoundError) or error.name != "prometheus_client":
        log.warning("hermes: no /metrics: cannot import prometheus_client: %r", error)

__all__ = ["serve"]

_AT_ONCE: Final = 32  # connections
_SLOWEST: Final = 5.0  # seconds that a connection has
_LOG_AGAIN: Final = 60.0  # seconds after which an error is logged again
_PAGE: Final = Path(__file__).with_name("page.html").read_bytes()
_TEXT: Final = "text/plain; charset=utf-8"
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " connect-src 'self'"
    ),
}


class _Handler(BaseHTTPRequestHandler):
    server_version = "hermes"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        """Answer."""
        if not self.server.is_ours(self.connection, self.headers.get("Host")):
            self._send(
                HTTPStatus.FORBIDDEN,
                _TEXT,
                b"Unknown name in the Host header. Ask for localhost or an IP address; a proxy in"
                b" front has to send one of these as Host.\n",
            )
            return
        path = self.path.partition("?")[0]
        try:
            status, kind, body = self._content(path)
        except Exception:
            self.server.log_error(path)
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT
            body = b"The error log of the server says why.\n"
        self._send(status, kind, body)

    def do_HEAD(self) -> None:
        """Answer the same without the body."""
        self.do_GET()

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return lambda: self._send(
                HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"Read only.\n", Allow="GET, HEAD"
            )
        raise AttributeError(name)

    def _content(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        watch = self.server.watch
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", _PAGE
        if path == "/stats.json":
            stats = watch.status() | {"events": watch.events(), "points": watch.points()}
            return HTTPStatus.OK, "application/json", json.dumps(stats).encode()
        if path != "/metrics":
            return HTTPStatus.NOT_FOUND, _TEXT, b"There are /, /stats.json and /metrics.\n"
        if metrics is None:
            text = b"pip install 'hermes-gunicorn[metrics]' to have these.\n"
            return HTTPStatus.NOT_IMPLEMENTED, _TEXT, text
        return HTTPStatus.OK, *metrics.render(watch, self.headers.get("Accept", ""))

    def _send(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, watch: Watch, listener: socket.socket, names: set[str]) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        listener.setblocking(False)
        self.socket = listener
        self.watch = watch
        self._names = names
        self._lock = threading.Lock()
        self._until: dict[socket.socket, float] = {}  # the oldest first
        self._logged: dict[str, float] = {}

    def is_ours(self, connection: socket.socket, host: str | None) -> bool:
        """Say whether a request is for us by name, if it comes from this machine.

        A web site whose name is made to lead to 127.0.0.1 is asked for by that name.
        """
        here = connection.getsockname()
        if host is None or not isinstance(here, tuple) or not _address(here[0]).is_loopback:
            return True
        match = re.fullmatch(r"\[(.*)\](:\d*)?|(.*?)\.?(:\d*)?", host.strip().lower())
        name = (match[1] or match[3]) if match else ""
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            return bool(_address(name))
        except ValueError:
            return False

    def log_error(self, path: str) -> None:
        """Log the error that is being handled, unless one with that path was a moment ago."""
        now = time.monotonic()
        if now - self._logged.get(path, -_LOG_AGAIN) >= _LOG_AGAIN:
            self._logged[path] = now
            log.exception("hermes: error in hermes_stats at %s", path)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._until[request] = time.monotonic() + _SLOWEST
            if len(self._until) > _AT_ONCE:
                self._end(next(iter(self._until)))
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End what takes too long; called every half second."""
        with self._lock:
            now = time.monotonic()
            for request in [each for each, until in self._until.items() if until < now]:
                self._end(request)

    def _end(self, request: socket.socket) -> None:
        """Have the thread that waits for it see its end."""
        del self._until[request]
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._until.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is made to, is nothing to tell of."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.log_error("a request")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(text.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


def serve(watch: Watch, listener: socket.socket, where: str) -> None:
    """Answer from now on, in threads.

    Args:
        watch: what to show.
        listener: what the arbiter has opened.
        where: its address, as in the setting.
    """
    names = {"localhost", socket.gethostname().lower(), where.rpartition(":")[0].lower()}
    server = _Server(watch, listener, names)
    threading.Thread(target=server.serve_forever, daemon=True).start()

"""Which responses may close their connection, as the servers that send them see it.

``core/keepalive.py`` decides whether that pays. Here it is kept from doing harm: the response must
be known to end soon after it begins, the request must have been received to its end, and nothing
may have come behind it. What a server of unknown make holds is not known, so that one keeps
its connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from gunicorn.http import message

if TYPE_CHECKING:
    from gunicorn.config import Config

    from hermes_gunicorn.workers.mixin import HermesMixin

__all__ = ["LastResponse", "is_cheap", "wsgi"]

# Bytes of a response that a socket takes at once. While a longer one is sent everything may
# change, and a connection that has carried one is worth keeping for its congestion window.
_SHORT: Final = 65536
_NO_BODY: Final = (204, 304)


def is_cheap(cfg: Config) -> bool:
    """Tell whether a client's new connection is but a TCP handshake, as far as the server knows."""
    proxy = getattr(cfg, "proxy_protocol", "off") not in (False, "off")
    return not cfg.is_ssl and not proxy and getattr(cfg, "protocol", "http") == "http"


def wsgi(worker: HermesMixin, app: Any) -> Any:
    """Wrap a worker's application so that its short responses may close their connection.

    When it returns, gunicorn has not sent the headers yet, and what held the worker is over.
    """
    keeping = worker.keeping
    if keeping.always:
        return app

    def hermes(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        keeping.began()
        body = app(environ, start_response)
        if keeping.closing:
            try:
                response = start_response.__self__  # type: ignore[attr-defined]
                if _may_close(response, body) and worker.closes(response.sock):
                    response.req.force_close()
                    response.req.hermes_closes = True
            except Exception:
                _failed(worker)
        return body

    return hermes


def _failed(worker: HermesMixin) -> None:
    """Keep the connection; say so once."""
    if not worker.keeping.failed:
        worker.keeping.failed = True
        worker.log.exception("hermes: error in hermes_keepalive; the connection is kept")


def _may_close(response: Any, body: Iterable[bytes]) -> bool:
    return (
        isinstance(response.req, message.Request)  # not HTTP/2
        and response.status is not None  # ``start_response`` was called
        and not response.headers_sent
        and not response.upgrade
        and not response.should_close()  # it closes in any case
        and _is_short(response, body)
        and _is_read(response.req)
    )


def _is_short(response: Any, body: Iterable[bytes]) -> bool:
    if response.req.method == "HEAD" or response.status_code in _NO_BODY:
        return True
    if response.response_length is not None:
        return bool(response.response_length <= _SHORT)
    return isinstance(body, (list, tuple)) and sum(map(len, body)) <= _SHORT


def _is_read(request: Any) -> bool:
    """Tell whether a request was received to its end, and nothing behind it."""
    buffered = request.unreader.buf.getbuffer().nbytes
    reader = request.body.reader
    if hasattr(reader, "length"):
        return bool(reader.length == buffered)
    return getattr(reader, "parser", True) is None and not buffered


class LastResponse:
    """Sends an ASGI application's response, which may turn out to be its connection's last.

    Args:
        worker: whose it is.
        connection: the socket, with its ``transport``.
        scope: of the request.
        send: sends a message.
    """

    def __init__(self, worker: HermesMixin, connection: Any, scope: Any, send: Any) -> None:
        self._worker = worker
        self._connection = connection
        self._scope = scope
        self._send = send

    async def __call__(self, message: Any) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            try:
                message = self._closing(message)
            except Exception:
                _failed(self._worker)
        await self._send(message)

    def _closing(self, message: Any) -> Any:
        if self._connection.transport is None:
            return message
        headers = [*message.get("headers", ())]
        message = {**message, "headers": headers}
        protocol = self._connection.transport.get_protocol()
        if (
            not self._is_short(message["status"], headers)
            or not _has_read(protocol)
            or not self._worker.closes(self._connection)
        ):
            return message
        if (request := getattr(protocol, "_current_request", None)) is not None:
            request.must_close = True  # gunicorn does not obey the header
        headers.append((b"connection", b"close"))
        return message

    def _is_short(self, status: int, headers: list[Any]) -> bool:
        known = {_bytes(name).lower(): value for name, value in headers}
        if status < 200 or b"connection" in known:  # the application's own decision
            return False
        if self._scope["method"] == "HEAD" or status in _NO_BODY:
            return True
        length = known.get(b"content-length")
        return length is not None and length.isdigit() and int(length) <= _SHORT


def _bytes(text: Any) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)


def _has_read(protocol: Any) -> bool:
    """Tell whether a protocol has its request to the end, and nothing behind it."""
    if (h11 := getattr(protocol, "conn", None)) is not None:  # uvicorn with h11
        return str(h11.their_state) == "DONE" and h11.trailing_data == (b"", False)
    if (cycle := getattr(protocol, "cycle", None)) is not None:  # uvicorn with httptools
        return not (cycle.more_body or protocol.pipeline) and protocol.scope is cycle.scope
    receiver = getattr(protocol, "_body_receiver", None)
    parser = getattr(protocol, "_callback_parser", None)
    if receiver is None or parser is None or getattr(protocol, "_current_request", None) is None:
        return False  # gunicorn's before 25.1, HTTP/2, websockets
    if not receiver._complete:
        return False
    # Before gunicorn 27 what comes behind a request is lost in any case.
    return not getattr(parser, "remaining_truncated", False) and not (
        hasattr(parser, "remaining") and parser.remaining()
    )

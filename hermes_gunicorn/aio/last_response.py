"""Which responses of an ASGI application may close their connection.

See ``core/keepalive.py`` for when that pays. Here it is kept from doing harm: the request must
have been received to its end, and nothing may have come behind it. What a protocol of unknown
make holds is not known, so that one keeps its connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hermes_gunicorn.core.keepalive import NO_BODY, SHORT_RESPONSE

if TYPE_CHECKING:
    from hermes_gunicorn.aio.serving import Serving

__all__ = ["LastResponse"]


class LastResponse:
    """Sends an ASGI application's response, which may turn out to be its connection's last.

    Args:
        worker: whose it is.
        connection: the socket, with its ``transport``.
        scope: of the request.
        send: sends a message.
    """

    def __init__(self, worker: Serving, connection: Any, scope: Any, send: Any) -> None:
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
                self._worker.keepalive_failed()
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
        if self._scope["method"] == "HEAD" or status in NO_BODY:
            return True
        length = known.get(b"content-length")
        return length is not None and length.isdigit() and int(length) <= SHORT_RESPONSE


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

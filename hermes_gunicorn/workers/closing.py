"""Which responses may close their connection, as the servers that send them see it.

``core/keepalive.py`` decides whether that pays. Here it is kept from doing harm: the response must
be known to end soon after it begins, the request must have been received to its end, and nothing
may have come behind it. What a server of unknown make holds is not known, so that one keeps
its connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gunicorn.http import message

from hermes_gunicorn.core.keepalive import NO_BODY, SHORT_RESPONSE

if TYPE_CHECKING:
    from gunicorn.config import Config

    from hermes_gunicorn.workers.mixin import HermesMixin

__all__ = ["is_cheap", "wsgi"]


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
                worker.keepalive_failed()
        return body

    return hermes


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
    if response.req.method == "HEAD" or response.status_code in NO_BODY:
        return True
    if response.response_length is not None:
        return bool(response.response_length <= SHORT_RESPONSE)
    return isinstance(body, (list, tuple)) and sum(map(len, body)) <= SHORT_RESPONSE


def _is_read(request: Any) -> bool:
    """Tell whether a request was received to its end, and nothing behind it."""
    buffered = request.unreader.buf.getbuffer().nbytes
    reader = request.body.reader
    if hasattr(reader, "length"):
        return bool(reader.length == buffered)
    return getattr(reader, "parser", True) is None and not buffered

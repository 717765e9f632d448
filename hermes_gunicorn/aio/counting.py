"""Requests, counted around the application that a connection's protocol calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hermes_gunicorn.aio.last_response import LastResponse
from hermes_gunicorn.aio.serving import Serving

if TYPE_CHECKING:
    from hermes_gunicorn.aio.server import Connection

__all__ = ["count_requests"]


class _ConnectionConfig:
    """Uvicorn's configuration as one connection's protocols see it: with their own application."""

    def __init__(self, config: Any, app: Any) -> None:
        self._config = config
        self.loaded_app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def count_requests(worker: Serving, connection: Connection, protocol: Any) -> bool:
    """Count the requests of a connection; return whether that is possible.

    The server has decided by now how to call the application (ASGI 2 or 3, WSGI, a factory),
    so whatever its protocol calls is counted. The connection is part of what is called, not a
    context variable: uvicorn can be told to give each request an empty context.
    """
    found = False
    if hasattr(protocol, "app"):
        protocol.app = _counting(worker, protocol.app, connection)
        found = True
    config: Any = getattr(protocol, "config", None)
    if hasattr(config, "loaded_app"):  # uvicorn's; for protocols that take over from this one
        app = _counting(worker, config.loaded_app, connection)
        protocol.config = _ConnectionConfig(config, app)
        found = True
    return found


def _counting(worker: Serving, app: Any, connection: Connection) -> Any:
    """Count the application's requests while they are in flight."""
    publisher = worker.publisher

    async def hermes(scope: Any, receive: Any, send: Any) -> None:
        if connection.first_request:
            connection.first_request = False
            worker.starts(connection)
        else:
            publisher.began()
        worker.keeping.began()
        if (
            worker.keeping.closing
            and scope["type"] == "http"
            and scope["http_version"].startswith("1")
        ):
            send = LastResponse(worker, connection, scope, send)
        try:
            await app(scope, receive, send)
        finally:
            publisher.ended()

    return hermes

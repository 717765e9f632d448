"""The ASGI application under test in other forms than a coroutine function."""

import asyncio
import contextvars

from apps import asgi

USER = contextvars.ContextVar("user", default="")


def function(scope, receive, send):
    """Return an awaitable, and be no coroutine function."""
    return asgi(scope, receive, send)


class Double:
    """ASGI 2: first the scope, then the rest."""

    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        """Serve."""
        await asgi(self.scope, receive, send)


def factory():
    """Make the application."""
    return asgi


async def remembering(scope, receive, send):
    """Answer /user with a context variable that other requests set, on other connections."""
    if scope["type"] != "http" or scope["path"] != "/user":
        await asgi(scope, receive, send)
        return
    seen = USER.get().encode()
    USER.set("somebody")
    await asyncio.sleep(0.005)
    asgi_block = {**scope, "path": "/block", "query_string": b"0.02"}

    async def answer(message):
        if message["type"] == "http.response.start":
            length = (b"content-length", str(len(seen)).encode())
            message = {**message, "headers": [length, (b"connection", b"close")]}
        elif message["type"] == "http.response.body":
            message = {**message, "body": seen}
        await send(message)

    await asgi(asgi_block, receive, answer)

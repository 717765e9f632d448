"""What worker classes on an asyncio loop have in common, gunicorn's own and others'.

They all have the loop serve gunicorn's sockets by ``create_server``, which accepts all
that waits, and more than its share. Here the worker accepts, and hands connections to
the loop one by one. Requests are counted around the ASGI application.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import socket
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from hermes_gunicorn.dispatch.shared import PAUSE
from hermes_gunicorn.table import Publisher
from hermes_gunicorn.workers.closing import LastResponse
from hermes_gunicorn.workers.mixin import HANDSHAKE_GRACE, HermesMixin

__all__ = ["HermesAsyncioMixin"]

_NOBODY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)
_AT_A_TIME: Final = 16  # connections, before others have their turn of the loop
_WITH_SIBLINGS: Final = 4  # the same; nobody else can serve those behind one that holds it
_TURNS_TO_START: Final = 8  # of the loop, from accepting a connection to its request; 3 to 5
_STARTS_WITHIN: Final = 0.005  # seconds from accepting a connection to its request, mostly
_NO_FILES: Final = 1.0  # seconds to wait when no more can be opened, as asyncio does


class _Connection(socket.socket):
    """Tells when it is closed: asyncio closes the socket object, uvloop detaches it."""

    worker: HermesAsyncioMixin | None = None
    transport: Any = None
    first_request: bool  # published, but it has not come yet

    def _ended(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            if self.first_request:
                worker.publisher.ended()
            worker.closed()

    def close(self) -> None:
        self._ended()
        super().close()

    def detach(self) -> int:
        self._ended()
        return super().detach()


_connection: ContextVar[_Connection | None] = ContextVar("hermes_connection", default=None)


def _counting(worker: HermesAsyncioMixin, app: Any) -> Any:
    """Count the application's requests while they are in flight."""
    publisher = worker.publisher
    if not inspect.iscoroutinefunction(app) and not inspect.iscoroutinefunction(
        getattr(app, "__call__", None)  # noqa: B004  (not whether it can be called)
    ):
        return app  # of some older interface

    async def hermes(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        connection = _connection.get()
        if connection is not None and connection.first_request:
            connection.first_request = False
            worker.starts()
        else:
            publisher.began()
        worker.keeping.began()
        if (
            worker.keeping.closing
            and connection is not None
            and scope["type"] == "http"
            and scope["http_version"].startswith("1")
        ):
            send = LastResponse(worker, connection, scope, send)
        try:
            await app(scope, receive, send)
        finally:
            publisher.ended()

    return hermes


class _Server:
    """Accepts from one of the worker's listeners; what ``create_server`` returns."""

    def __init__(
        self, worker: HermesAsyncioMixin, index: int, factory: Callable[[], Any], ssl: Any
    ) -> None:
        self._worker = worker
        self._listener = worker.sockets[index].sock
        self._index = index
        self._own = worker.exclusive()[index]
        self._alone = worker.cfg.workers == 1
        self._factory = factory
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._closed = False
        self._connecting = 0
        self.sockets = (self._listener,)

    def follow(self) -> None:
        """Watch the listener if it is to be served now."""
        wanted = not self._closed and self._worker.has_room() and self._worker.serves(self._index)
        if wanted and not self._watching:
            self._loop.add_reader(self._listener.fileno(), self._on_readable)
        elif self._watching and not wanted:
            self._loop.remove_reader(self._listener.fileno())
        self._watching = wanted

    def _on_readable(self) -> None:
        # A sibling may have taken what woke it up; uvloop tells of a turn with work only.
        self._worker.publisher.turns()
        if self._worker.turns_to_start and not self._alone:
            self._worker.turns_to_start -= 1
            return  # if the requests accepted last hold the loop, siblings take what waits
        for _ in range(_AT_A_TIME if self._alone else _WITH_SIBLINGS):
            if not self._worker.has_room() or not (self._own or self._worker.admits(self._index)):
                break
            if not self.take_from(self._listener, self._own):
                return
        self._resume()

    def _resume(self) -> None:
        pauses = self._worker.until_served()
        self.follow()
        if pauses and not self._watching and not self._closed:
            self._loop.call_later(PAUSE, self._resume)

    def take_from(self, listener: Any, own: bool) -> bool:
        """Accept a connection; return whether there was one."""
        try:
            fd, _ = listener._accept()
        except OSError as error:
            if error.errno in _NOBODY:
                return False
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._worker.log.error("hermes: cannot accept: %s", error.strerror)
            if self._watching:
                self._loop.remove_reader(self._listener.fileno())
                self._watching = False
                self._loop.call_later(_NO_FILES, self.follow)
            return False
        connection = _Connection(listener.family, listener.type, listener.proto, fileno=fd)
        connection.setblocking(False)
        connection.first_request = True
        connection.worker = self._worker
        self._worker.publisher.opened(own)
        self._worker.accepted()
        self._connecting += 1
        self._loop.create_task(self._serve(connection))
        return True

    async def _serve(self, connection: _Connection) -> None:
        _connection.set(connection)  # for all tasks that serve it
        try:
            connection.transport, _ = await self._loop.connect_accepted_socket(
                lambda: self._protocol(connection), sock=connection, ssl=self._ssl
            )
        except OSError as error:  # the client is gone, or did not speak TLS
            self._worker.log.debug("hermes: connection failed: %s", error)
            connection.close()
        except BaseException:
            connection.close()
            raise
        finally:
            self._connecting -= 1

    def _protocol(self, connection: _Connection) -> Any:
        """Make the connection's protocol; uvicorn's closes, at a stop, what has not spoken yet."""
        protocol = self._factory()
        shutdown = getattr(protocol, "shutdown", None)
        if shutdown is not None:

            def shutdown_if_open() -> None:
                if connection.worker is not None:
                    shutdown()

            def shutdown_in_time() -> None:
                if connection.first_request:
                    self._loop.call_later(HANDSHAKE_GRACE, shutdown_if_open)
                else:
                    shutdown()

            protocol.shutdown = shutdown_in_time
        return protocol

    def close(self) -> None:
        """Be chosen no more; ``wait_closed`` takes what was sent here until now."""
        if not self._closed:
            self._worker.leave()
            self._closed = True
            self.follow()

    def is_serving(self) -> bool:
        return not self._closed

    async def wait_closed(self) -> None:
        """Take what is still on its way here; the worker waits for its connections itself.

        Unless the listener is closed, as uvicorn does: then siblings take it.
        """
        while (expects := self._expects()) or self._connecting:
            taken = expects and self.take_from(self._listener, True)
            await asyncio.sleep(0 if taken else 0.005)

    def _expects(self) -> bool:
        return self._own and self._listener.fileno() >= 0 and self._worker.awaits([self._listener])


class HermesAsyncioMixin(HermesMixin):
    """Goes before a worker class that serves ASGI on an asyncio loop.

    The class has a coroutine ``_serve`` that calls the running loop's ``create_server`` for
    each of ``sockets``, and its application in ``asgi`` or ``wsgi``. gunicorn's own does,
    and so does ``uvicorn_worker.UvicornWorker``.
    """

    asgi: Any
    wsgi: Any
    turns_to_start = 0
    _leaving = False
    _starting: asyncio.TimerHandle | None = None
    _look_timer: asyncio.TimerHandle | None = None

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._servers: dict[int, _Server] = {}
        self._room = getattr(self, "worker_connections", self.cfg.worker_connections)
        create_server = loop.create_server

        async def create(factory: Any, *args: Any, **options: Any) -> Any:
            index = self._index_of(options.get("sock"))
            if index is None:
                return await create_server(factory, *args, **options)
            self._servers[index] = _Server(self, index, factory, options.get("ssl"))
            if len(self._servers) == len(self.sockets):
                self._start()
            return self._servers[index]

        loop.create_server = create  # type: ignore[method-assign, assignment]
        name = "asgi" if hasattr(self, "asgi") else "wsgi"
        setattr(self, name, _counting(self, getattr(self, name)))
        _watch_poll(loop, self.publisher)
        await super()._serve()

    def _index_of(self, sock: Any) -> int | None:
        if sock is not None and sock.fileno() >= 0:
            for index, listener in enumerate(self.sockets):
                if listener.fileno() == sock.fileno():
                    return index
        return None

    def _start(self) -> None:
        for sock in self.sockets:
            sock.setblocking(False)
        self.begin(self._room, self._take, self.has_room)
        self._each_second()
        self.look_again()

    def _each_second(self) -> None:
        """See to the row and follow changes in who serves what.

        uvicorn's worker notifies the arbiter far more seldom.
        """
        self._loop.call_later(1.0, self._each_second)
        self.mend()
        self._follow()

    def _take(self, index: int, listener: Any) -> bool:
        return self._servers[index].take_from(listener.sock, own=False)

    def has_room(self) -> bool:
        """Tell whether one more connection may be accepted."""
        return self._starting is None and bool(self.publisher.connections < self._room)

    def accepted(self) -> None:
        """Where requests hold the loop, accept no more until this one's has begun.

        A sibling may serve the others sooner. Some turns of the loop lie in between.
        """
        self.turns_to_start = _TURNS_TO_START
        if self.holds and self._starting is None and not self._leaving:
            self._starting = self._loop.call_later(_STARTS_WITHIN, self.starts)

    def starts(self) -> None:
        """The request has begun, or there was none."""
        self.turns_to_start = 0
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
            self._follow()

    def closed(self) -> None:
        """A connection was closed."""
        was_full = self.publisher.connections >= self._room
        self.publisher.closed()
        if was_full:
            self._follow()

    def wake_in(self, seconds: float) -> None:
        """Have the loop call ``look_again``."""
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._look_timer = self._loop.call_later(seconds, self.look_again)

    def _follow(self) -> None:
        for server in self._servers.values():
            server.follow()

    def leave(self) -> None:
        """Be chosen no more."""
        if not self._leaving:
            self._leaving = True
            super().leave()


def _watch_poll(loop: Any, publisher: Publisher) -> None:
    """Have both edges of poll published."""
    selector = getattr(loop, "_selector", None)
    if selector is not None:
        poll = selector.select

        def select(timeout: float | None = None) -> Any:
            publisher.polls()
            # What was taken from a sibling just now is to be served now.
            events = poll(0 if loop._ready else timeout)
            publisher.woke()
            return events

        selector.select = select
    else:
        _watch_calls(loop, publisher)


def _watch_calls(loop: Any, publisher: Publisher) -> None:
    """Do the same for a loop that does not show its poll: uvloop.

    All that takes long there comes by ``call_soon``: the steps of tasks, and the waking
    of those that wait. So the worker is busy from the first such call of a turn until
    after a turn without one.
    """
    call_soon = loop.call_soon
    busy = more = False

    def start() -> None:
        publisher.woke()

    def end() -> None:
        nonlocal busy, more
        if more:
            more = False
            publisher.polls()
            publisher.woke()
            call_soon(end)
        else:
            busy = False
            publisher.polls()

    def call(callback: Any, *args: Any, context: Any = None) -> Any:
        nonlocal busy, more
        if busy:
            more = True
        else:
            busy = True
            call_soon(start)
            handle = call_soon(callback, *args, context=context)
            call_soon(end)
            return handle
        return call_soon(callback, *args, context=context)

    loop.call_soon = call

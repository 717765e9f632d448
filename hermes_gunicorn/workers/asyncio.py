"""What worker classes on an asyncio loop have in common, gunicorn's own and others'.

They all have the loop serve gunicorn's sockets by ``create_server``, which accepts all
that waits, and more than its share. Here the worker accepts, and hands connections to
the loop one by one. Requests are counted around the ASGI application.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import resource
import signal
import socket
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Mapping
from typing import Any, Final

from hermes_gunicorn.core.admission import PAUSE
from hermes_gunicorn.core.layout import WEIGHT
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.workers.closing import LastResponse
from hermes_gunicorn.workers.mixin import HANDSHAKE_GRACE, HermesMixin

__all__ = ["HermesAsyncioMixin"]

_NOBODY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)
_AT_A_TIME: Final = 16  # connections, before others have their turn of the loop
_WITH_SIBLINGS: Final = 4  # the same; nobody else can serve those behind one that holds it
_TURNS_TO_START: Final = 8  # of the loop, from accepting a connection to its request; 3 to 5
_STARTS_WITHIN: Final = 0.005  # seconds from accepting a connection to its request, mostly
_AFTER_WAITING_IN_VAIN: Final = 20 * _STARTS_WITHIN  # seconds until a request is waited for again
_SOON: Final = 1.0  # seconds in which a worker creates its servers
_NO_FILES: Final = 1.0  # seconds to wait when no more can be opened, as asyncio does
_AFTER_GRACE: Final = 1.0  # seconds more than graceful_timeout, for a worker without an arbiter


def _nothing() -> None:
    pass


class _Connection(socket.socket):
    """Tells when it is closed: asyncio closes the socket object, uvloop detaches it."""

    server: _Server | None = None
    serving: asyncio.Task[None]  # until it has a transport
    transport: Any = None
    first_request: bool  # published, but it has not come yet

    def _ended(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.ended(self)

    def close(self) -> None:
        self._ended()
        super().close()

    def detach(self) -> int:
        self._ended()
        return super().detach()

    def has_data(self) -> bool:
        """Tell whether the client has sent something, so that a request is about to begin."""
        try:
            return bool(self.recv(1, socket.MSG_PEEK))
        except OSError:
            return False  # nothing yet, or the client is gone


class _ConnectionConfig:
    """Uvicorn's configuration as one connection's protocols see it: with their own application."""

    def __init__(self, config: Any, app: Any) -> None:
        self._config = config
        self.loaded_app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _count_requests(worker: HermesAsyncioMixin, connection: _Connection, protocol: Any) -> bool:
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


def _counting(worker: HermesAsyncioMixin, app: Any, connection: _Connection) -> Any:
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


class _Server(asyncio.AbstractServer):
    """Accepts from one of the worker's listeners; what ``create_server`` returns.

    Args:
        worker: whose listener it is.
        index: of the listener in ``worker.sockets``.
        factory: makes a connection's protocol.
        options: those of ``create_server``.
    """

    def __init__(
        self,
        worker: HermesAsyncioMixin,
        index: int,
        factory: Callable[[], Any],
        options: Mapping[str, Any],
    ) -> None:
        self._worker = worker
        self._listener = worker.sockets[index].sock
        self._index = index
        self._own = worker.exclusive()[index]
        self._factory = factory
        self._backlog = options.get("backlog")
        ssl_options = ("ssl", "ssl_handshake_timeout", "ssl_shutdown_timeout")
        self._ssl = {name: options[name] for name in ssl_options if options.get(name) is not None}
        self._loop = asyncio.get_running_loop()
        # Connections are accepted in this context whoever has the listener watched again,
        # which may be a request that has context variables of its own.
        self._context = contextvars.copy_context()
        self._serving = False
        self._watching = False
        self._closed = False
        self._closing = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._forever: asyncio.Future[None] | None = None
        self._connecting = 0
        self._connections: set[_Connection] = set()

    def __repr__(self) -> str:
        return f"<hermes server sockets={self.sockets!r}>"

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listener; none after ``close``."""
        return () if self._closed else (TransportSocket(self._listener),)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that serves."""
        return self._loop

    def is_serving(self) -> bool:
        """Tell whether connections are accepted."""
        return self._serving

    async def start_serving(self) -> None:
        """Accept from now on."""
        self.start()

    async def serve_forever(self) -> None:
        """Accept until this is cancelled or the server closed."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._closed:
            raise RuntimeError(f"server {self!r} is closed")
        self.start()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def start(self) -> None:
        """Accept, as soon as the worker does."""
        if self._closed or self._serving:
            return
        if self._backlog is not None:  # else it stays the one that gunicorn was given
            self._listener.listen(self._backlog)
        self._serving = True
        self._worker.begin_serving()
        self.follow()

    def follow(self) -> None:
        """Watch the listener if it is to be served now."""
        wanted = self._serving and self._worker.has_room() and self._worker.serves(self._index)
        if wanted and not self._watching:
            self._loop.add_reader(self._listener.fileno(), self._on_readable)
        elif self._watching and not wanted:
            self._loop.remove_reader(self._listener.fileno())
        self._watching = wanted

    def _on_readable(self) -> None:
        # A sibling may have taken what woke it up; uvloop tells of a turn with work only.
        self._worker.publisher.turns()
        alone = self._worker.alone()
        if self._worker.turns_to_start and not alone:
            self._worker.turns_to_start -= 1
            return  # if the requests accepted last hold the loop, siblings take what waits
        with_data = 0
        for _ in range(_AT_A_TIME):
            if not self._worker.has_room() or not (self._own or self._worker.admits(self._index)):
                break
            connection = self._accept(self._listener, self._own)
            if connection is None:
                return
            if not alone and connection.has_data():
                with_data += 1
                self._worker.wait_for(connection)
                if with_data == _WITH_SIBLINGS:
                    break
        self._resume()

    def _resume(self) -> None:
        pauses = self._worker.until_served()
        self.follow()
        if pauses and not self._watching and self._serving:
            self._loop.call_later(PAUSE, self._resume)

    def take_from(self, listener: Any, own: bool) -> bool:
        """Accept a connection; return whether there was one."""
        connection = self._accept(listener, own)
        if connection is None:
            return False
        if connection.has_data():
            self._worker.wait_for(connection)
        return True

    def _accept(self, listener: Any, own: bool) -> _Connection | None:
        try:
            fd, _ = listener._accept()
        except OSError as error:
            if error.errno in _NOBODY:
                return None
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._worker.out_of_files(error)
            return None
        connection = _Connection(listener.family, listener.type, listener.proto, fileno=fd)
        connection.setblocking(False)
        connection.first_request = True
        connection.server = self
        self._connections.add(connection)
        self._worker.publisher.opened(own)
        self._connecting += 1
        connection.serving = self._context.run(self._loop.create_task, self._serve(connection))
        return connection

    async def _serve(self, connection: _Connection) -> None:
        try:
            connection.transport, _ = await self._loop.connect_accepted_socket(
                lambda: self._protocol(connection), sock=connection, **self._ssl
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
        if not _count_requests(self._worker, connection, protocol):
            self._worker.cannot_count(protocol)
        shutdown = getattr(protocol, "shutdown", None)
        if shutdown is not None:

            def shutdown_if_open() -> None:
                if connection.server is not None:
                    shutdown()

            def shutdown_in_time() -> None:
                if connection.first_request:
                    self._loop.call_later(HANDSHAKE_GRACE, shutdown_if_open)
                else:
                    shutdown()

            protocol.shutdown = shutdown_in_time
        return protocol

    def ended(self, connection: _Connection) -> None:
        """A connection was closed."""
        self._connections.discard(connection)
        if connection.first_request:
            self._worker.publisher.ended()
            self._worker.starts(connection)
        self._worker.publisher.closed()

    def close(self) -> None:
        """Be chosen no more; take what was sent here until now, and close the listener.

        A listener that stays open makes clients wait for a worker that is about to end, and
        keeps the address from a new server if the arbiter is gone.
        """
        if self._closed:
            return
        self._closed = True
        self._serving = False
        self.follow()
        self._worker.server_closed()
        if self._forever is not None:
            self._forever.cancel()
        if self._own:
            self._ending = self._loop.create_task(self._end())
        else:
            self._listener.close()
        self._closing.set()

    async def _end(self) -> None:
        try:
            # Unless somebody closes the listener, as uvicorn does: then siblings take it.
            while self._listener.fileno() >= 0 and self._worker.awaits([self._listener]):
                taken = self.take_from(self._listener, True)
                await asyncio.sleep(0 if taken else 0.005)
        finally:
            self._listener.close()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and what was on its way here is accepted.

        The worker waits for its connections itself, also for those that say nothing.
        """
        await self._closing.wait()
        if self._ending is not None:
            await asyncio.wait([self._ending])  # which goes on if this is cancelled
        while self._connecting and self._worker.in_grace():
            await asyncio.sleep(0.005)

    def close_clients(self) -> None:
        """Close the connections that are open."""
        for connection in list(self._connections):
            if connection.transport is None:
                connection.serving.cancel()
            else:
                connection.transport.close()

    def abort_clients(self) -> None:
        """Close the connections that are open, without sending what is left to send."""
        for connection in list(self._connections):
            if connection.transport is None:
                connection.serving.cancel()
            else:
                connection.transport.abort()


class HermesAsyncioMixin(HermesMixin):
    """Goes before a worker class that serves ASGI on an asyncio loop.

    The class has a coroutine ``_serve`` that calls the running loop's ``create_server`` for
    each of ``sockets``. Protocols have their application in ``app`` or ``config.loaded_app``.
    So it is with gunicorn's own class and with ``uvicorn_worker.UvicornWorker``.
    """

    turns_to_start = 0
    _awaited: _Connection | None = None
    _waiting_ends: asyncio.Handle | None = None
    _waits_from = 0.0  # in the loop's time
    _begun = False
    _has_files = True
    _leaving = False
    _orphaned = False
    _counts = True
    _look_timer: asyncio.TimerHandle | None = None

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._servers: dict[int, _Server] = {}
        create_server = loop.create_server

        async def create(factory: Any, *args: Any, **options: Any) -> Any:
            index = self._index_of(options.get("sock"))
            if index is None:
                return await create_server(factory, *args, **options)
            await self._check_options(create_server, factory, *args, **options)
            server = self._servers[index] = _Server(self, index, factory, options)
            if options.get("start_serving", True):
                server.start()
            return server

        loop.create_server = create  # type: ignore[method-assign, assignment]
        _watch_poll(loop, self.publisher)
        await super()._serve()

    async def _check_options(self, create_server: Any, *args: Any, **options: Any) -> None:
        """Have the loop itself refuse what it would refuse, by a server that does not serve."""
        listener = options["sock"]
        with socket.socket(listener.family, listener.type) as unbound:
            server = await create_server(
                *args, **options | {"sock": unbound, "start_serving": False}
            )
            server.close()

    def _index_of(self, sock: Any) -> int | None:
        if sock is not None:
            for index, listener in enumerate(self.sockets):
                if sock is listener or sock is listener.sock:
                    return index
        return None

    def begin_serving(self) -> None:
        """Accept from now on. The servers of other listeners are made at once, or never."""
        if self._begun:
            return
        self._begun = True
        for listener in self.sockets:
            listener.setblocking(False)
        # There is no limit but that of open files; where that is infinite it is negative.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        capacity = files if files > 0 else WEIGHT
        try:
            self.begin(capacity, self._take, self.has_room)
        except Exception:
            self.log.exception(
                "hermes: unexpected error; this worker serves, but does not take over other"
                " workers' pending connections"
            )
            self.publisher.ready(capacity)
        self._loop.call_later(_SOON, self._tell_what_is_not_served)
        self._each_second()
        self.look_again()

    def _tell_what_is_not_served(self) -> None:
        if self._leaving:
            return  # uvicorn has closed them
        unserved = {str(s) for index, s in enumerate(self.sockets) if index not in self._servers}
        if unserved:
            self.log.warning(
                "hermes: no server was created for %s in this worker; connections that arrive"
                " for it there wait for other workers",
                ", ".join(sorted(unserved)),
            )

    def _each_second(self) -> None:
        """See to the row and follow changes in who serves what.

        uvicorn's worker notifies the arbiter far more seldom, and does not look whether
        there is one.
        """
        self._loop.call_later(1.0, self._each_second)
        self._loop.call_soon(_nothing)  # or uvloop's turn is none, to others
        if os.getppid() != self.ppid and not (self._leaving or self._orphaned):
            self._orphaned = True
            self._leave_as_told()
        self.mend()
        self._follow()

    def _leave_as_told(self) -> None:
        """Do what the arbiter would have this worker do, were it still there."""
        self.log.info("Parent changed, shutting down: %s", self)
        os.kill(os.getpid(), signal.SIGTERM)
        # Who has not finished by then is not to be waited for any longer.
        after = self.cfg.graceful_timeout + _AFTER_GRACE
        self._loop.call_later(after, os.kill, os.getpid(), signal.SIGINT)

    def _take(self, index: int, listener: Any) -> bool:
        server = self._servers.get(index)
        return server is not None and server.take_from(listener.sock, own=False)

    def accept_own(self, index: int) -> bool:
        """Accept what the loop did not report."""
        server = self._servers.get(index)
        return bool(
            server and self.has_room() and server.take_from(self.sockets[index].sock, own=True)
        )

    def has_room(self) -> bool:
        """Tell whether one more connection may be accepted."""
        return self._begun and self._has_files and self._awaited is None

    def out_of_files(self, error: OSError) -> None:
        """Leave what comes to other workers for a while."""
        if self._has_files:
            self._has_files = False
            self._follow()
            self._loop.call_later(_NO_FILES, self._try_files_again)
            self.log.error(
                "hermes: cannot accept connections: %s. They wait, or other workers take them over;"
                " trying again in %g s",
                error.strerror,
                _NO_FILES,
            )

    def _try_files_again(self) -> None:
        self._has_files = True
        self._follow()

    def wait_for(self, connection: _Connection) -> None:
        """Accept no more until this connection's request has begun.

        If it holds the loop a sibling may serve the others sooner. Some turns of the loop lie in
        between. Only to be called for one whose client has sent something: one that says
        nothing would be waited for in vain. Where all that comes is no request, though it says
        something, little time is spent with waiting for that.
        """
        if not self.holds:
            self.turns_to_start = _TURNS_TO_START
        elif self._awaited is None and not self._leaving and self._loop.time() >= self._waits_from:
            self._awaited = connection
            self._waiting_ends = self._loop.call_later(
                _STARTS_WITHIN, self._wait_in_vain, _TURNS_TO_START
            )

    def _wait_in_vain(self, turns: int) -> None:
        """End the wait, after some more turns, for other requests may have held the loop."""
        if turns:
            self._waiting_ends = self._loop.call_soon(self._wait_in_vain, turns - 1)
        elif self._awaited is not None:
            self._waits_from = self._loop.time() + _AFTER_WAITING_IN_VAIN
            self.starts(self._awaited)

    def starts(self, connection: _Connection) -> None:
        """A connection's first request has begun, or will never come."""
        self.turns_to_start = 0
        if connection is self._awaited and self._waiting_ends is not None:
            self._waiting_ends.cancel()
            self._awaited = self._waiting_ends = None
            self._follow()

    def cannot_count(self, protocol: Any) -> None:
        """Say once that this server's requests are not seen."""
        if self._counts:
            self._counts = False
            self.log.warning(
                "hermes: cannot count the requests of %s; each of its connections counts as one"
                " request while it is open",
                type(protocol).__name__,
            )

    def wake_in(self, seconds: float) -> None:
        """Have the loop call ``look_again``."""
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._look_timer = self._loop.call_later(seconds, self.look_again)

    def _follow(self) -> None:
        for server in self._servers.values():
            server.follow()

    def server_closed(self) -> None:
        """Be chosen no more if none of the servers accepts."""
        if not any(server.is_serving() for server in self._servers.values()):
            self.leave()

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

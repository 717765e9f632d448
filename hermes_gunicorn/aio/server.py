"""What stands in for the server that asyncio's ``create_server`` makes.

That one accepts all that waits, and more than a worker's share. This one accepts for the worker,
and hands connections to the loop one by one. Requests are counted around the ASGI application.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import socket
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Mapping
from typing import Any, Final

from hermes_gunicorn.aio.counting import count_requests
from hermes_gunicorn.aio.serving import Serving
from hermes_gunicorn.core.admission import PAUSE

__all__ = ["Connection", "Server"]

_NOBODY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)
_AT_A_TIME: Final = 16  # connections, before others have their turn of the loop
_WITH_SIBLINGS: Final = 4  # the same; nobody else can serve those behind one that holds it


class Connection(socket.socket):
    """Tells its server when it is closed."""

    server: Server | None = None
    serving: asyncio.Task[None]  # until it has a transport
    transport: Any = None
    first_request: bool  # published, but it has not come yet

    def _ended(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.ended(self)

    def close(self) -> None:
        """As asyncio closes it."""
        self._ended()
        super().close()

    def detach(self) -> int:
        """As uvloop closes it."""
        self._ended()
        return super().detach()

    def has_data(self) -> bool:
        """Tell whether the client has sent something, so that a request is about to begin."""
        try:
            return bool(self.recv(1, socket.MSG_PEEK))
        except OSError:
            return False  # nothing yet, or the client is gone


class Server(asyncio.AbstractServer):
    """Accepts from one of the worker's listeners; what ``create_server`` returns.

    Args:
        worker: whose listener it is.
        index: of the listener in ``worker.sockets``.
        factory: makes a connection's protocol.
        options: those of ``create_server``.
    """

    def __init__(
        self,
        worker: Serving,
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
        self._connections: set[Connection] = set()

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

    def _accept(self, listener: Any, own: bool) -> Connection | None:
        try:
            fd, _ = listener._accept()
        except OSError as error:
            if error.errno in _NOBODY:
                return None
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._worker.out_of_files(error)
            return None
        connection = Connection(listener.family, listener.type, listener.proto, fileno=fd)
        connection.setblocking(False)
        connection.first_request = True
        connection.server = self
        self._connections.add(connection)
        self._worker.publisher.opened(own)
        self._connecting += 1
        connection.serving = self._context.run(self._loop.create_task, self._serve(connection))
        return connection

    async def _serve(self, connection: Connection) -> None:
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

    def _protocol(self, connection: Connection) -> Any:
        """Make the connection's protocol; uvicorn's closes, at a stop, what has not spoken yet."""
        protocol = self._factory()
        if not count_requests(self._worker, connection, protocol):
            self._worker.cannot_count(protocol)
        shutdown = getattr(protocol, "shutdown", None)
        if shutdown is not None:

            def shutdown_if_open() -> None:
                if connection.server is not None:
                    shutdown()

            def shutdown_in_time() -> None:
                if connection.first_request:
                    self._loop.call_later(self._worker.handshake_grace, shutdown_if_open)
                else:
                    shutdown()

            protocol.shutdown = shutdown_in_time
        return protocol

    def ended(self, connection: Connection) -> None:
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

"""Worker classes on an asyncio loop: ``hermes_asgi``, and what makes others ours.

They all have the loop serve gunicorn's sockets by ``create_server``; here ``aio/server.py``
stands in for what that makes.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any, Final

import gunicorn

from hermes_gunicorn.aio.poll import watch_poll
from hermes_gunicorn.aio.server import Connection, Server
from hermes_gunicorn.core.layout import WEIGHT
from hermes_gunicorn.workers.mixin import HermesMixin
from hermes_gunicorn.workers.unavailable import unavailable

if TYPE_CHECKING:
    ASGIWorker = Any
else:
    try:
        from gunicorn.workers.gasgi import ASGIWorker
    except ImportError:
        ASGIWorker = unavailable(
            f"hermes_asgi needs gunicorn 24 or later, this is {gunicorn.__version__}; upgrade it,"
            " or use uvicorn's worker (docs/workers.md)"
        )

__all__ = ["HermesASGIWorker", "HermesAsyncioMixin"]

_TURNS_TO_START: Final = 8  # of the loop, from accepting a connection to its request; 3 to 5
_STARTS_WITHIN: Final = 0.005  # seconds from accepting a connection to its request, mostly
_AFTER_WAITING_IN_VAIN: Final = 20 * _STARTS_WITHIN  # seconds until a request is waited for again
_SOON: Final = 1.0  # seconds in which a worker creates its servers
_NO_FILES: Final = 1.0  # seconds to wait when no more can be opened, as asyncio does
_AFTER_GRACE: Final = 1.0  # seconds more than graceful_timeout, for a worker without an arbiter


def _nothing() -> None:
    pass


class HermesAsyncioMixin(HermesMixin):
    """Goes before a worker class that serves ASGI on an asyncio loop.

    The class has a coroutine ``_serve`` that calls the running loop's ``create_server`` for
    each of ``sockets``. Protocols have their application in ``app`` or ``config.loaded_app``.
    So it is with gunicorn's own class and with ``uvicorn_worker.UvicornWorker``.
    """

    turns_to_start = 0
    _awaited: Connection | None = None
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
        self._servers: dict[int, Server] = {}
        create_server = loop.create_server

        async def create(factory: Any, *args: Any, **options: Any) -> Any:
            index = self._index_of(options.get("sock"))
            if index is None:
                return await create_server(factory, *args, **options)
            await self._check_options(create_server, factory, *args, **options)
            server = self._servers[index] = Server(self, index, factory, options)
            if options.get("start_serving", True):
                server.start()
            return server

        loop.create_server = create  # type: ignore[method-assign, assignment]
        watch_poll(loop, self.publisher)
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

    def wait_for(self, connection: Connection) -> None:
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

    def starts(self, connection: Connection) -> None:
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


class HermesASGIWorker(HermesAsyncioMixin, ASGIWorker):  # type: ignore[misc]
    """gunicorn's ASGI worker with a slot of its own."""

    def handle_exit_signal(self) -> None:
        """Be chosen no more from here on; what is on its way is still accepted."""
        super().handle_exit_signal()
        self.leave()

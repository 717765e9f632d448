"""``hermes`` and ``hermes_gevent_pywsgi``: gunicorn's gevent workers, with their state published.

Every hook into gevent is a point the loop passes anyway: the edges of poll, the
accept of a connection, its end.
"""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from typing import Any

import gevent
from gevent import getcurrent, socket
from gevent.hub import get_hub
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler
from gevent.server import StreamServer
from gunicorn.http.wsgi import base_environ
from gunicorn.sock import ssl_context
from gunicorn.workers import ggevent

from hermes_gunicorn.core.admission import PAUSE
from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.core.policy import NEVER
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.workers import closing
from hermes_gunicorn.workers.mixin import HermesMixin

__all__ = ["HermesGeventPyWSGIWorker", "HermesGeventWorker", "PublishingServer"]

_NOBODY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED)
_LAST, _FIRST = -2, 2  # libev's priorities


def _nothing() -> None:
    pass


class _Listener:
    """A listener whose name is known when it is closed, too; gunicorn asks for that."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._name = sock.getsockname()

    def getsockname(self) -> Any:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class PublishingServer(StreamServer):  # type: ignore[misc]
    """Counts what it accepts and what it closes."""

    worker: HermesGeventWorker
    index: int  # in worker.sockets
    publisher: Publisher
    exclusive: bool
    _pause: Any = None

    def start_accepting(self) -> None:
        """Watch the listener, unless it is for other workers to serve."""
        if self.serves():
            super().start_accepting()

    def follow(self) -> None:
        """Obey a change of who serves this listener, and of how many do."""
        self.max_accept = super().max_accept if self.worker.alone() else 1
        if not self.serves():
            self.stop_accepting()
        elif self.started and not self.full():
            self.start_accepting()

    def serves(self) -> bool:
        """Tell whether to watch the listener now."""
        return self.worker.serves(self.index)

    def _leave_to_others(self) -> None:
        """Sleep until the pause is over."""
        self.stop_accepting()
        if self._pause is None:
            self._pause = self.loop.timer(PAUSE, ref=False)
        self._pause.start(self._resume)

    def _resume(self) -> None:
        if self.started and self.worker.until_served():
            self._pause.start(self._resume)
        self.follow()

    def do_read(self) -> Any:
        """Accept a connection, if this worker is to have it."""
        if not (self.exclusive or self.worker.admits(self.index)):
            return self._leave_to_others()
        if self.worker.holds and self.worker.has_just_accepted():
            return None  # this one may still find a sibling who serves it sooner
        connection = super().do_read()
        if connection:
            self.worker.accepted_in = self.publisher.turn
            self.publisher.opened(self.exclusive)
        return connection

    def take_from(self, listener: Any) -> bool:
        """Accept from another listener of the same address."""
        try:
            fd, address = listener.sock._accept()
        except OSError as error:
            if error.errno in _NOBODY:
                return False
            raise
        client = socket.socket(listener.sock.family, listener.sock.type, fileno=fd)
        self.publisher.opened(False)
        self.do_handle(client, address)  # or closes it
        return True

    def do_close(self, *connection: Any) -> None:
        """Close a connection, whose first request may never have come."""
        if not getattr(getcurrent(), "hermes_served", False):
            self.publisher.ended()
        self.publisher.closed()
        super().do_close(*connection)


class _Handler(WSGIHandler):  # type: ignore[misc]
    """Counts the requests of a connection while they are in flight; goes before pywsgi's."""

    def handle_one_response(self) -> None:
        worker = self.server.worker
        worker.began()
        worker.nr += 1
        if worker.alive and worker.nr >= worker.max_requests:  # stock pywsgi has no such limit
            worker.log.info("Autorestarting worker after current request.")
            worker.alive = False
        try:
            super().handle_one_response()
        finally:
            self.server.publisher.ended()


class HermesGeventWorker(HermesMixin, ggevent.GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker with a slot of its own.

    ``server_class`` and ``wsgi_handler`` are what they are in ``GeventWorker``, so this may go
    before any worker class that is made from that.
    """

    never_called = ("run",)

    wsgi: Any
    accepted_in = 0  # which turn of the loop; 1 is the next
    _look_timer: Any = None
    _is_orphan = False

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse a server that cannot be made to publish."""
        super().check_config(cfg, log)
        if not issubclass(cls.server_class or StreamServer, StreamServer):
            raise HermesError(
                f"{cls.__name__}.server_class is not a subclass of gevent.server.StreamServer,"
                " which hermes workers need; use the stock gevent worker class with it"
            )

    def init_process(self) -> None:
        """Run the worker. pywsgi's responses are none of gunicorn's to close."""
        self.may_close = self.server_class is None
        super().init_process()

    def run(self) -> None:
        """Serve until told to stop, then drain. Follows ``GeventWorker.run``."""
        self._watch_poll()
        self.wsgi = closing.wsgi(self, self.wsgi)
        self._servers = servers = self._start_servers()
        if self.alive:
            self.begin(self.worker_connections, self._take, self._has_room)
            self.look_again()
        while self.alive:
            self.notify()
            for server in servers:
                server.follow()
            gevent.sleep(1.0)
        try:
            self._drain(servers)
        except Exception:
            self.log.exception("hermes: error while draining")

    def _watch_poll(self) -> None:
        """Have both edges of poll published.

        gevent runs its callbacks, and with them greenlets, in a prepare watcher of
        its own: ours comes after it, and before all that poll has found.
        """
        loop = get_hub().loop
        self._at_once = loop.timer(0, ref=False)
        self._poll_watchers = (
            loop.prepare(ref=False, priority=_LAST),
            loop.check(ref=False, priority=_FIRST),
        )
        before, after = self._poll_watchers
        before.start(self.publisher.polls)
        after.start(self.publisher.woke)

    def _start_servers(self) -> list[PublishingServer]:
        ssl_args = {"ssl_context": ssl_context(self.cfg)} if self.cfg.is_ssl else {}
        base = self.server_class or StreamServer
        server_class = type(base.__name__, (PublishingServer, base), {})
        pools: dict[Any, Pool] = {}
        servers = []
        for i, (sock, exclusive) in enumerate(zip(self.sockets, self.exclusive(), strict=True)):
            sock.setblocking(1)
            # As in stock gunicorn worker_connections holds for each bind address,
            # of which the slot's own listener and the shared one are two ends.
            pool = pools.setdefault(sock.getsockname(), Pool(self.worker_connections))
            server = server_class(sock, spawn=pool, **self._server_arguments(sock), **ssl_args)
            server.worker = self
            server.index = i
            server.publisher = self.publisher
            server.exclusive = exclusive
            server.start()
            servers.append(server)
        return servers

    def _server_arguments(self, sock: Any) -> dict[str, Any]:
        """Return what ``GeventWorker.run`` makes a listener's server with."""
        if self.server_class is None:
            return {"handle": partial(self.handle, _Listener(sock))}
        environ = base_environ(self.cfg)
        environ |= {"wsgi.multithread": True, "SERVER_SOFTWARE": ggevent.VERSION}
        handler = self.wsgi_handler or getattr(self.server_class, "handler_class", None)
        if isinstance(handler, type) and issubclass(handler, WSGIHandler):
            handler = type(handler.__name__, (_Handler, handler), {})
        return {
            "application": self.wsgi,
            "log": self.log,
            "handler_class": handler,
            "environ": environ,
        }

    def wake_in(self, seconds: float) -> None:
        """Have the loop call ``look_again``."""
        if self._look_timer is not None:
            self._look_timer.close()
        self._look_timer = get_hub().loop.timer(seconds, ref=False)
        self._look_timer.start(self.look_again)

    def look_again(self) -> None:
        """Look, but for a sibling who is free if this one is about to serve a request."""
        if self.holds and self.has_just_accepted():
            self._wakes_ns = NEVER  # it looks at the end of this turn
        else:
            super().look_again()

    def _take(self, index: int, listener: Any) -> bool:
        # At the end of a turn gevent has run its callbacks already: the new greenlet would
        # not start before something else wakes the loop.
        self._at_once.start(_nothing)
        self.accepted_in = 1
        return self._servers[index].take_from(listener)

    def accept_own(self, index: int) -> bool:
        """Accept what the loop did not report."""
        before = self.publisher.accepted
        self._servers[index]._do_read()
        return self.publisher.accepted != before

    def abandon(self) -> None:
        """In a child that the application forked: its copy of the loop serves nobody."""
        for server in getattr(self, "_servers", ()):
            server.stop_accepting()
        super().abandon()

    def has_just_accepted(self) -> bool:
        """Tell whether a connection was accepted whose greenlet has not run yet."""
        if self.accepted_in == 1:
            self.accepted_in = self.publisher.turn
        return self.accepted_in == self.publisher.turn

    def _has_room(self) -> bool:
        return self.alive and not any(server.full() for server in self._servers)

    def _drain(self, servers: list[PublishingServer]) -> None:
        """Leave without losing a connection: stop being chosen, take the rest, finish."""
        deadline = time.monotonic() + self.cfg.graceful_timeout
        self.leave()
        for server in servers:
            if not server.exclusive:
                server.close()
        own = [server.socket for server in servers if server.exclusive]
        while self.awaits(own):
            self.notify()
            gevent.sleep(0.005)
        for server in servers:
            server.close()

        while time.monotonic() <= deadline:
            if not any(server.pool for server in servers):
                return
            self.notify()
            gevent.sleep(0.1)
        self.log.warning("Worker graceful timeout (pid:%s)", self.pid)
        for server in servers:
            server.stop(timeout=1)

    def notify(self) -> None:
        """Tell the arbiter that the loop turns; if it is gone, leave as if told to.

        gunicorn's worker exits there, with the requests it serves.
        """
        if self._is_orphan:
            return
        try:
            super().notify()
        except SystemExit:
            if os.getpid() != self.pid:
                raise  # a child that the application forked
            self._is_orphan = True
            self.alive = False

    def began(self) -> None:
        """Publish a request; a connection's first one was published when it was accepted."""
        if self.is_heartbeat_due():  # requests that block may follow each other in one turn
            self.notify()
        greenlet = getcurrent()  # the one that handles this connection, and no other
        if getattr(greenlet, "hermes_served", False):
            self.publisher.began()
        else:
            greenlet.hermes_served = True

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Count the request while it is in flight."""
        self.began()
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            self.publisher.ended()

    def handle_http2_request(self, *args: Any, **kwargs: Any) -> Any:
        """Count the stream while it is in flight; one connection has many (gunicorn 25+)."""
        self.began()
        try:
            return super().handle_http2_request(*args, **kwargs)
        finally:
            self.publisher.ended()


class HermesGeventPyWSGIWorker(HermesGeventWorker, ggevent.GeventPyWSGIWorker):  # type: ignore[misc]
    """gunicorn's gevent_pywsgi worker, which has gevent's own HTTP server, with a slot."""

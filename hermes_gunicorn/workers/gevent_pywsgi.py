"""``hermes_gevent_pywsgi``: the gevent worker with gevent's own HTTP server."""

from __future__ import annotations

from typing import Any

from gunicorn.http.wsgi import base_environ
from gunicorn.workers import ggevent

from hermes_gunicorn.workers.gevent import HermesGeventWorker, PublishingServer

__all__ = ["HermesGeventPyWSGIWorker"]


class _Handler(ggevent.PyWSGIHandler):  # type: ignore[misc]
    """Counts the requests of a connection while they are in flight."""

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


class _Server(PublishingServer, ggevent.PyWSGIServer):  # type: ignore[misc]
    """Both."""


class HermesGeventPyWSGIWorker(HermesGeventWorker):
    """gunicorn's gevent_pywsgi worker with a slot of its own."""

    may_close = False

    def new_server(self, sock: Any, **options: Any) -> PublishingServer:
        """Make the server of a listener, as gunicorn's worker does."""
        environ = base_environ(self.cfg)
        environ |= {"wsgi.multithread": True, "SERVER_SOFTWARE": ggevent.VERSION}
        return _Server(
            sock,
            application=self.wsgi,
            log=self.log,
            handler_class=_Handler,
            environ=environ,
            **options,
        )

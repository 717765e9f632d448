"""``hermes_gevent_pywsgi``: the gevent worker with gevent's own HTTP server."""

from __future__ import annotations

from gunicorn.workers import ggevent

from hermes_gunicorn.workers.gevent import HermesGeventWorker

__all__ = ["HermesGeventPyWSGIWorker"]


class HermesGeventPyWSGIWorker(HermesGeventWorker, ggevent.GeventPyWSGIWorker):  # type: ignore[misc]
    """gunicorn's gevent_pywsgi worker with a slot of its own."""

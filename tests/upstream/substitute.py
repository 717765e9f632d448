"""A pytest plugin: gunicorn's own tests get our worker classes instead of its own."""

from __future__ import annotations

from typing import Any

from gunicorn.workers import gasgi, ggevent, gthread, sync

from hermes_gunicorn.table import Publisher
from hermes_gunicorn.workers.asgi import HermesASGIWorker
from hermes_gunicorn.workers.gevent import HermesGeventWorker
from hermes_gunicorn.workers.gevent_pywsgi import HermesGeventPyWSGIWorker
from hermes_gunicorn.workers.gthread import HermesThreadWorker
from hermes_gunicorn.workers.sync import HermesSyncWorker


def _ready_made(worker_class: type[Any]) -> type[Any]:
    """Give workers that are used without having been started a row nobody reads."""

    class Ready(worker_class):  # type: ignore[misc]
        publisher = Publisher.unseen()

    Ready.__name__ = worker_class.__name__
    return Ready


gasgi.ASGIWorker = _ready_made(HermesASGIWorker)
ggevent.GeventWorker = _ready_made(HermesGeventWorker)
ggevent.GeventPyWSGIWorker = _ready_made(HermesGeventPyWSGIWorker)
gthread.ThreadWorker = _ready_made(HermesThreadWorker)
sync.SyncWorker = _ready_made(HermesSyncWorker)

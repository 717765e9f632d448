"""The name under which ``HermesGeventPyWSGIWorker`` is registered."""

from __future__ import annotations

from hermes_gunicorn.workers.gevent import HermesGeventPyWSGIWorker

__all__ = ["HermesGeventPyWSGIWorker"]

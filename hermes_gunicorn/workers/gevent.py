"""The gevent worker classes, where there is gevent: ``ggevent.py`` has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["HermesGeventPyWSGIWorker", "HermesGeventWorker"]

if TYPE_CHECKING:
    from hermes_gunicorn.workers.ggevent import HermesGeventPyWSGIWorker, HermesGeventWorker
else:
    try:
        from hermes_gunicorn.workers.ggevent import HermesGeventPyWSGIWorker, HermesGeventWorker
    except Exception as error:  # gevent is missing, or does not go with this Python
        from hermes_gunicorn.workers.unavailable import unavailable

        HermesGeventWorker = HermesGeventPyWSGIWorker = unavailable(
            f"gevent cannot be imported ({error}); install it (pip install 'gevent>=24.10.1'), or"
            " use -k hermes_gthread, hermes_sync or hermes_asgi"
        )

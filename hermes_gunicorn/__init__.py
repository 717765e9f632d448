"""Closed-loop connection dispatch for gunicorn.

``gunicorn -k hermes``: workers publish what they do, an eBPF program in the
kernel gives each new connection to a healthy, least loaded one. After Hermes
(SIGCOMM 2025).

Importing the package makes the worker names and the ``hermes_*`` settings known
to gunicorn, if gunicorn is loaded already, and imports nothing else.
"""

from hermes_gunicorn import registration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hermes_gunicorn.workers.gevent import HermesGeventWorker as HermesWorker

__all__ = ["HermesWorker", "__version__"]

__version__ = "0.1.0"

registration.install()


def __getattr__(name: str) -> object:
    # Lazily, because importing a gevent worker imports gevent.
    if name == "HermesWorker":
        from hermes_gunicorn.workers.gevent import HermesGeventWorker

        return HermesGeventWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

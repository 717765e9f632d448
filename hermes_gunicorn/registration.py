"""Make ``-k hermes`` and the ``hermes_*`` settings known to gunicorn.

gunicorn resolves a bare worker name only among its own, and reads settings only
from ``Setting`` classes that exist when its ``Config`` is built, before any
configuration file is read. So ``hermes_gunicorn.pth`` imports this package when
an interpreter starts; all that does is to put the finder below on
``sys.meta_path``. It acts when ``gunicorn.config`` is imported, once, and is gone.

``HERMES_GUNICORN_HOOK=0`` in the environment switches it off. Then, or where the
``.pth`` file is not processed, these need no hook: ``-k hermes_gunicorn.HermesWorker``,
``-k egg:hermes-gunicorn#hermes``, and ``import hermes_gunicorn`` in gunicorn.conf.py.
"""

import sys

# Every interpreter of the environment pays for what is imported here: typing costs
# more than all the rest, and `from __future__ import annotations` a quarter of it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["install", "register"]

_TARGET = "gunicorn.config"

WORKERS = {
    "hermes": "hermes_gunicorn.workers.gevent.HermesGeventWorker",
    "hermes_asgi": "hermes_gunicorn.workers.asgi.HermesASGIWorker",
    "hermes_gevent_pywsgi": "hermes_gunicorn.workers.gevent_pywsgi.HermesGeventPyWSGIWorker",
    "hermes_gthread": "hermes_gunicorn.workers.gthread.HermesThreadWorker",
    "hermes_sync": "hermes_gunicorn.workers.sync.HermesSyncWorker",
}


def register() -> None:
    """Add our workers and settings to a loaded gunicorn; more than once is harmless."""
    from gunicorn import workers

    import hermes_gunicorn.arbiter.settings  # noqa: F401  (defining a Setting registers it)

    workers.SUPPORTED_WORKERS.update(WORKERS)


class _Finder:
    """Finds ``gunicorn.config`` as others do, and has ``register`` run after it."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _TARGET:
            return None
        from importlib.util import find_spec

        uninstall()
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
        return spec


class _RegisteringLoader:
    """Executes the module as its own loader does, then registers."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        self._loader.exec_module(module)
        try:
            register()
        except Exception as error:
            # gunicorn must start even when we are broken.
            print(f"hermes-gunicorn: not registered: {error!r}", file=sys.stderr)


def install() -> None:
    """Register now if gunicorn is loaded, else as soon as it is."""
    if _TARGET in sys.modules:
        register()
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def uninstall() -> None:
    """Take the finder out again."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)

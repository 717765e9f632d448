"""Our server hooks, which run before the user's own.

gunicorn offers no place for a plugin in its arbiter but these:

    when_ready    the listeners exist: set up dispatch for each (or say why not)
    pre_fork      a worker is about to be forked: give it a slot and its listeners
    child_exit    it was reaped: take the slot back
    pre_exec      USR2: let the next arbiter have the shared listeners
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hermes_gunicorn.arbiter import configuration, forks, reload
from hermes_gunicorn.arbiter.manager import DispatchManager
from hermes_gunicorn.core.errors import StartError, StrictError

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.config import Config
    from gunicorn.workers.base import Worker

__all__ = ["install"]


def _manager(server: Arbiter) -> DispatchManager:
    """Return the arbiter's manager, made at the first call.

    Raises:
        SettingsError: not with these settings.
    """
    manager = getattr(server, "hermes", None)
    if manager is None:
        configuration.complete(server.app, server.cfg)
        manager = server.hermes = DispatchManager(server)
        # HUP may bring another worker class; our hooks stay.
        reload.after_setup(server, lambda: install(server.cfg))
    return manager


def _when_ready(server: Arbiter) -> None:
    try:
        configuration.complete(server.app, server.cfg)
        configuration.check(server.cfg)
        _manager(server).prepare(bool(server.cfg.hermes_strict))
    except Exception as error:
        if not (server.cfg.hermes_strict or isinstance(error, StartError)):
            raise
        # gunicorn prints the error and exits; leave nothing behind.
        server.stop(False)
        if server.pidfile is not None:
            server.pidfile.unlink()
        if isinstance(error, StartError):
            raise
        raise StrictError(f"no dispatch: {error!r} (hermes_strict is set)") from error


def _pre_fork(server: Arbiter, worker: Worker) -> None:
    if not hasattr(worker, "assignment"):
        return  # HUP brought another worker class
    if server.cfg.reuse_port:
        server.log.warning(
            "hermes: reload has set reuse_port; ignored, as each worker has its own listener"
        )
        server.cfg.set("reuse_port", False)
    try:
        manager = _manager(server)
    except StartError as error:  # a reload has brought the class, and the server stays
        server.log.error("hermes: workers serve without dispatch: %s", error)
        return
    manager.prepare()
    worker.assignment = manager.assign(worker)


def _child_exit(server: Arbiter, worker: Worker) -> None:
    if hasattr(server, "hermes"):
        server.hermes.release(worker)


def _pre_exec(server: Arbiter) -> None:
    if hasattr(server, "hermes"):
        server.hermes.hand_over()


def _about_to_fork(server: Arbiter, worker: Worker) -> None:
    if getattr(worker, "assignment", None) is not None:
        forks.expect(forks.WORKER)


_HOOKS: dict[str, Callable[..., None]] = {
    "when_ready": _when_ready,
    "pre_fork": _pre_fork,
    "child_exit": _child_exit,
    "pre_exec": _pre_exec,
}


# After the user's own, which may fork something else.
_LAST: dict[str, Callable[..., None]] = {"pre_fork": _about_to_fork}


def _chain(
    ours: Callable[..., None],
    theirs: Callable[..., Any],
    last: Callable[..., None] = lambda *_: None,
) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def hook(server: Arbiter, *args: Any) -> Any:
        try:
            ours(server, *args)
        except StartError:
            raise
        except Exception:
            # Plain gunicorn behaviour is what is left when we fail.
            server.log.exception("hermes: error in %s", ours.__name__)
        result = theirs(server, *args)
        if hasattr(server, "hermes"):
            server.hermes.mirror()  # theirs may have set something
        last(server, *args)
        return result

    hook.hermes = True  # type: ignore[attr-defined]
    return hook


def install(cfg: Config) -> None:
    """Put our hooks in front of the user's; more than once is harmless.

    Raises:
        HermesError: a ``hermes_*`` value is not valid.
    """
    configuration.ensure(cfg)
    forks.watch()
    for name, ours in _HOOKS.items():
        setting = cfg.settings[name]
        if not hasattr(setting.value, "hermes"):
            setting.value = _chain(ours, setting.value, *filter(None, [_LAST.get(name)]))

"""What gunicorn's arbiter has no hook for, by wrapping methods of the one instance.

Each wrapper calls the method it replaces and adds one thing. They go where the arbiter
goes: a worker never runs them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from gunicorn import sock
from gunicorn.config import Config

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.sock import BaseSocket

__all__ = ["after_failed_upgrade", "after_setup", "at_turn", "keep_configuration"]


_COMPLAINS: Final = 60.0  # seconds between lines that say the same


class _Rejected(Exception):
    """A configuration that cannot be used."""


def after_setup(server: Arbiter, call: Callable[[], None]) -> None:
    """Have something called whenever the arbiter has taken over a configuration."""
    setup = server.setup

    def setup_and_call(app: Any) -> None:
        setup(app)
        call()

    server.setup = setup_and_call


def at_turn(server: Arbiter, call: Callable[[], None]) -> None:
    """Have something called whenever the arbiter's loop turns: every second, or sooner."""
    murder_workers = server.murder_workers
    complained = float("-inf")

    def murder_workers_and_call() -> None:
        nonlocal complained
        murder_workers()
        try:
            call()
        except Exception:  # whatever it was, it may pass
            if monotonic() - complained >= _COMPLAINS:
                complained = monotonic()
                server.log.exception(
                    "hermes: error in %s; traffic is not affected, and it is called again",
                    call.__name__,
                )

    server.murder_workers = murder_workers_and_call


def keep_configuration(server: Arbiter) -> None:
    """At a reload (HUP) with a configuration that cannot be loaded, go on with the old one.

    gunicorn would exit, and with it all workers. And keep the listeners of addresses that
    stay: gunicorn would close all and open them again, which fails as long as its old
    workers listen, and would lose what waits there.
    """
    reload, load, create_sockets = server.reload, server.app.reload, sock.create_sockets

    def load_or_reject() -> None:
        old = server.app.cfg
        try:
            load()
            # Both are imported when they are asked for.
            _ = server.app.cfg.worker_class, server.app.cfg.logger_class
            listeners = _listeners(server, server.app.cfg)
        except SystemExit as error:  # gunicorn has printed why
            server.app.cfg = old
            raise _Rejected("see above") from error
        except Exception as error:
            server.app.cfg = old
            raise _Rejected(str(error)) from error
        if listeners is not None:
            # gunicorn closes what it finds here, then asks for new ones.
            server.LISTENERS = [each for each in server.LISTENERS if each not in listeners]
            sock.create_sockets = lambda *_: listeners

    def reload_if_accepted() -> None:
        try:
            reload()
        except _Rejected as error:
            os.environ.update(server.cfg.env)  # which a reload begins by taking back
            server.log.error(
                "hermes: the new configuration cannot be loaded (%s); all goes on with the old one",
                error,
            )
        finally:
            sock.create_sockets = create_sockets

    server.app.reload = load_or_reject
    server.reload = reload_if_accepted


def _listeners(server: Arbiter, cfg: Config) -> list[BaseSocket] | None:
    """Return the listeners for a new configuration, with those opened that it adds.

    None is to leave it to gunicorn: nothing changes, or it was given sockets.
    """
    old, new = server.cfg.address, cfg.address
    if old == new or server.systemd or any(isinstance(each, int) for each in old + new):
        return None
    here = dict(zip(old, server.LISTENERS, strict=True))
    added = Config(cfg.usage, cfg.prog)  # before gunicorn 24 it cannot be copied
    added.settings = cfg.settings | {"bind": copy.copy(cfg.settings["bind"])}
    binds = zip(cfg.settings["bind"].get(), new, strict=True)
    added.settings["bind"].value = [text for text, address in binds if address not in here]
    if added.address:
        opened = sock.create_sockets(added, server.log)
        here |= dict(zip(added.address, opened, strict=True))
    return [here[address] for address in new]


def after_failed_upgrade(server: Arbiter, call: Callable[[], None]) -> None:
    """Have something called when an arbiter that USR2 has started is gone."""
    reap_workers = server.reap_workers

    def reap_and_look() -> None:
        was_there = server.reexec_pid
        try:
            reap_workers()
        finally:
            if was_there and not server.reexec_pid:
                call()

    server.reap_workers = reap_and_look

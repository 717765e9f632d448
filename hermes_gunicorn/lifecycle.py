"""What gunicorn's arbiter has no hook for, by wrapping methods of the one instance.

Each wrapper calls the method it replaces and adds one thing. They go where the arbiter
goes: a worker never runs them.
"""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gunicorn import sock
from gunicorn.config import Config

from hermes_gunicorn import forks
from hermes_gunicorn.listener import address_of

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.sock import BaseSocket

__all__ = [
    "after_failed_upgrade",
    "after_setup",
    "at_turn",
    "keep_configuration",
    "keep_for_upgrade",
]

_AT_LEAST: Final = 0.5  # seconds between two calls


class _Rejected(Exception):
    """A configuration that cannot be used."""


def after_setup(server: Arbiter, call: Callable[[], None]) -> None:
    """Have something called whenever the arbiter has taken over a configuration."""
    setup = server.setup

    def setup_and_call(app: Any) -> None:
        setup(app)
        call()

    server.setup = setup_and_call


def at_turn(server: Arbiter, call: Callable[[], None]) -> Callable[[], None]:
    """Have something called about once a second for as long as the arbiter has listeners.

    Its loop turns every second, but not in a reload: there it waits for the old workers, up to
    ``graceful_timeout``, and only reaps them.

    Returns:
        A function that calls it at once; an error is logged, and no more until it works again.
    """
    works, due = True, 0.0

    def call_if_due() -> None:
        nonlocal due
        # A child gets here by a signal that comes before it has its own handlers.
        if time.monotonic() < due or not server.LISTENERS or os.getpid() != server.pid:
            return
        due = time.monotonic() + _AT_LEAST
        call_safely()

    def call_safely() -> None:
        nonlocal works
        try:
            call()
            works = True
        except Exception:
            if works:
                server.log.exception(
                    "hermes: error in %s; traffic is not affected, trying again every second", name
                )
            works = False

    def then_call(method: Callable[[], None]) -> Callable[[], None]:
        def method_and_call() -> None:
            method()
            call_if_due()

        return method_and_call

    name = call.__name__
    server.murder_workers = then_call(server.murder_workers)
    server.reap_workers = then_call(server.reap_workers)
    return call_safely


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

    None: nothing changes.

    Raises:
        ValueError: a socket is given by number, which gunicorn has closed since.
    """
    new = cfg.address
    if server.cfg.address == new:
        return None
    if any(isinstance(each, int) for each in new):
        raise ValueError("bind cannot change while it contains fd://; restart the server instead")
    # Not by position: after an upgrade the listeners are those of the old arbiter's bind, and
    # systemd's are whatever it was told.
    here = {
        address: listener
        for address in new
        for listener in server.LISTENERS
        if _is_bound_to(listener, address)
    }
    added = Config(cfg.usage, cfg.prog)  # before gunicorn 24 it cannot be copied
    added.settings = cfg.settings | {"bind": copy.copy(cfg.settings["bind"])}
    binds = zip(cfg.settings["bind"].get(), new, strict=True)
    added.settings["bind"].value = [text for text, address in binds if address not in here]
    if added.address:
        opened = sock.create_sockets(added, server.log)
        here |= dict(zip(added.address, opened, strict=True))
    return [here[address] for address in new]


def _is_bound_to(listener: BaseSocket, address: tuple[str, int] | str) -> bool:
    """Say whether a listener is that of a configured address, whoever opened it."""
    name = address_of(listener)
    if address in (name, listener.cfg_addr):
        return True
    if isinstance(address, str) or isinstance(name, str):
        return False
    try:
        found = socket.getaddrinfo(*address, listener.family, socket.SOCK_STREAM)
    except OSError:
        return False
    return name in (sockaddr[:2] for *_, sockaddr in found)


def keep_for_upgrade(server: Arbiter) -> None:
    """Let the child that becomes the next arbiter (USR2) keep what is ours until then."""
    reexec = server.reexec

    def expect_and_reexec() -> None:
        forks.expect(forks.ARBITER)
        try:
            reexec()
        finally:
            forks.expect("")

    server.reexec = expect_and_reexec


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

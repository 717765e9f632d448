"""A reload (HUP) that fails changes nothing, and one that succeeds keeps listeners that stay."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gunicorn import sock
from gunicorn.config import Config

from hermes_gunicorn.core.socket_info import address_of

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.sock import BaseSocket

__all__ = ["after_setup", "keep_configuration"]


class _Rejected(Exception):
    """A configuration that cannot be used."""


def after_setup(server: Arbiter, call: Callable[[], None]) -> None:
    """Have something called whenever the arbiter has taken over a configuration."""
    setup = server.setup

    def setup_and_call(app: Any) -> None:
        setup(app)
        call()

    server.setup = setup_and_call


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
            worker_class, _ = server.app.cfg.worker_class, server.app.cfg.logger_class
            # gunicorn asks at the start only. Ours refuses where something it needs is missing.
            if worker_class.__module__.startswith("hermes_gunicorn."):
                worker_class.check_config(server.app.cfg, server.log)
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
                "hermes: reload rejected: %s. Still running with the previous configuration.",
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

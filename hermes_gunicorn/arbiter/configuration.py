"""The ``hermes_*`` settings of a configuration: checked, and found wherever they were set."""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gunicorn import util
from gunicorn.config import Config

from hermes_gunicorn.arbiter.settings import SETTINGS
from hermes_gunicorn.core.errors import HermesError, SettingsError

if TYPE_CHECKING:
    from gunicorn.app.base import BaseApplication

__all__ = ["bind_shares", "check", "complete", "ensure", "nearest", "unknown"]


def bind_shares(cfg: Config) -> list[tuple[set[Any], float, float]]:
    """Lay the shares of ``hermes_bind_workers`` side by side.

    Returns:
        For each entry the addresses it may mean, as ``listener.address_of`` returns
        them, and where its share begins and ends.
    """
    shares, start = [], 0.0
    for name, share in cfg.hermes_bind_workers.items():
        shares.append((_addresses(name), start, start + share))
        start += share
    return shares


def _addresses(bind: str) -> set[Any]:
    address = util.parse_address(bind)
    if not isinstance(address, tuple):
        return {address}
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)
        return {address, *(sockaddr[:2] for *_, sockaddr in found)}
    return {address}


def check(cfg: Config) -> None:
    """Refuse settings that do not fit the others.

    Raises:
        SettingsError: saying what to change.
    """
    if cfg.reuse_port:
        raise SettingsError(
            "reuse_port and a hermes worker exclude each other: hermes opens its own reuseport"
            " listeners, one for each worker; remove reuse_port (--reuse-port)"
        )
    if cfg.hermes_groups > max(cfg.workers, 1):
        raise SettingsError(
            f"hermes_groups is {cfg.hermes_groups} and there are {cfg.workers} workers:"
            " each group needs one; lower hermes_groups or raise workers"
        )
    # Inherited listeners have addresses of their own.
    if "LISTEN_FDS" in os.environ or any(isinstance(bind, int) for bind in cfg.address):
        return
    for name in cfg.hermes_bind_workers:
        if util.parse_address(name) not in cfg.address:
            raise SettingsError(
                f"hermes_bind_workers names {name!r}, which is not in bind ({', '.join(cfg.bind)})"
            )


def ensure(cfg: Config) -> None:
    """Give a configuration that was built before our settings existed those as well.

    That is the case without the ``.pth`` hook; the values then come from the configuration
    file or module. ``complete`` sees to programs that configure gunicorn in other ways.

    Raises:
        HermesError: a value there is not valid.
    """
    late = [setting for setting in SETTINGS if setting.name not in cfg.settings]
    values = _module(cfg) if late else {}
    for setting in late:
        cfg.settings[setting.name] = setting()
        try:
            cfg.set(setting.name, values.get(setting.name, setting.default))
        except (TypeError, ValueError) as error:
            raise HermesError(str(error)) from error
    if late:
        cfg.hermes_late = True


def complete(app: BaseApplication, cfg: Config) -> None:
    """Have a program that is its own application set what it could not set before.

    ``load_config`` of such a program ran when gunicorn did not know our settings, and by
    gunicorn's own example it skips those. It is run again, as at every reload, on another
    configuration, of which ours are kept.

    Raises:
        SettingsError: that fails, or a value is not valid.
    """
    if not getattr(cfg, "hermes_late", False):
        return
    cfg.hermes_late = False
    # Not at the top: with the hook this is imported when gunicorn.config is.
    from gunicorn.app.base import Application
    from gunicorn.app.wsgiapp import WSGIApplication

    if type(app).load_config in (Application.load_config, WSGIApplication.load_config):
        return  # ``ensure`` has read the file or module
    again = copy.copy(app)
    try:
        again.load_default_config()
        again.load_config()
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    except (Exception, SystemExit) as error:
        raise SettingsError(
            f"the hermes_* settings of this program cannot be read ({error!r}); import"
            " hermes_gunicorn before the program makes its gunicorn application"
        ) from error
    for setting in SETTINGS:
        cfg.settings[setting.name] = again.cfg.settings[setting.name]


def unknown(cfg: Config) -> list[str]:
    """List what the configuration file or module sets that looks like ours and is not.

    gunicorn ignores names that it does not know.
    """
    names = {setting.name for setting in SETTINGS}
    return [
        name
        for name, value in _module(cfg).items()
        if name.startswith("hermes_") and name not in names and not _is_code(value)
    ]


def nearest(name: str) -> str:
    """Return the setting that is meant by a name, or else all of them."""
    names = [str(setting.name) for setting in SETTINGS]
    return (difflib.get_close_matches(name, names, 1) or [", ".join(names)])[0]


def _module(cfg: Config) -> dict[str, Any]:
    """Return the variables of the configuration file or module; empty if there is none."""
    prefix, _, name = str(cfg.config).partition(":")
    module = sys.modules.get(name if prefix == "python" else "__config__")
    return vars(module) if module is not None else {}


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, ModuleType)

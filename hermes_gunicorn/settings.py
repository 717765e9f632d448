"""The ``hermes_*`` settings, for gunicorn.conf.py and as ``--hermes-*`` flags.

Defining a subclass of gunicorn's ``Setting`` registers it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from gunicorn.config import KNOWN_SETTINGS, Config, Setting, validate_bool

from hermes_gunicorn.errors import HermesError
from hermes_gunicorn.loader import LOADERS

__all__ = ["SETTINGS", "ensure"]

SECTION = "Hermes"


def _validate_loader(value: Any) -> str:
    if value in LOADERS:
        return str(value)
    raise ValueError(f"hermes_loader must be one of {', '.join(LOADERS)}, not {value!r}")


def _validate_threshold(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    # The paper's and our own range: below a millisecond every request is a hang.
    if isinstance(value, bool) or not (seconds == 0 or 0.001 <= seconds <= 3600):
        raise ValueError(
            f"hermes_hang_threshold must be 0 (off) or 0.001 to 3600 seconds, not {value!r}"
        )
    return seconds


class HermesLoader(Setting):  # type: ignore[misc]
    name = "hermes_loader"
    section = SECTION
    cli = ("--hermes-loader",)
    meta = "STRING"
    validator = _validate_loader
    default = "auto"
    desc = """\
        Where the kernel program comes from: auto, object or bcc.

        ``object`` is the prebuilt one, ``bcc`` compiles it with the system's BCC
        when the server starts, ``auto`` takes the first that works. Read at the
        start only, not at a reload.
        """


class HermesStrict(Setting):  # type: ignore[misc]
    name = "hermes_strict"
    section = SECTION
    cli = ("--hermes-strict",)
    validator = validate_bool
    action = "store_true"
    default = False
    desc = """\
        Refuse to start without kernel dispatch on every bind address.

        Looked at when the server starts; a reload goes on with a warning. Without
        it, an address the kernel cannot dispatch (a Unix socket, no
        CAP_BPF, an old kernel) is served as by the plain gevent worker, with a warning.
        """


class HermesHangThreshold(Setting):  # type: ignore[misc]
    name = "hermes_hang_threshold"
    section = SECTION
    cli = ("--hermes-hang-threshold",)
    meta = "SECONDS"
    validator = _validate_threshold
    default = 0.01
    desc = """\
        A worker whose loop did not turn for this long gets no new connections.

        They go to other workers until it is back. 0 switches the check off.
        """


SETTINGS = tuple(setting for setting in KNOWN_SETTINGS if setting.section == SECTION)


def ensure(cfg: Config) -> None:
    """Give a configuration that was built before our settings existed those as well.

    That is the case without the ``.pth`` hook; the values then come from
    gunicorn.conf.py alone.

    Raises:
        HermesError: a value there is not valid.
    """
    file = vars(sys.modules["__config__"]) if "__config__" in sys.modules else {}
    for setting in SETTINGS:
        if setting.name not in cfg.settings:
            cfg.settings[setting.name] = setting()
            try:
                cfg.set(setting.name, file.get(setting.name, setting.default))
            except (TypeError, ValueError) as error:
                raise HermesError(str(error)) from error

"""The old place of ``HermesAsyncioMixin``."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "HermesAsyncioMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hermes_gunicorn.workers.asgi import HermesAsyncioMixin

    new = f"{HermesAsyncioMixin.__module__}.{name}"
    warnings.warn(f"{__name__}.{name} is now {new}", DeprecationWarning, stacklevel=2)
    return HermesAsyncioMixin

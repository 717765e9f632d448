"""What can go wrong, under one base.

``HermesError`` derives from ``RuntimeError`` because that is what gunicorn's
application prints as one line before it exits with status 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

__all__ = [
    "BpfError",
    "HermesError",
    "KernelError",
    "LayoutMismatch",
    "LoaderError",
    "SettingsError",
    "StartError",
    "StrictError",
    "Unsupported",
    "step",
]


class HermesError(RuntimeError):
    """Base of all errors raised on purpose by this package."""


class Unsupported(HermesError):
    """Kernel dispatch is not to be had here; the message says why and what helps.

    Attributes:
        reason: what is missing, as a clause.
        remedy: what the operator can do about it, as a clause.
        needs: the capabilities that would help, if that is what is missing.
    """

    def __init__(self, reason: str, remedy: str, needs: tuple[str, ...] = ()) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy
        self.needs = needs


class StartError(HermesError):
    """The server must not start."""


class StrictError(StartError):
    """``hermes_strict`` is set and something would have to fall back."""


class SettingsError(StartError):
    """The ``hermes_*`` settings are not what the user wanted, or cannot be read."""


class LoaderError(Unsupported):
    """A loader cannot provide the program."""


class LayoutMismatch(LoaderError):
    """Python and the program disagree about the worker status table."""


class KernelError(HermesError, OSError):
    """The kernel refused a call that kernel dispatch needs.

    Attributes:
        call: what was called, for messages.
        step: what it was for, as ``kernel/refusals.py`` lists it.
        log: the verifier's words, when there are any.
    """

    def __init__(self, number: int, call: str, step: str, log: str = "") -> None:
        OSError.__init__(self, number, os.strerror(number))
        self.call = call
        self.step = step
        self.log = log

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        # The very last line only counts what was looked at.
        words = [line for line in self.log.splitlines() if not line.startswith("processed ")]
        last = [line.strip() for line in words if line.strip()][-1:]
        return f"{self.call}: {self.strerror} ({name})" + (f": {last[0]}" if last else "")


class BpfError(KernelError):
    """A bpf(2) call failed."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Have an ``OSError`` inside say what the call was for.

    Raises:
        KernelError: in its place.
    """
    try:
        yield
    except KernelError:
        raise
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, name, name) from error

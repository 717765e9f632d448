"""What can go wrong, under one base.

``HermesError`` derives from ``RuntimeError`` because that is what gunicorn's
application prints as one line before it exits with status 1.
"""

from __future__ import annotations

import errno
import os

__all__ = ["BpfError", "HermesError", "LayoutMismatch", "LoaderError", "StrictError", "Unsupported"]


class HermesError(RuntimeError):
    """Base of all errors raised on purpose by this package."""


class Unsupported(HermesError):
    """Kernel dispatch is not to be had here; the message says why and what helps.

    Attributes:
        reason: what is missing, as a clause.
        remedy: what the operator can do about it, as a clause.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class StrictError(HermesError):
    """``hermes_strict`` is set and something would have to fall back."""


class LoaderError(Unsupported):
    """A loader cannot provide the program."""


class LayoutMismatch(LoaderError):
    """Python and the program disagree about the worker status table."""


class BpfError(HermesError, OSError):
    """A bpf(2) call failed. ``log`` holds the verifier's words, when there are any."""

    def __init__(self, number: int, call: str, log: str = "") -> None:
        OSError.__init__(self, number, os.strerror(number))
        self.call = call
        self.log = log

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, "?")
        last = self.log.strip().splitlines()[-1:]
        return f"{self.call}: {self.strerror} ({name})" + (f": {last[0]}" if last else "")

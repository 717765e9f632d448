"""What a child that is forked keeps of ours.

A hermes worker keeps what it is given. The child that becomes the next arbiter (USR2) keeps
everything until it is executed. Any other child keeps nothing: the dirty arbiter, a worker
of another class after a reload, whatever the application forks. Programs that are executed
get nothing, since our descriptors are closed on exec.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from hermes_gunicorn.core import privileges

__all__ = ["ARBITER", "WORKER", "expect", "in_foreign_child", "watch"]

WORKER: Final = "worker"
ARBITER: Final = "arbiter"

_expected = ""
_abandon: list[Callable[[], None]] = []
_watches = False


def watch() -> None:
    """Look at every child from now on; more than once is harmless."""
    global _watches
    if not _watches:
        _watches = True
        os.register_at_fork(after_in_child=_in_child, after_in_parent=lambda: expect(""))


def expect(kind: str) -> None:
    """Say what the next child is: ``WORKER``, ``ARBITER``, or nothing of ours."""
    global _expected
    _expected = kind


def in_foreign_child(call: Callable[[], None]) -> None:
    """Have something called in every child that is not ours, the last given first."""
    watch()
    _abandon.insert(0, call)


def _in_child() -> None:
    kind = _expected
    expect("")
    if kind == ARBITER:
        return
    with contextlib.suppress(Exception):
        privileges.drop()
    if kind == WORKER:
        return
    while _abandon:
        with contextlib.suppress(Exception):
            _abandon.pop(0)()

"""An upgrade (USR2): what the next arbiter keeps, and what to do if it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hermes_gunicorn.arbiter import forks

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter

__all__ = ["after_failed_upgrade", "keep_for_upgrade"]


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

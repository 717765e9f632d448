"""A stand-in for a worker class that cannot be loaded here: says so in one line."""

from __future__ import annotations

from typing import Any

from gunicorn.workers.base import Worker

from hermes_gunicorn.core.errors import HermesError

__all__ = ["unavailable"]


def unavailable(message: str) -> type[Any]:
    """Make a worker class that gunicorn refuses, at the start and at a reload.

    Args:
        message: what is missing and what to do about it.
    """

    class Unavailable(Worker):  # type: ignore[misc]
        """Cannot be used."""

        @classmethod
        def check_config(cls, cfg: Any, log: Any) -> None:
            """Refuse.

            Raises:
                HermesError: always.
            """
            raise HermesError(message)

    return Unavailable

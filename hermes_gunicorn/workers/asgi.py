"""``hermes_asgi``: gunicorn's native ASGI worker, on asyncio or uvloop."""

from __future__ import annotations

from typing import Any

import gunicorn
from gunicorn.workers.base import Worker

from hermes_gunicorn.core.errors import HermesError
from hermes_gunicorn.workers.asyncio import HermesAsyncioMixin

try:
    from gunicorn.workers.gasgi import ASGIWorker
except ImportError:

    class ASGIWorker(Worker):  # type: ignore[misc,no-redef]
        """Says that there is none."""

        @classmethod
        def check_config(cls, cfg: Any, log: Any) -> None:
            raise HermesError(
                f"hermes_asgi needs gunicorn 24 or later, this is {gunicorn.__version__};"
                " upgrade it, or use uvicorn's worker (docs/workers.md)"
            )


__all__ = ["HermesASGIWorker"]


class HermesASGIWorker(HermesAsyncioMixin, ASGIWorker):  # type: ignore[misc]
    """gunicorn's ASGI worker with a slot of its own."""

    def handle_exit_signal(self) -> None:
        """Be chosen no more from here on; what is on its way is still accepted."""
        super().handle_exit_signal()
        self.leave()

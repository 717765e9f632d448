"""``hermes_asgi``: gunicorn's native ASGI worker, on asyncio or uvloop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gunicorn

from hermes_gunicorn.workers.asyncio import HermesAsyncioMixin
from hermes_gunicorn.workers.unavailable import unavailable

if TYPE_CHECKING:
    ASGIWorker = Any
else:
    try:
        from gunicorn.workers.gasgi import ASGIWorker
    except ImportError:
        ASGIWorker = unavailable(
            f"hermes_asgi needs gunicorn 24 or later, this is {gunicorn.__version__}; upgrade it,"
            " or use uvicorn's worker (docs/workers.md)"
        )

__all__ = ["HermesASGIWorker"]


class HermesASGIWorker(HermesAsyncioMixin, ASGIWorker):  # type: ignore[misc]
    """gunicorn's ASGI worker with a slot of its own."""

    def handle_exit_signal(self) -> None:
        """Be chosen no more from here on; what is on its way is still accepted."""
        super().handle_exit_signal()
        self.leave()

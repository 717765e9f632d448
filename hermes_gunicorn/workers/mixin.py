"""What every worker class has in common: a slot, and its life in the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hermes_gunicorn import arbiter, settings
from hermes_gunicorn.errors import HermesError
from hermes_gunicorn.table import Publisher

if TYPE_CHECKING:
    from gunicorn.config import Config
    from gunicorn.glogging import Logger
    from gunicorn.workers.base import Worker as _Base
else:
    _Base = object

__all__ = ["HermesMixin"]


class HermesMixin(_Base):  # type: ignore[misc]
    """Goes before a gunicorn worker class.

    Attributes:
        assignment: the place the arbiter gave it; None if that failed.
        publisher: the pen for its row, from ``init_process`` on.
    """

    assignment: arbiter.Assignment | None = None
    publisher: Publisher

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In the arbiter, before the fork; HUP may have brought a new configuration.
        arbiter.install(self.cfg)

    @classmethod
    def check_config(cls, cfg: Config, log: Logger) -> None:
        """Install the server hooks; gunicorn calls this just before ``when_ready``."""
        check = getattr(super(), "check_config", None)
        if check is not None:
            check(cfg, log)
        if cfg.reuse_port:
            raise HermesError(
                "reuse_port and a hermes worker exclude each other: hermes opens its own"
                " reuseport listeners, one for each worker; remove reuse_port (--reuse-port)"
            )
        arbiter.install(cfg)
        settings.check(cfg)

    def init_process(self) -> None:
        """Run the worker, from just after the fork to its end."""
        self.publisher = self.assignment.take_up() if self.assignment else Publisher.unseen()
        try:
            super().init_process()
        finally:
            self.publisher.dead()

    def init_signals(self) -> None:
        """Take the signals over, and obey what came before that was possible.

        From the fork until here they run the arbiter's handlers, which put them into
        the child's copy of a queue that nobody reads. A TERM lost there leaves a worker
        that must be killed after graceful_timeout, with the requests it serves.
        """
        super().init_signals()
        if self.assignment and self.assignment.told_to_stop():
            self.alive = False

    def exclusive(self) -> list[bool]:
        """Say for each of ``sockets`` whether it is this worker's alone."""
        return self.assignment.exclusive if self.assignment else [False] * len(self.sockets)

    def serves(self, index: int) -> bool:
        """Say whether to accept from ``sockets[index]`` now; it may change."""
        return self.assignment.serves(index) if self.assignment else True

    def notify(self) -> None:
        """Tell the arbiter that the loop turns, and mend the row; about once a second."""
        super().notify()
        self.publisher.refresh()

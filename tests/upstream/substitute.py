"""A pytest plugin: gunicorn's own tests get our worker classes instead of its own.

Tests that are listed in ``expected.txt`` must fail, and no others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gunicorn.workers import gasgi, ggevent, gthread, sync

from hermes_gunicorn.core.keepalive import Keeping
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.workers.asgi import HermesASGIWorker
from hermes_gunicorn.workers.gevent import HermesGeventWorker
from hermes_gunicorn.workers.gevent_pywsgi import HermesGeventPyWSGIWorker
from hermes_gunicorn.workers.gthread import HermesThreadWorker
from hermes_gunicorn.workers.sync import HermesSyncWorker


def _ready_made(worker_class: type[Any]) -> type[Any]:
    """Give workers that are used without ``init_process`` what it would have given them."""

    class Ready(worker_class):  # type: ignore[misc]
        publisher = Publisher.unseen()
        keeping = Keeping(always=True)
        wsgi = None

    Ready.__name__ = worker_class.__name__
    return Ready


gasgi.ASGIWorker = _ready_made(HermesASGIWorker)
ggevent.GeventWorker = _ready_made(HermesGeventWorker)
ggevent.GeventPyWSGIWorker = _ready_made(HermesGeventPyWSGIWorker)
gthread.ThreadWorker = _ready_made(HermesThreadWorker)
sync.SyncWorker = _ready_made(HermesSyncWorker)


def _expected() -> dict[str, str]:
    """Read the list of failures: the reason by test."""
    lines = Path(__file__).with_name("expected.txt").read_text().splitlines()
    pairs = (line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    return dict(pairs)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that must fail; an unknown name in the list is an error.

    The others wait as long as gunicorn thinks enough, which on a busy machine it may not
    be: they may be repeated once, as our own tests that measure time.
    """
    expected = _expected()
    for item in items:
        reason = expected.pop(item.nodeid, None)
        if reason is None:
            item.add_marker(pytest.mark.timing)
        else:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    if expected and not config.getoption("keyword"):
        raise pytest.UsageError(f"expected.txt names tests that do not exist: {list(expected)}")

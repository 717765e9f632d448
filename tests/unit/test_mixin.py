"""What every worker class decides for itself, without a loop."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from hermes_gunicorn.keeping import Keeping
from hermes_gunicorn.workers.mixin import HermesMixin

MS = 1_000_000
SECOND = 1000 * MS


@pytest.mark.parametrize(("waited_ns", "holds"), [(MS, True), (400 * MS, False)])
def test_requests_hold_the_loop_unless_it_waits_for_a_core(waited_ns, holds):
    worker = HermesMixin.__new__(HermesMixin)
    worker.keeping = Keeping(always=False)
    worker.look = lambda: None
    worker.publisher = SimpleNamespace(lost=False)
    worker._rescue_after_ns = 5 * MS
    worker._schedule = lambda woke_ns: woke_ns
    for _ in range(20):
        worker._turned(time.monotonic_ns() - 20 * MS)
    worker.keeping.weigh(SECOND, waited_ns)
    worker._turned(time.monotonic_ns() - 20 * MS)
    assert worker.holds == holds

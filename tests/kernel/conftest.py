"""Real programs on real sockets."""

from __future__ import annotations

import pytest
from kernel_bind import Bind, MakeBind, set_row

from hermes_gunicorn.table import READY


@pytest.fixture
def bind(make_bind: MakeBind) -> Bind:
    """One bind with three ready workers that are in poll."""
    bind = make_bind(3)
    for slot in (1, 2, 3):
        bind.table.claim(slot)
        set_row(bind.table, slot, capacity=1000)
        bind.table.set_state(slot, READY)
    return bind

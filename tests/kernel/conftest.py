"""Real programs on real sockets."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from kernel_bind import Bind, MakeBind, set_row

from hermes_gunicorn.core.layout import READY
from hermes_gunicorn.kernel import loader as loaders


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """Have BCC compile the program for the first test, which takes a second, and not again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "_from_bcc", functools.cache(loaders._from_bcc))
        yield


@pytest.fixture
def bind(make_bind: MakeBind) -> Bind:
    """One bind with three ready workers that are in poll."""
    bind = make_bind(3)
    for slot in (1, 2, 3):
        bind.table.claim(slot)
        set_row(bind.table, slot, capacity=1000)
        bind.table.set_state(slot, READY)
    return bind

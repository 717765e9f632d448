"""Real programs on real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_bind import Bind, MakeBind, set_row

from hermes_gunicorn.dispatch.kernel import KernelTable
from hermes_gunicorn.table import READY


@pytest.fixture(params=["object", "bcc"])
def loader(request: pytest.FixtureRequest) -> str:
    """Each loader in turn; the tests that use it hold for both."""
    return str(request.param)


@pytest.fixture
def kernel(loader: str) -> Iterator[KernelTable]:
    """The shared maps, with the hang check off."""
    kernel = KernelTable(loader, 256)
    kernel.table.slots = 1
    yield kernel
    kernel.close()


@pytest.fixture
def make_bind(kernel: KernelTable) -> Iterator[MakeBind]:
    """Make binds that are closed after the test."""
    binds: list[Bind] = []

    def make(slots: int, address: tuple[str, int] = ("127.0.0.1", 0)) -> Bind:
        bind = Bind(kernel, slots, address)
        binds.append(bind)
        return bind

    yield make
    for bind in binds:
        bind.close()


@pytest.fixture
def bind(make_bind: MakeBind) -> Bind:
    """One bind with three ready workers that are in poll."""
    bind = make_bind(3)
    for slot in (1, 2, 3):
        bind.table.claim(slot)
        set_row(bind.table, slot, capacity=1000)
        bind.table.set_state(slot, READY)
    return bind

"""What tests of the kernel program and of whole servers share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from kernel_bind import Bind, MakeBind

from hermes_gunicorn.kernel import bpf
from hermes_gunicorn.kernel.table import KernelTable

pytest_plugins = ["needs", "repeats"]


@pytest.fixture
def bpf_stats() -> Iterator[None]:
    """Have the kernel count program runs during the test."""
    fd = bpf.enable_stats()
    yield
    os.close(fd)


@pytest.fixture(params=["object", pytest.param("bcc", marks=pytest.mark.bcc)])
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

"""What tests of the kernel program and of whole servers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


@pytest.fixture
def bpf_stats() -> Iterator[None]:
    """Have the kernel count program runs during the test."""
    before = STATS.read_text()
    STATS.write_text("1")
    yield
    STATS.write_text(before)

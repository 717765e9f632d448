"""The decision, against its model."""

from __future__ import annotations

import pytest


@pytest.fixture
def loader() -> str:
    """The prebuilt object; BCC's comes from the same source."""
    return "object"

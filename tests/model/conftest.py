"""The decision, against its model."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--thorough``: all tables and all mutants instead of a part of them."""
    parser.addoption("--thorough", action="store_true", help="all tables and all mutants")


@pytest.fixture
def loader() -> str:
    """The prebuilt object; BCC's comes from the same source."""
    return "object"

"""The decision, against its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from copies import copy_project


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--thorough``: all tables and all mutants instead of a part of them."""
    parser.addoption("--thorough", action="store_true", help="all tables and all mutants")


@pytest.fixture
def loader() -> str:
    """The prebuilt object; BCC's comes from the same source."""
    return "object"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project, to be changed."""
    return copy_project(tmp_path)

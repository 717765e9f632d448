"""Tests without a server; a developer runs them at each save."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here; the hook is given those of other folders as well."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("quick")

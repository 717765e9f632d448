"""A copy of the project in which a line is changed, and a run of its tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHIN = 600  # seconds; a run takes some


def copy_project(folder: Path) -> Path:
    """Copy all that a test run needs."""
    for part in ("hermes_gunicorn", "bpf", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests against a copy, the servers they start included; the first failure ends it."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )

"""The start-up hook: small, removable, and of no effect until gunicorn is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

BUDGET_US = 1000


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter anew."""
    return subprocess.run(
        [sys.executable, *arguments],
        # As users run it: with the bytecode of the last run.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )


def evaluate(code: str, **environ: str) -> str:
    """Return what a new interpreter prints."""
    return python("-c", code, **environ).stdout.strip()


@pytest.mark.timing
def test_the_hook_costs_an_interpreter_less_than_a_millisecond():
    def cost() -> int:
        trace = python("-X", "importtime", "-c", "pass").stderr
        ours = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s{1,3}hermes_gunicorn\n", trace)
        assert ours, "the hook did not run: is hermes_gunicorn.pth installed?"
        return int(ours[0])

    # The least of them: whatever else the machine does only adds to it.
    assert min(cost() for _ in range(21)) < BUDGET_US


@pytest.mark.parametrize(
    "module", ["typing", "gunicorn", "gevent", "ctypes", "mmap", "dataclasses"]
)
def test_the_hook_imports_nothing_until_gunicorn_is_imported(module):
    assert evaluate(f"import sys; print({module!r} in sys.modules)") == "False"


def test_importing_gunicorn_registers_the_worker_and_the_settings():
    code = (
        "import gunicorn.config as c, gunicorn.workers as w, sys;"
        "print('hermes' in w.SUPPORTED_WORKERS, c.Config().hermes_loader,"
        " any('hermes_gunicorn.registration' in repr(f) for f in sys.meta_path),"
        " 'gevent' in sys.modules)"
    )
    # Registered, and the finder has gone; gevent is for the worker alone.
    assert evaluate(code) == "True auto False False"


def test_the_environment_switches_the_hook_off():
    code = "import sys; print('hermes_gunicorn' in sys.modules)"
    assert evaluate(code, HERMES_GUNICORN_HOOK="0") == "False"
    assert evaluate(code) == "True"


def test_importing_the_package_after_gunicorn_registers_as_well():
    code = (
        "import gunicorn.config as c; before = hasattr(c.Config(), 'hermes_loader');"
        "import hermes_gunicorn; print(before, c.Config().hermes_loader)"
    )
    assert evaluate(code, HERMES_GUNICORN_HOOK="0") == "False auto"


def test_settings_are_registered_once():
    code = (
        "import hermes_gunicorn, gunicorn.config as c; hermes_gunicorn.registration.register();"
        "print(sum(s.name == 'hermes_loader' for s in c.KNOWN_SETTINGS))"
    )
    assert evaluate(code) == "1"

"""A pytest plugin: what a test needs of the machine and of the user, as markers.

A test whose need is missing is skipped, and the reason says how to meet it; with
``--require-all`` or ``HERMES_TESTS_REQUIRE=all`` it fails, so that a skip hides no missing
step of an installation.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

_REQUIRE = "HERMES_TESTS_REQUIRE"
_CAP_SYS_ADMIN, _CAP_BPF = 21, 39


@dataclass(frozen=True)
class Need:
    """Something that not every machine or user has.

    Attributes:
        what: for the marker's description.
        is_met: tells whether it is there.
        remedy: what to do if not.
    """

    what: str
    is_met: Callable[[], bool]
    remedy: str


def _capable(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    (effective,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(int(effective, 16) >> number & 1)


def _works(*command: str) -> bool:
    try:
        run = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except OSError:
        return False
    return run.returncode == 0


def _may_become_nobody() -> bool:
    from gunicorn_server import as_nobody

    return os.geteuid() == 0 and _works(*as_nobody(), "true")


def _program(name: str, package: str) -> Need:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return Need(f"the program {name}", lambda: bool(shutil.which(name, path=path)), package)


NEEDS = {
    # By the capability, not by trying: an eBPF program that cannot be loaded is a failure.
    "ebpf": Need(
        "the capability to load eBPF programs",
        lambda: _capable(_CAP_BPF) or _capable(_CAP_SYS_ADMIN),
        "run as root or with CAP_BPF",
    ),
    "root": Need("to start processes of other users", _may_become_nobody, "run as root"),
    "netns": Need(
        "namespaces of its own",
        lambda: _works("unshare", "--net", "--mount", "true"),
        "run as root",
    ),
    "bcc": Need(
        "the system's BCC",
        lambda: Path("/usr/lib/python3/dist-packages/bcc").is_dir(),
        "apt install python3-bpfcc",
    ),
    "bpftool": _program("bpftool", "apt install bpftool"),
    "browser": _program("chromedriver", "apt install chromium chromium-driver"),
    "clang": _program("clang", "apt install clang"),
    "haproxy": _program("haproxy", "apt install haproxy"),
    "nginx": _program("nginx", "apt install nginx-light"),
    "openssl": _program("openssl", "apt install openssl"),
    "prometheus": _program("promtool", "apt install prometheus"),
    "systemd": _program("systemd-analyze", "apt install systemd"),
}


@functools.cache
def missing(name: str) -> str | None:
    """Return in a line what is missing and what to do, or None."""
    need = NEEDS[name]
    return None if need.is_met() else f"needs {name}: {need.remedy}"


def require(config: pytest.Config, name: str) -> None:
    """Skip the test unless the need is met; or fail, where all is to be there."""
    reason = missing(name)
    if reason and config.option.require_all:
        pytest.fail(f"{reason} (all needs are required)", pytrace=False)
    if reason:
        pytest.skip(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-all",
        action="store_true",
        default=os.environ.get(_REQUIRE) == "all",
        help=f"fail instead of skipping where something needed is missing (or ${_REQUIRE}=all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, need in NEEDS.items():
        config.addinivalue_line("markers", f"{name}: needs {need.what}")


@pytest.hookimpl(tryfirst=True)  # before fixtures are set up
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        if mark.name in NEEDS:
            require(item.config, mark.name)


# What these fixtures set up needs something.
_BY_FIXTURE = {
    "kernel": "ebpf",
    "bpf_stats": "ebpf",
    "browser": "browser",
    "certificate": "openssl",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _BY_FIXTURE:
                item.add_marker(_BY_FIXTURE[fixture])

"""A pytest plugin: the session's seed, and one repeat for tests that measure time.

Tests marked ``timing`` judge a ratio or a statistic of measured times. One that fails is run
once more, and the closing lines say so: a repeat is never silent. Everything random in a test
follows from the session's seed, which is printed when something fails.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

_SEED = "HERMES_TESTS_SEED"
_REPEATED = "repeated"

# A busy machine may take long over any example.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        help=f"seed of all random choices, as printed by a run that failed (or ${_SEED})",
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "timing: measures time; runs after all others, and may be repeated once"
    )
    config.addinivalue_line("markers", "quick: part of what a developer runs at each save")
    if config.option.seed is None:
        config.option.seed = int(os.environ.get(_SEED) or random.SystemRandom().getrandbits(32))
    # xdist's processes get the options as they are now.
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(config.option.seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(f"{item.config.option.seed} {item.nodeid}")  # whatever ran before


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not item.get_closest_marker("timing"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed:
        item.user_properties.append((_REPEATED, _reason(failed[0])))
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reason(report: pytest.TestReport) -> str:
    """Return the failure in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    return " ".join(text.split())[:200]


def _reports(stats: dict[str, list[Any]]) -> Iterator[pytest.TestReport]:
    for reports in stats.values():
        yield from (report for report in reports if isinstance(report, pytest.TestReport))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    repeated = {
        report.nodeid: reason
        for report in _reports(terminalreporter.stats)
        for name, reason in report.user_properties
        if name == _REPEATED
    }
    for nodeid, reason in repeated.items():
        terminalreporter.write_line(f"repeated once: {nodeid} (first failure: {reason})")
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        seed = config.option.seed
        terminalreporter.write_line(f"seed: {seed} (pytest --seed {seed}, or {_SEED}={seed})")

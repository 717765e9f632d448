"""A fault in any of the five central functions makes a test of the default run fail.

Each is broken in a copy of the package, and the tests that state its behaviour run
against that copy, with real servers where it takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from copies import run_tests


@dataclass(frozen=True)
class Fault:
    """A line that is changed, and the tests that are to notice.

    Attributes:
        path: of the file, in the package.
        old: the line, or a part of it, that occurs once.
        new: what stands there instead.
        tests: pytest's arguments that select them.
    """

    path: str
    old: str
    new: str
    tests: tuple[str, ...]


SERVERS = "tests/gunicorn/test_workers.py"
FAULTS = {
    "a worker that is hung counts as healthy": Fault(
        "core/policy.py",
        "return threshold_ns > 0 and 0 < busy_since_ns < now_ns - threshold_ns",
        "return False",
        ("tests/unit/test_policy.py",),
    ),
    "the load does not count": Fault(
        "core/policy.py",
        "return load & (1 << 39) - 1,",
        "return 0,",
        ("tests/unit/test_policy.py",),
    ),
    "nothing is rescued": Fault(
        "core/rescue.py",
        "while self._taken < enough and",
        "while False and",
        (SERVERS, "-k", "test_nothing_waits_for_a_worker_that_blocks and hermes-kernel"),
    ),
    "a worker that leaves forgets what waits for it": Fault(
        "workers/mixin.py",
        "if self._stops_at_once or self.nr >= self.max_requests:",
        "if True:",
        (
            SERVERS,
            "-k",
            "test_what_waits_for_a_worker_that_is_told_to_stop_is_answered and hermes_sync-kernel",
        ),
    ),
    "a worker in shared mode takes all it sees": Fault(
        "core/admission.py",
        "if better and (drained or self._pauses < _PATIENCE):",
        "if False:",
        (SERVERS, "-k", "test_kept_alive_connections_are_spread_evenly and hermes-shared-tcp"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_central_function_is_noticed(copy: Path, name: str):
    fault = FAULTS[name]
    assert run_tests(copy, *fault.tests).returncode == 0
    path = copy / "hermes_gunicorn" / fault.path
    text = path.read_text()
    assert text.count(fault.old) == 1
    path.write_text(text.replace(fault.old, fault.new))
    run = run_tests(copy, *fault.tests)
    assert run.returncode == 1, run.stdout[-2000:]

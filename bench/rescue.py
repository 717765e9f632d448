"""How soon siblings should help a worker that is busy: p99 and CPU by hermes_rescue_after.

With Poisson arrivals on new connections: requests that hold their gevent worker like a driver
that does not yield, short ones, which are nearly done when help comes, and long ones; and some
that a free worker helps little, as it is cores that are short, or as they are cheap.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run
from load import Plan

WORKERS = 8
AFTER = ("0", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "3600")
LOADS = {
    "5 ms, 600/s": ("/hold/5", 600),
    "20 ms, 260/s": ("/hold/20", 260),
    "5 ms of CPU, 240/s": ("/burn/5", 240),
    "cheap, 900/s": ("/", 900),
}
WHAT = {"p50_ms": "p50 ms", "p99_ms": "p99 ms", "cpu_ms": "CPU ms"}


def measure(run: Run) -> dict[str, Any]:
    """Put a load on a server with that setting."""
    path, rate = LOADS[run.group]
    flags = ["-k", "hermes", "--hermes-strict", "--hermes-rescue-after", run.rival]
    with harness.serving(run.rival, WORKERS, flags, "app:wsgi") as server:
        time.sleep(0.5)
        cpu = server.cpu_seconds()
        plan = Plan(port=server.port, seed=run.seed, seconds=run.seconds, rate=rate, path=path)
        outcome = load(plan)
        cpu = server.cpu_seconds() - cpu
    return {
        "failed": outcome.failed,
        "p50_ms": round(percentile(outcome.latencies, 50), 2),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "cpu_ms": round(1000 * cpu / outcome.sent, 4),
    }


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for what in LOADS:
        for after in AFTER:
            # A smoke run has only some.
            runs = [s for s in result["samples"] if (s["group"], s["rival"]) == (what, after)]
            if runs:
                cells = (statistics.median(run[key] for run in runs) for key in WHAT)
                rows.append([what, after, *(f"{cell:.2f}" for cell in cells)])
    return (
        "# Rescue delay\n\n"
        f"`python bench/rescue.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} gevent workers; medians of {harness.rounds(result)}, in which all get the same"
        " arrivals. 3600: only those that hang, are frozen or gone are helped.\n\n"
        + harness.markdown_table(["load", "hermes_rescue_after", *WHAT.values()], rows)
    )


CONTEST = Contest(
    "rescue",
    __doc__.splitlines()[0],
    measure,
    report,
    groups=tuple(LOADS),
    rivals=AFTER,
    smoke=(AFTER[:1], "20 ms, 260/s"),
    seconds=8.0,
)

if __name__ == "__main__":
    CONTEST.main()

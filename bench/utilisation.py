"""How much load each rival carries within a limit on p99, and so what a unit of it costs.

The load is raised step by step until p99 passes the limit twice in a row: requests on new
connections need a little CPU, and one in fifty holds its worker for 50 ms, like a driver
that does not yield. Servers are bought by the rate at which they still answer in time, so
the cost of a unit of load is the inverse of the rate (the paper: 19 % less).
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run, present
from load import Plan
from rivals import RIVALS, label

WORKERS = 8
FIRST, STEP, LAST = 100.0, 1.2, 3000.0
LIMIT_MS = 20.0
BASE = "gevent"


def measure(run: Run) -> dict[str, Any]:
    """Raise the load on one rival."""
    steps: list[dict[str, float]] = []
    with harness.competing(run.rival, RIVALS[run.rival], WORKERS) as server:
        rate, safe, missed = FIRST, 0.0, 0
        while rate < LAST and missed < 2:
            used = server.cpu_seconds()
            outcome = load(
                Plan(
                    port=server.port,
                    seed=run.seed,
                    seconds=run.seconds,
                    rate=rate,
                    path="/burn/0.5",
                    other_path="/hold/50",
                    other_share=0.02,
                )
            )
            p99 = percentile(outcome.latencies, 99)
            cpu_ms = (server.cpu_seconds() - used) / outcome.sent * 1000
            steps.append(
                {"rate": round(rate, 1), "p99_ms": round(p99, 2), "cpu_ms": round(cpu_ms, 3)}
            )
            if p99 <= LIMIT_MS and not outcome.failed:
                safe, missed = rate, 0
            else:
                missed += 1
            rate *= STEP
    return {"safe": round(safe, 1), "steps": steps}


def safe_rates(result: dict[str, Any]) -> dict[str, float]:
    """Return up to which rate each rival answers in time."""
    return {
        rival: statistics.median(s["safe"] for s in result["samples"] if s["rival"] == rival)
        for rival in present(result)
    }


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    safe = safe_rates(result)
    rows = []
    for rival, rate in safe.items():
        samples = [sample for sample in result["samples"] if sample["rival"] == rival]
        ranges = [sample["safe"] for sample in samples]
        used = [
            step["cpu_ms"]
            for sample in samples
            for step in sample["steps"]
            if step["rate"] == sample["safe"]
        ]
        rows.append(
            [
                label(rival),
                f"{rate:.0f} ({min(ranges):.0f} - {max(ranges):.0f})",
                f"{safe[BASE] / rate:.2f}" if rate and BASE in safe else "-",
                f"{statistics.median(used):.2f}" if used else "-",
            ]
        )
    return (
        "# Safe utilisation\n\n"
        f"`python bench/utilisation.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers. The highest rate, in steps of {STEP - 1:.0%}, at which p99 of cheap"
        f" requests (0.5 ms of CPU, a new connection each) stays below {LIMIT_MS:g} ms while one in"
        f" fifty holds its worker for 50 ms; median and range of {harness.rounds(result)}. Cost"
        f" of a unit of load: relative to {BASE}. CPU is what the server uses for a request at that"
        " rate, in ms.\n\n" + harness.markdown_table(["", "requests/s", "cost", "CPU"], rows)
    )


CONTEST = Contest("utilisation", __doc__.splitlines()[0], measure, report, seconds=4.0)

if __name__ == "__main__":
    CONTEST.main()

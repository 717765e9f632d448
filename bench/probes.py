"""Health probes beside hanging workers, for all rivals: the paper's headline.

Of 200 requests a second, each on a new connection, one in a hundred holds its worker for a
second, like a driver that does not yield. All others are probes, which need next to nothing.
Counted is the share of probes that take over 200 ms.
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
from classes import SLOW, load, percentile
from contest import Contest, Run, present
from load import Plan
from rivals import RIVALS, label

WORKERS = 8
RATE, HANGING, HANG_MS = 200, 0.01, 1000


def measure(run: Run) -> dict[str, Any]:
    """Probe one rival for a while."""
    with harness.competing(run.rival, RIVALS[run.rival], WORKERS) as server:
        outcome = load(
            Plan(
                port=server.port,
                seed=run.seed,
                seconds=run.seconds,
                rate=RATE,
                path="/",
                other_path=f"/hold/{HANG_MS}",
                other_share=HANGING,
            )
        )
    return {
        "probes": len(outcome.latencies),
        "slow": sum(latency > SLOW for latency in outcome.latencies),
        "p50_ms": round(percentile(outcome.latencies, 50), 2),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "failed": outcome.failed,
    }


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for rival in present(result):
        runs = [s for s in result["samples"] if s["rival"] == rival]
        slow, probes = (sum(run[what] for run in runs) for what in ("slow", "probes"))
        p99 = [run["p99_ms"] for run in runs]
        rows.append(
            [
                label(rival),
                f"{slow} of {probes}",
                f"{slow / max(probes, 1):.2%}",
                f"{statistics.median(run['p50_ms'] for run in runs):.1f}",
                f"{statistics.median(p99):.1f} ({min(p99):.1f} - {max(p99):.1f})",
                str(sum(run["failed"] for run in runs)),
            ]
        )
    return (
        "# Hang probes\n\n"
        f"`python bench/probes.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers, {RATE} requests/s on new connections, {HANGING:.0%} of which hold"
        f" their worker for {HANG_MS / 1000:g} s; the others are the probes. {result['rounds']}"
        f" rounds of {result['seconds']:g} s, with the same arrivals for all.\n\n"
        + harness.markdown_table(
            ["", f"over {1000 * SLOW:g} ms", "", "p50 ms", "p99 ms", "failed"], rows
        )
    )


CONTEST = Contest("probes", __doc__.splitlines()[0], measure, report, rounds=4, seconds=15.0)

if __name__ == "__main__":
    CONTEST.main()

"""How much load kept connections carry where requests hold their worker: hermes_keepalive.

48 connections on 8 workers, each request holds its worker for 10 ms, like a driver that does
not yield. The load is raised step by step until p99 passes 50 ms twice in a row.
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run
from load import Plan

WORKERS = 8
KEPT = 48
FIRST, STEP, LAST = 200.0, 50.0, 800.0
LIMIT_MS = 50.0
BASE = "gevent"
SERVERS = {
    "hermes": ["-k", "hermes", "--hermes-strict"],
    "hermes, always": ["-k", "hermes", "--hermes-strict", "--hermes-keepalive", "always"],
    "gevent": ["-k", "gevent"],
}


def measure(run: Run) -> dict[str, Any]:
    """Raise the load on one server."""
    steps: list[dict[str, float]] = []
    with harness.serving(run.rival, WORKERS, SERVERS[run.rival], "app:wsgi") as server:
        rate, safe, missed = FIRST, 0.0, 0
        while rate <= LAST and missed < 2:
            used = server.cpu_seconds()
            outcome = load(
                Plan(
                    port=server.port,
                    seed=run.seed,
                    seconds=run.seconds,
                    rate=rate,
                    path="/hold/10",
                    connections=KEPT,
                )
            )
            p99 = percentile(outcome.latencies, 99)
            steps.append(
                {
                    "rate": rate,
                    "p99_ms": round(p99, 2),
                    "opened": outcome.opened,
                    "sent": outcome.sent,
                    "failed": outcome.failed,
                    "cpu_ms": round((server.cpu_seconds() - used) / outcome.sent * 1000, 3),
                }
            )
            if p99 <= LIMIT_MS and not outcome.failed:
                safe, missed = rate, 0
            else:
                missed += 1
            rate += STEP
    return {"safe": safe, "steps": steps}


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for server in SERVERS:
        runs = [sample for sample in result["samples"] if sample["rival"] == server]
        if not runs:  # of a smoke run
            continue
        rates = [run["safe"] for run in runs]
        carried = [s for run in runs for s in run["steps"] if s["rate"] == run["safe"]]
        each = [step["opened"] / (step["sent"] + KEPT) for step in carried]
        rows.append(
            [
                server,
                f"{statistics.median(rates):.0f} ({min(rates):.0f} - {max(rates):.0f})",
                f"{statistics.median(each):.2f}" if each else "-",
                f"{statistics.median(s['cpu_ms'] for s in carried):.2f}" if carried else "-",
            ]
        )
    return (
        "# Kept connections\n\n"
        f"`python bench/kept.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers, {KEPT} connections, each request holds its worker for 10 ms. The"
        f" highest rate, in steps of {STEP:g}, at which p99 stays below {LIMIT_MS:g} ms; median and"
        f" range of {harness.rounds(result)}. Connections and CPU time (ms) for each request at"
        " that rate.\n\n" + harness.markdown_table(["", "requests/s", "connections", "CPU"], rows)
    )


CONTEST = Contest(
    "kept",
    __doc__.splitlines()[0],
    measure,
    report,
    rivals=tuple(SERVERS),
    seconds=8.0,
)

if __name__ == "__main__":
    CONTEST.main()

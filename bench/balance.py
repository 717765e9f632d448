"""How evenly rivals share connections and CPU time, and what a request costs, by workers.

For each number of workers: kept-alive connections, 16 for each worker, are opened at random
times and used at random; then requests come on new connections. Standard deviations over the
workers: of connections, and of the CPU time that the first part took.
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run, by_group
from load import Plan
from rivals import RIVALS

WORKERS = (1, 2, 4, 8, 16, 32, 64)
PER_WORKER = 16
RATE = 400
# uWSGI's workers keep no connections; gunicorn's sync ones neither.
TAKING_PART = tuple(name for name in RIVALS if "sync" not in name and "uwsgi" not in name)


def measure(run: Run) -> dict[str, Any]:
    """Load one rival in both ways."""
    workers = int(run.group)
    rival = RIVALS[run.rival]
    with harness.competing(run.rival, rival, workers, keep=True) as server:
        children = server.arbiter.children(recursive=True) or [server.arbiter]
        before = [harness.on_cpu(child.pid) for child in children]
        kept = load(
            Plan(
                port=server.port,
                seed=run.seed,
                seconds=run.seconds,
                rate=RATE,
                path="/burn/1",
                connections=PER_WORKER * workers,
            )
        )
        cpu = [harness.on_cpu(child.pid) - was for child, was in zip(children, before, strict=True)]
        used, switches = server.cpu_seconds(), server.context_switches()
        new = load(Plan(port=server.port, seed=run.seed, seconds=run.seconds, rate=RATE, path="/"))
        used, switches = server.cpu_seconds() - used, server.context_switches() - switches
    processes = max(rival.processes(workers), 1)
    connections = kept.by_worker + [0] * (processes - len(kept.by_worker))
    # A helper process beside the workers is not one of them.
    busiest = sorted(cpu, reverse=True)[:processes]
    return {
        "connections": connections,
        "worker_cpu_ms": [round(1000 * each, 2) for each in busiest],
        "kept_p99_ms": round(percentile(kept.latencies, 99), 2),
        "failed": kept.failed + new.failed,
        "cpu_ms": round(1000 * used / max(new.sent, 1), 4),
        "switches": round(switches / max(new.sent, 1), 3),
        "p99_ms": round(percentile(new.latencies, 99), 2),
    }


def spread(values: list[float]) -> float:
    """Return the standard deviation over the mean."""
    mean = statistics.fmean(values)
    return statistics.pstdev(values) / mean if mean else 0.0


VALUES = {
    "Standard deviation of connections over their mean": lambda s: spread(s["connections"]),
    "Standard deviation of CPU time over its mean": lambda s: spread(s["worker_cpu_ms"]),
    "p99 of requests on kept-alive connections, ms": lambda s: s["kept_p99_ms"],
    "CPU seconds for 1,000 requests on new connections": lambda s: s["cpu_ms"],
    "Context switches for each of them": lambda s: s["switches"],
    "p99 of those, ms": lambda s: s["p99_ms"],
}


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    counts = [str(n) for n in WORKERS if any(s["group"] == str(n) for s in result["samples"])]
    text = (
        "# Balance and cost\n\n"
        f"`python bench/balance.py`. {harness.describe(result)}\n\n"
        f"By the number of workers; medians of {harness.rounds(result)}. First {PER_WORKER}"
        f" kept-alive connections for each worker carry {RATE} requests/s of 1 ms of CPU for"
        f" {result['seconds']:g} s, then as many cheap ones come on new connections.\n"
    )
    for title, value in VALUES.items():
        text += f"\n## {title}\n\n" + by_group(result, counts, value)
    failed = sum(sample["failed"] for sample in result["samples"])
    return f"{text}\nFailed requests, all together: {failed}.\n"


CONTEST = Contest(
    "balance",
    __doc__.splitlines()[0],
    measure,
    report,
    groups=tuple(map(str, WORKERS)),
    rivals=TAKING_PART,
    smoke=(("hermes", "gevent"), "2"),
    rounds=2,
    seconds=3.0,
)

if __name__ == "__main__":
    CONTEST.main()

"""How soon siblings should help a worker that is busy: p99 and CPU by hermes_rescue_after.

Requests hold their gevent worker like a driver that does not yield, with Poisson arrivals on
new connections: short ones, which are nearly done when help comes, and long ones.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import harness
from classes import load, percentile
from load import Plan

WORKERS = 8
AFTER = ("0", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "3600")
LOADS = {"5 ms, 600/s": ("/hold/5", 600), "20 ms, 260/s": ("/hold/20", 260)}


def sample(what: str, after: str, seed: int, seconds: float) -> dict[str, Any]:
    """Put a load on a server with that setting."""
    path, rate = LOADS[what]
    flags = ["-k", "hermes", "--hermes-strict", "--hermes-rescue-after", after]
    with harness.serving(after, WORKERS, flags, "app:wsgi") as server:
        time.sleep(0.5)
        cpu = server.cpu_seconds()
        outcome = load(Plan(port=server.port, seed=seed, seconds=seconds, rate=rate, path=path))
        cpu = server.cpu_seconds() - cpu
    return {
        "load": what,
        "after": after,
        "seed": seed,
        "failed": outcome.failed,
        "p50_ms": round(percentile(outcome.latencies, 50), 2),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "cpu_ms": round(1000 * cpu / outcome.sent, 4),
    }


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for what in LOADS:
        for after in AFTER:
            # A smoke run has only some.
            runs = [s for s in result["samples"] if (s["load"], s["after"]) == (what, after)]
            if not runs:
                continue
            cells = (statistics.median(s[k] for s in runs) for k in ("p50_ms", "p99_ms", "cpu_ms"))
            rows.append([what, after, *(f"{cell:.2f}" for cell in cells)])
    return (
        "# Rescue delay\n\n"
        f"`python bench/rescue.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} gevent workers; medians of {result['rounds']} rounds, in which all get the same"
        " arrivals. 3600: only those that hang, are frozen or gone are helped.\n\n"
        + harness.markdown_table(
            ["load", "hermes_rescue_after", "p50 ms", "p99 ms", "CPU ms"], rows
        )
    )


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__.splitlines()[0], "rescue")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds, seconds = (1, 0.5) if arguments.smoke else (arguments.rounds, 8.0)
    chance = random.Random(0)
    runs = [(what, after) for what in LOADS for after in (AFTER[:1] if arguments.smoke else AFTER)]
    samples = []
    for seed in range(rounds):
        for what, after in chance.sample(runs, len(runs)):
            samples.append(sample(what, after, seed, seconds))
    result = {"machine": harness.machine(), "rounds": rounds, "samples": samples}
    harness.write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()

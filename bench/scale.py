"""How dispatch grows: the model in a simulation, from 8 to 1,023 workers, the most there are.

Each worker serves one request of 20 ms at a time and is busy for 75 % of the time. Where
``cells.py`` has run the same load for real (8 workers), its figures stand beside.
"""

from __future__ import annotations

import concurrent.futures
import json
import statistics
from typing import Any

import harness
import tqdm
from policies import MS, RULES, Simulation, arrivals

WORKERS = (8, 31, 127, 511, 1023)  # slot 0 is nobody's; these fill their groups of 64
SERVICE_MS = 20
BUSY = {"light": 0.25, "medium": 0.5, "heavy": 0.75}
# What the simulation says and who does so for real.
REAL = {
    "hash": "sync, reuse-port",
    "cascade": "hermes, cascade",
    "least_loaded": "hermes_sync",
    "shared": "sync",
}
CELLS = harness.HERE / "results" / "cells.json"


def p99(workers: int, busy: float, rule: str, seed: int, jobs: int) -> float:
    """Return the 99th percentile of the time until a request is done, in milliseconds."""
    per_second = workers * busy * 1000 / SERVICE_MS
    plan = arrivals(jobs, per_second, lambda chance: SERVICE_MS * MS, seed)
    served = Simulation(workers, rule, seed).run(plan)
    times = sorted(job.start - job.arrival + job.service for job in served)
    return times[int(0.99 * (len(times) - 1))] / MS


def measure(seeds: int, jobs: int, workers: tuple[int, ...]) -> list[dict[str, Any]]:
    """Simulate all, at least 50 requests for each worker."""
    cells = [
        (count, rule, level)
        for count in workers
        for rule in RULES
        for level in (BUSY if count == WORKERS[0] else ("heavy",))
    ]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        runs = [
            [
                pool.submit(p99, count, BUSY[level], rule, seed, max(jobs, 50 * count))
                for seed in range(seeds)
            ]
            for count, rule, level in cells
        ]
        return [
            {"workers": count, "rule": rule, "load": level, "p99_ms": [r.result() for r in each]}
            for (count, rule, level), each in tqdm.tqdm(zip(cells, runs, strict=True), unit="cell")
        ]


def real() -> dict[tuple[str, str], float]:
    """Return what ``cells.py`` measured, by rule and load."""
    if not CELLS.exists():
        return {}
    samples = [s for s in json.loads(CELLS.read_text())["samples"] if s["group"] == "2, blocking"]
    result = {}
    for rule, rival in REAL.items():
        for level in BUSY:
            runs = [s["loads"][level]["p99_ms"] for s in samples if s["rival"] == rival]
            if runs:
                result[rule, level] = statistics.median(runs)
    return result


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    by = {
        (s["workers"], s["rule"], s["load"]): statistics.median(s["p99_ms"])
        for s in result["samples"]
    }
    counts = sorted({workers for workers, *_ in by})
    rows = [
        [str(count), *(f"{by[count, rule, 'heavy']:,.1f}" for rule in RULES)] for count in counts
    ]
    names = [rule.replace("_", " ") for rule in RULES]
    text = (
        "# Scale, in a simulation\n\n"
        f"`python bench/scale.py`: requests of {SERVICE_MS} ms without CPU, workers that serve"
        f" one at a time, {result['jobs']:,} Poisson arrivals or 50 for each worker, median of"
        f" {result['seeds']} seeds."
        " 99 % are done within, in milliseconds, with workers busy for 75 % of the time:\n\n"
        + harness.markdown_table(["workers", *names], rows)
    )
    measured = real()
    if measured:
        rows = [
            [
                rule.replace("_", " "),
                REAL[rule],
                level,
                f"{by[WORKERS[0], rule, level]:.1f}",
                f"{measured[rule, level]:.1f}",
            ]
            for rule in REAL
            for level in BUSY
            if (rule, level) in measured
        ]
        text += (
            f"\n## Beside real runs, {WORKERS[0]} workers\n\nThe simulation has no rescue, no"
            " other work on the machine, and no cost of the request itself.\n\n"
            + harness.markdown_table(["rule", "server", "load", "simulated", "real"], rows)
        )
    return text


def main() -> None:
    """Run and write the result."""
    arguments = harness.parser(__doc__.splitlines()[0], "scale").parse_args()
    seeds, jobs, workers = (1, 300, WORKERS[:1]) if arguments.smoke else (3, 20_000, WORKERS)
    result = {
        "machine": harness.machine(),
        "seeds": seeds,
        "jobs": jobs,
        "samples": measure(seeds, jobs, workers),
    }
    harness.write(arguments.output, result, report(result))


if __name__ == "__main__":
    main()

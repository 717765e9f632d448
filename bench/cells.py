"""The paper's twelve cells for all rivals: four kinds of traffic at three loads.

Many connections (a new one for each request) or few (64 kept-alive ones), with cheap or
costly requests; the costly ones either hold their worker, like a driver that does not yield,
or compute. A cell is lost by who takes over 50 % more time, in the mean or at the 99th
percentile, than its best, or answers over 20 % less: the rule of the paper's table 3.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run, present
from load import Plan
from rivals import GUNICORN, RIVALS, label

WORKERS = 8
KEPT = 64
LOADS = {"light": 1, "medium": 2, "heavy": 3}
TIME_WORSE, THROUGHPUT_WORSE = 1.5, 0.8
WHAT = ("mean_ms", "p99_ms", "answered_per_s", "cpu_ms")

Cell = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A kind of traffic: at light load, so many requests a second."""

    title: str
    path: str
    rate: float
    connections: int = 0


CASES = {
    "1": Case("many connections, cheap", "/", 300),
    "2, blocking": Case("many connections, 20 ms without CPU", "/hold/20", 100),
    "2, CPU": Case("many connections, 5 ms of CPU", "/burn/5", 80),
    "3": Case("few connections, cheap", "/", 500, KEPT),
    "4, blocking": Case("few connections, 20 ms without CPU", "/hold/20", 100, KEPT),
    "4, CPU": Case("few connections, 5 ms of CPU", "/burn/5", 80, KEPT),
}


def measure(run: Run) -> dict[str, Any]:
    """Put one case on one rival, at the three loads."""
    case, loads = CASES[run.group], {}
    with harness.competing(run.rival, RIVALS[run.rival], WORKERS, case.connections > 0) as server:
        for level, factor in LOADS.items():
            cpu = server.cpu_seconds()
            outcome = load(
                Plan(
                    port=server.port,
                    seed=100 * run.seed + factor,
                    seconds=run.seconds,
                    rate=case.rate * factor,
                    path=case.path,
                    connections=case.connections,
                )
            )
            times = outcome.latencies
            loads[level] = {
                "sent": outcome.sent,
                "failed": outcome.failed,
                "mean_ms": round(1000 * statistics.fmean(times), 3) if times else None,
                "p99_ms": round(percentile(times, 99), 3) if times else None,
                "answered_per_s": round(len(times) / max(outcome.seconds, run.seconds), 2),
                "cpu_ms": round(1000 * (server.cpu_seconds() - cpu) / max(outcome.sent, 1), 4),
            }
    return {"loads": loads}


def board(result: dict[str, Any]) -> dict[tuple[str, str], Cell]:
    """Return by case and load: for each rival the medians over the rounds."""
    cells: dict[tuple[str, str], Cell] = {}
    for case in CASES:
        for rival in present(result):
            runs = [s for s in result["samples"] if (s["group"], s["rival"]) == (case, rival)]
            for level in LOADS if runs else ():
                of = [run["loads"][level] for run in runs]
                cell = cells.setdefault((case, level), {})
                cell[rival] = {
                    what: statistics.median(
                        each[what] if each[what] is not None else float("inf") for each in of
                    )
                    for what in WHAT
                } | {"failed": sum(each["failed"] for each in of)}
    return cells


def marks(cell: Cell, rival: str) -> str:
    """Return what a rival loses in a cell: ``m``ean, ``p``99, ``t``hroughput, ``f``ailures."""
    mine = cell[rival]
    best = {what: min(each[what] for each in cell.values()) for what in ("mean_ms", "p99_ms")}
    most = max(each["answered_per_s"] for each in cell.values())
    return (
        "m" * (mine["mean_ms"] > TIME_WORSE * best["mean_ms"])
        + "p" * (mine["p99_ms"] > TIME_WORSE * best["p99_ms"])
        + "t" * (mine["answered_per_s"] < THROUGHPUT_WORSE * most)
        + "f" * (mine["failed"] > 0)
    )


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rivals, cells = present(result), board(result)
    lost = {rival: sum(bool(marks(cell, rival)) for cell in cells.values()) for rival in rivals}
    among_gunicorn = [
        {rival: each for rival, each in cell.items() if rival in GUNICORN}
        for cell in cells.values()
    ]
    lost_there = {
        rival: sum(bool(marks(cell, rival)) for cell in among_gunicorn)
        for rival in rivals
        if rival in GUNICORN
    }
    text = (
        "# The twelve cells\n\n"
        f"`python bench/cells.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers, {harness.rounds(result)} of {result['seconds']:g} s, medians. Latency"
        " counts from the intended time of sending. Marks: m mean or p p99 over 1.5 times the"
        " best of the cell, t answers below 0.8 of the most, f failed requests. CPU is what the"
        " server uses for a request at heavy load, in ms. Costly requests come in two kinds, so"
        " the twelve cells are eighteen.\n\n## Cells lost\n\n"
        "Servers that are written in C or Rust need less time for HTTP itself than gunicorn,"
        " whoever dispatches; so once among all, and once among gunicorn's workers.\n\n"
    )
    text += harness.markdown_table(
        ["", f"of {len(cells)}", "among gunicorn's"],
        [
            [
                label(rival),
                str(lost[rival]),
                str(lost_there.get(rival, "")),
            ]
            for rival in sorted(rivals, key=lost.__getitem__)
        ],
    )
    header = [f"{level} {what}".strip() for level in LOADS for what in ("mean", "p99", "")]
    header.append("CPU")
    for name, case in CASES.items():
        if (name, "light") not in cells:
            continue
        rates = ", ".join(f"{case.rate * factor:g}" for factor in LOADS.values())
        text += f"\n## {name.partition(',')[0]}: {case.title} ({rates} requests/s)\n\n"
        rows = []
        for rival in rivals:
            row = [label(rival)]
            for level in LOADS:
                cell = cells[name, level]
                mine = cell[rival]
                row += [f"{mine['mean_ms']:.1f}", f"{mine['p99_ms']:.1f}", marks(cell, rival)]
            row.append(f"{cells[name, 'heavy'][rival]['cpu_ms']:.2f}")
            rows.append(row)
        text += harness.markdown_table(["", *header], rows)
    return text


CONTEST = Contest(
    "cells",
    __doc__.splitlines()[0],
    measure,
    report,
    groups=tuple(CASES),
    smoke=(("hermes", "gevent", "granian"), "1"),
)

if __name__ == "__main__":
    CONTEST.main()

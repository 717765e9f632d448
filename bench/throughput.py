"""Peak throughput of `-k hermes` beside the gevent worker, shared and with --reuse-port.

For each number of workers all rivals are started side by side; they idle until it is
their turn. A round gives every rival one slice of load in a new random order, so that
what the machine does meanwhile hits all alike; ratios are taken within a round. Servers
are started anew several times, as the luck of memory layout stays with a process.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
from typing import Any

import harness

BASE = "reuse-port"
CASES = {"new": "new connection per request", "keep-alive": "kept-alive connections"}
CONNECTIONS = 32
BOUND = 0.97


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all cells; one entry for each slice of load."""
    chance = random.Random(arguments.seed)
    samples = []
    for workers in arguments.workers:
        for start in range(arguments.starts):
            with contextlib.ExitStack() as stack:
                servers = [
                    stack.enter_context(harness.serving(rival, workers))
                    for rival in arguments.rivals
                ]
                for turn in range(-1, arguments.rounds):
                    for case in arguments.cases:
                        chance.shuffle(servers)
                        for server in servers:
                            seconds = 1 if turn < 0 else arguments.seconds
                            cpu = server.cpu_seconds()
                            load = harness.wrk(
                                server.url, seconds, CONNECTIONS, case == "keep-alive"
                            )
                            cpu = server.cpu_seconds() - cpu
                            if turn < 0:
                                continue  # warm-up
                            samples.append(
                                {
                                    "workers": workers,
                                    "case": case,
                                    "start": start,
                                    "round": turn,
                                    "rival": server.rival,
                                    "requests_per_second": load.per_second,
                                    "cpu_us_per_request": rounded(cpu / load.requests * 1e6),
                                    "errors": load.errors,
                                }
                            )
            print(f"{workers} workers, start {start + 1} of {arguments.starts} done", flush=True)
    return samples


def rounded(value: float) -> float:
    """Keep what is worth keeping."""
    return round(value, 2)


def cells(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each rival with ``BASE``, cell by cell, within rounds."""
    result = []
    keys = dict.fromkeys((s["workers"], s["case"], s["rival"]) for s in samples)
    for workers, case, rival in keys:
        ours, base = (
            {
                (s["start"], s["round"]): s
                for s in samples
                if (s["workers"], s["case"], s["rival"]) == (workers, case, name)
            }
            for name in (rival, BASE)
        )
        cell = {"workers": workers, "case": case, "rival": rival, "rounds": len(ours)}
        for name in ("requests_per_second", "cpu_us_per_request"):
            cell[name] = rounded(statistics.median(s[name] for s in ours.values()))
            ratios = [ours[at][name] / base[at][name] for at in ours]
            cell[name + "_ratio"] = [round(x, 3) for x in harness.median_and_interval(ratios)]
        cell["errors"] = sorted({s["errors"] for s in ours.values()} - {""})
        result.append(cell)
    return result


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for cell in sorted(result["cells"], key=lambda c: (c["case"], c["workers"], c["rival"])):
        rps, cpu = cell["requests_per_second_ratio"], cell["cpu_us_per_request_ratio"]
        rows.append(
            [
                CASES[cell["case"]],
                str(cell["workers"]),
                cell["rival"],
                f"{cell['requests_per_second']:,.0f}",
                f"{rps[0]:.3f} ({rps[1]:.3f} - {rps[2]:.3f})",
                f"{cell['cpu_us_per_request']:.0f}",
                f"{cpu[0]:.3f} ({cpu[1]:.3f} - {cpu[2]:.3f})",
                "; ".join(cell["errors"]) or "none",
            ]
        )
    header = ["", "workers", "server", "requests/s", f"ratio to {BASE}"]
    header += ["CPU us/request", f"ratio to {BASE}", "errors"]
    p = result["parameters"]
    return (
        "# Peak throughput\n\n"
        f"`python bench/throughput.py`. {harness.describe(result)}\n\n"
        f"wrk, 1 thread, {CONNECTIONS} connections, {p['starts']} starts x {p['rounds']} rounds of"
        f" {p['seconds']:g} s, interleaved. Medians; ratios within a round, with the 95 % bootstrap"
        " interval of their median. Load generator and servers share the cores.\n\n"
        + harness.markdown_table(header, rows)
    )


def main() -> None:
    """Run, write the result, and judge it if asked."""
    parser = harness.parser(__doc__.splitlines()[0], "throughput")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--rivals", nargs="+", choices=harness.RIVALS, default=["hermes", "gevent", BASE]
    )
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="after each start")
    parser.add_argument("--seconds", type=float, default=2, help="of load in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--check", action="store_true", help=f"exit 1 if hermes is below {BOUND} in a cell"
    )
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.starts, arguments.rounds, arguments.seconds = 1, 1, 1
        arguments.workers = [2]
    if BASE not in arguments.rivals:
        parser.error(f"--rivals must contain {BASE}, which the others are compared with")
    parameters = {
        name: getattr(arguments, name) for name in ("starts", "rounds", "seconds", "seed")
    }
    samples = measure(arguments)
    result = {
        "machine": harness.machine(),
        "parameters": parameters,
        "cells": cells(samples),
        "samples": samples,
    }
    harness.write(arguments.output, result, table(result))
    low = [
        c
        for c in result["cells"]
        if c["rival"] == "hermes" and c["requests_per_second_ratio"][0] < BOUND
    ]
    if arguments.check and low:
        raise SystemExit(f"below {BOUND} of {BASE}: {len(low)} cells")


if __name__ == "__main__":
    main()

"""Our open-loop load beside httperf's, on the same server: do they measure the same?

Both open connections at fixed intervals, whatever the server does. Also with a server that
hangs now and then, which only shows when no arrival is omitted.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from typing import Any

import harness
from classes import load, percentile
from load import Plan

RATE, WORKERS = 200, 4
CASES = {"5 ms": "/hold/5", "one in 100 hangs its worker for 300 ms": "/sometimes/300"}
WHAT = ("mean_ms", "p50_ms", "max_ms")


def httperf(port: int, path: str, seconds: int) -> dict[str, float]:
    """Run httperf."""
    command = ["httperf", "--hog", "--server", "127.0.0.1", "--port", str(port), "--uri", path]
    command += ["--rate", str(RATE), "--num-conns", str(RATE * seconds)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"min [\d.]+ avg ([\d.]+) max ([\d.]+) median ([\d.]+)", shown)
    if not found:
        raise SystemExit(f"httperf says:\n{shown}")
    mean, most, median = map(float, found.groups())
    return {"mean_ms": mean, "p50_ms": median, "max_ms": most}


def ours(port: int, path: str, seconds: int) -> dict[str, float]:
    """Run ours."""
    plan = Plan(port=port, seed=1, seconds=seconds, rate=RATE, path=path, fixed=True)
    times = load(plan).latencies
    return {
        "mean_ms": round(1000 * statistics.fmean(times), 2),
        "p50_ms": round(percentile(times, 50), 2),
        "max_ms": round(1000 * max(times), 2),
    }


TOOLS = {"ours": ours, "httperf": httperf}


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for case in CASES:
        for tool in TOOLS:
            runs = [s for s in result["samples"] if (s["case"], s["tool"]) == (case, tool)]
            cells = (statistics.median(s[k] for s in runs) for k in WHAT)
            rows.append([case, tool, *(f"{cell:.1f}" for cell in cells)])
    return (
        "# The load generator, cross-checked\n\n"
        f"`python bench/check_load.py`. {harness.describe(result)}\n\n"
        f"`bench/load.py` and httperf: {RATE} requests/s at fixed intervals, each on a new"
        f" connection, to {WORKERS} hermes workers; medians of {harness.rounds(result)}.\n\n"
        + harness.markdown_table(["", "", "mean ms", "p50 ms", "max ms"], rows)
    )


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__.splitlines()[0], "check_load")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds, seconds = (1, 1) if arguments.smoke else (arguments.rounds, 10)
    samples = []
    for seed in range(rounds):
        for case, path in CASES.items():
            for tool in list(TOOLS)[:: 1 if seed % 2 else -1]:
                with harness.serving("hermes", WORKERS, app="app:wsgi") as server:
                    sample = TOOLS[tool](server.port, path, seconds)
                samples.append({"case": case, "tool": tool, "seed": seed} | sample)
    result = {"machine": harness.machine(), "rounds": rounds, "samples": samples}
    harness.write(arguments.output, result, report(result))


if __name__ == "__main__":
    main()

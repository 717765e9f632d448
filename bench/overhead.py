"""What each part of Hermes costs a request, in microseconds and as a share of all CPU time.

The parts are those of the paper's table 5. The workers' are timed where they happen, less
what an empty function takes to time; the program by the kernel's own statistics.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import harness
from classes import load
from load import Plan

WORKERS = 8
LOADS = {"light": 100, "medium": 400, "heavy": 800}
POLICIES = ("least_loaded", "cascade")
PARTS = ("counters", "scheduler", "program", "rescue")
SYSCTL = Path("/proc/sys/kernel/bpf_stats_enabled")


def program(arbiter: int) -> int:
    """Return for how many nanoseconds the server's program has run."""
    objects = harness.kernel_objects(arbiter)
    programs = [harness.bpftool(kind, number) for kind, number in objects if kind == "prog"]
    return sum(program.get("run_time_ns", 0) for program in programs)


def serve(policy: str, rate: int, seconds: float, conf: str) -> tuple[int, float, int]:
    """Load a server; return requests, its CPU seconds, nanoseconds in the program."""
    flags = ["-k", "hermes", "--hermes-strict", "--hermes-policy", policy, "-c", conf]
    with harness.serving("hermes", WORKERS, flags, "app:wsgi") as server:
        cpu, ran = server.cpu_seconds(), program(server.arbiter.pid)
        plan = Plan(port=server.port, seed=1, seconds=seconds, rate=rate, path="/burn/0.2")
        outcome = load(plan)
        cpu, ran = server.cpu_seconds() - cpu, program(server.arbiter.pid) - ran
        return outcome.sent, cpu, ran


def sample(policy: str, level: str, seconds: float) -> dict[str, Any]:
    """Measure one load, without the clocks and with them."""
    rate = LOADS[level]
    sent, cpu, ran = serve(policy, rate, seconds, os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HERMES_OVERHEAD"] = folder
        timed, *_ = serve(policy, rate, seconds, str(harness.HERE / "overhead_conf.py"))
        workers = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    if len(workers) != WORKERS:
        raise SystemExit("a worker has left no sums")
    took: dict[str, float] = {}
    for parts in workers:
        empty = parts["empty"][0] / parts["empty"][1]
        for part, (total, calls) in parts.items():
            took[part] = took.get(part, 0.0) + total - calls * empty
    # What is called from within another is timed there as well.
    inner = took["turned"] - took["look"] - took.get("schedule", 0.0)
    counters = sum(took[name] for name in ("opened", "closed", "began", "ended", "woke"))
    counters += took["polls"] - took["turned"] + inner
    nanoseconds = {
        "counters": counters / timed,
        "scheduler": took.get("schedule", 0.0) / timed,
        "program": ran / sent,
        "rescue": took["look"] / timed,
    }
    return {
        "policy": policy,
        "load": level,
        "cpu_us": round(1e6 * cpu / sent, 2),
        **{part: round(value / 1000, 3) for part, value in nanoseconds.items()},
    }


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for one in result["samples"]:
        cells = [f"{one[part]:.2f} ({one[part] / one['cpu_us']:.2%})" for part in PARTS]
        total = sum(one[part] for part in PARTS)
        rows.append(
            [
                *(one["policy"], f"{one['load']}, {LOADS[one['load']]}/s", *cells),
                f"{total:.2f} ({total / one['cpu_us']:.2%})",
                f"{one['cpu_us']:.0f}",
            ]
        )
    return (
        "# Overhead by part\n\n"
        f"`python bench/overhead.py`, as root. {harness.describe(result)}\n\n"
        f"{WORKERS} gevent workers, requests of 0.2 ms of CPU on new connections. Microseconds for"
        " each request, and of all the CPU time that the server takes for it. In rescue are only"
        " the looks in which a loop that has work ends its turn, and those by timer.\n\n"
        + harness.markdown_table(["policy", "load", *PARTS, "all", "CPU"], rows)
    )


def main() -> None:
    """Run and write the result."""
    arguments = harness.parser(__doc__.splitlines()[0], "overhead").parse_args()
    loads = list(LOADS)[:1] if arguments.smoke else list(LOADS)
    before = SYSCTL.read_text()
    SYSCTL.write_text("1")
    try:
        samples = [
            sample(policy, level, 1.0 if arguments.smoke else 8.0)
            for policy in POLICIES
            for level in loads
        ]
    finally:
        SYSCTL.write_text(before)
    result = {"machine": harness.machine(), "samples": samples}
    harness.write(arguments.output, result, report(result))


if __name__ == "__main__":
    main()

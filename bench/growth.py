"""How a request's cost and the server's memory grow with open connections and with binds.

(With workers: see ``balance.py``, for the kernel program alone ``program.py``.) Cheap requests
come on new connections while others are open and idle, or while the server listens on so
many addresses.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
from operator import itemgetter
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run, by_group
from load import Plan
from rivals import RIVALS, Rival

WORKERS, RATE = 8, 300
IDLE, BINDS = (0, 1000, 4000), (2, 8, 32)
GROUPS = (*(f"{n} idle connections" for n in IDLE), *(f"{n} binds" for n in BINDS))


def measure(run: Run) -> dict[str, Any]:
    """Load one rival."""
    count, _, what = run.group.partition(" ")
    idle, binds = (0, int(count)) if what == "binds" else (int(count), 1)
    rival = RIVALS[run.rival]

    def command(port: int, workers: int, keep: bool) -> list[str]:
        ports = [harness.free_port() for _ in range(binds - 1)]
        others = [word for each in ports for word in ("-b", f"127.0.0.1:{each}")]
        return [*rival.command(port, workers, keep), *others]

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * max(IDLE), limit), limit))
    with (
        contextlib.ExitStack() as stack,
        harness.competing(run.rival, Rival(command, rival.processes), WORKERS) as server,
    ):
        for _ in range(idle):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
        used, switches = server.cpu_seconds(), server.context_switches()
        plan = Plan(port=server.port, seed=run.seed, seconds=run.seconds, rate=RATE, path="/")
        outcome = load(plan)
        used, switches = server.cpu_seconds() - used, server.context_switches() - switches
        arbiter, *workers = [each.memory_full_info().uss for each in server.processes()]
    return {
        "cpu_ms": round(1000 * used / max(outcome.sent, 1), 4),
        "switches": round(switches / max(outcome.sent, 1), 3),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "failed": outcome.failed,
        "arbiter_mib": round(arbiter / 2**20, 2),
        "worker_mib": round(statistics.fmean(workers) / 2**20, 2),
    }


VALUES = {
    "CPU time of a request, ms": "cpu_ms",
    "Context switches of a request": "switches",
    "p99, ms": "p99_ms",
    "USS of the arbiter, MiB": "arbiter_mib",
    "USS of a worker, MiB": "worker_mib",
}


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    groups = [g for g in GROUPS if any(s["group"] == g for s in result["samples"])]
    text = (
        "# Growth with connections and binds\n\n"
        f"`python bench/growth.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers, {RATE} requests/s, medians of {harness.rounds(result)} of"
        f" {result['seconds']:g} s.\n"
    )
    for title, value in VALUES.items():
        text += f"\n## {title}\n\n" + by_group(result, groups, itemgetter(value))
    failed = sum(sample["failed"] for sample in result["samples"])
    return f"{text}\nFailed requests, all together: {failed}.\n"


CONTEST = Contest(
    "growth",
    __doc__.splitlines()[0],
    measure,
    report,
    groups=GROUPS,
    rivals=("hermes", "gevent", "gevent, reuse-port"),
    smoke=(("hermes",), GROUPS[0]),
    rounds=4,
)

if __name__ == "__main__":
    CONTEST.main()

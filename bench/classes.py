"""Every worker class in both modes, beside the stock class, shared and with reuse-port.

Four questions, each for the classes it concerns:

queue       how long do requests wait at 75 % load, beside the ideal, one queue for all
block       what do 1 % of requests that block a worker for a second do to the others
keep-alive  are 256 connections spread, and what does that do to requests on them
cost        CPU time and context switches for each request, when there is little to do
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import harness
from load import Outcome, Plan

WAYS = ("kernel", "shared", "stock", "reuse-port")
FAMILIES = ("sync", "gthread", "gevent", "asgi")
SLOW = 0.2  # seconds


def flags(family: str, way: str) -> list[str]:
    """Return gunicorn's flags for a class, served one way."""
    asgi = ["--asgi-loop", "asyncio"] if family == "asgi" else []
    if way == "stock":
        return ["-k", family, *asgi]
    if way == "reuse-port":
        return ["-k", family, "--reuse-port", *asgi]
    ours = "hermes" if family == "gevent" else f"hermes_{family}"
    strict = ["--hermes-strict"] if way == "kernel" else []
    return ["-k", ours, "--hermes-mode", way, *strict, *asgi]


@dataclasses.dataclass(frozen=True)
class Question:
    """One experiment.

    Attributes:
        families: the classes it is asked for, with workers and further flags.
        plan: the load, but for port and seed.
    """

    families: dict[str, tuple[tuple[int, tuple[str, ...]], ...]]
    plan: dict[str, Any]
    by_family: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


QUESTIONS = {
    "queue": Question(
        {"sync": ((8, ()),), "gthread": ((2, ("--threads", "4")),)},
        {"rate": 300, "path": "/hold/20", "seconds": 12},
    ),
    "block": Question(
        dict.fromkeys(FAMILIES, ((8, ("--threads", "4")),)),
        {"rate": 200, "path": "/", "other_path": "/hold/1000", "other_share": 0.01, "seconds": 13},
    ),
    "keep-alive": Question(
        dict.fromkeys(("gthread", "gevent", "asgi"), ((8, ("--threads", "4")),)),
        {"rate": 400, "path": "/hold/10", "connections": 256, "seconds": 10},
        # Four threads share what a worker has: it takes more to make one wait.
        {"gthread": {"path": "/hold/50", "rate": 450}},
    ),
    "cost": Question(
        {"sync": ((8, ()), (32, ())), "gevent": ((8, ()), (32, ()))},
        {"rate": 400, "path": "/", "seconds": 6},
    ),
}


def load(plan: Plan) -> Outcome:
    """Run a plan from a process of its own."""
    command = [sys.executable, str(harness.HERE / "load.py"), json.dumps(dataclasses.asdict(plan))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Outcome(**json.loads(out))


def sample(
    question: str,
    family: str,
    way: str,
    workers: int,
    extra: tuple[str, ...],
    seed: int,
    seconds: float | None,
) -> dict[str, Any]:
    """Start a server, put the load on it, and return what came of it."""
    asked = QUESTIONS[question]
    settings = asked.plan | asked.by_family.get(family, {})
    if seconds:
        settings["seconds"] = seconds
    if family != "gthread":
        extra = ()
    app = "app:asgi" if family == "asgi" else "app:wsgi"
    with harness.serving(way, workers, [*flags(family, way), *extra], app) as server:
        time.sleep(1)
        cpu, switches = server.cpu_seconds(), server.context_switches()
        outcome = load(Plan(port=server.port, seed=seed, **settings))
        cpu, switches = server.cpu_seconds() - cpu, server.context_switches() - switches
    return {
        "question": question,
        "family": family,
        "way": way,
        "workers": workers,
        "seed": seed,
        "requests": outcome.sent,
        "failed": outcome.failed,
        "slow": sum(latency > SLOW for latency in outcome.latencies),
        "measured": len(outcome.latencies),
        "p50_ms": round(percentile(outcome.latencies, 50), 2),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "by_worker": outcome.by_worker,
        "cpu_ms": round(1000 * cpu / outcome.sent, 4),
        "switches": round(switches / outcome.sent, 3),
    }


def percentile(latencies: list[float], part: int) -> float:
    """Return a percentile in milliseconds."""
    return 1000 * statistics.quantiles(latencies, n=100)[part - 1] if latencies else 0.0


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask all, in rounds; within a round all servers get the same plan, in random order."""
    chance = random.Random(0)
    samples = []
    for seed in range(arguments.rounds):
        for question in arguments.questions:
            families = list(QUESTIONS[question].families.items())
            for family, setups in families[:1] if arguments.smoke else families:
                for workers, extra in setups[:1] if arguments.smoke else setups:
                    ways = list(WAYS)
                    chance.shuffle(ways)
                    for way in ways:
                        samples.append(
                            sample(question, family, way, workers, extra, seed, arguments.seconds)
                        )
            print(f"round {seed + 1} of {arguments.rounds}: {question} done", flush=True)
    return samples


def cells(samples: list[dict[str, Any]], question: str) -> list[list[str]]:
    """Make the lines of one question's table."""
    lines = []
    for family, setups in QUESTIONS[question].families.items():
        for workers, _ in setups:
            runs = {
                way: [
                    s
                    for s in samples
                    if (s["question"], s["family"], s["workers"], s["way"])
                    == (question, family, workers, way)
                ]
                for way in WAYS
            }
            for way in WAYS:
                if not runs[way]:
                    continue
                cell = CELLS[question](runs[way], runs)
                lines.append([family, str(workers), way, *cell])
    return lines


def ratios(runs: list[dict[str, Any]], base: list[dict[str, Any]], what: str) -> str:
    """Compare run by run with the same plans on another server."""
    of = [run[what] / other[what] for run, other in zip(runs, base, strict=True) if other[what]]
    return f"{statistics.median(of):.2f} ({min(of):.2f} - {max(of):.2f})" if of else "-"


def middle(runs: list[dict[str, Any]], what: str, digits: int = 1) -> str:
    """Return the median."""
    return f"{statistics.median(run[what] for run in runs):.{digits}f}"


def _queue(runs: Any, by_way: Any) -> list[str]:
    return [
        middle(runs, "p50_ms"),
        middle(runs, "p99_ms"),
        ratios(runs, by_way["stock"], "p99_ms"),
        ratios(runs, by_way["reuse-port"], "p99_ms"),
        str(sum(run["failed"] for run in runs)),
    ]


def _block(runs: Any, by_way: Any) -> list[str]:
    slow, measured = (sum(run[what] for run in runs) for what in ("slow", "measured"))
    return [
        f"{slow} of {measured}",
        middle(runs, "p50_ms"),
        middle(runs, "p99_ms"),
        str(sum(run["failed"] for run in runs)),
    ]


def _keep_alive(runs: Any, by_way: Any) -> list[str]:
    worst = max(runs, key=lambda run: max(run["by_worker"]) - min(run["by_worker"]))
    return [
        " ".join(map(str, worst["by_worker"])),
        middle(runs, "p99_ms"),
        ratios(runs, by_way["stock"], "p99_ms"),
        str(sum(run["failed"] for run in runs)),
    ]


def _cost(runs: Any, by_way: Any) -> list[str]:
    return [
        middle(runs, "cpu_ms", 3),
        ratios(runs, by_way["reuse-port"], "cpu_ms"),
        middle(runs, "switches", 2),
        middle(runs, "p99_ms"),
    ]


CELLS = {"queue": _queue, "block": _block, "keep-alive": _keep_alive, "cost": _cost}
HEADERS = {
    "queue": ["p50 ms", "p99 ms", "p99 to stock's", "p99 to reuse-port's", "failed"],
    "block": ["over 200 ms", "p50 ms", "p99 ms", "failed"],
    "keep-alive": ["connections by worker, worst round", "p99 ms", "to stock's", "failed"],
    "cost": ["CPU ms", "to reuse-port's", "switches", "p99 ms"],
}
TITLES = {
    "queue": "Waiting at 75 % load: 300 requests/s of 20 ms, a new connection each",
    "block": "1 % of 200 requests/s block their worker, or its thread, for 1 s",
    "keep-alive": (
        "Requests on 256 kept-alive connections that were opened at random: 400 requests/s that"
        " hold their worker for 10 ms (gthread: 450 of 50 ms)"
    ),
    "cost": "For each request, at 400 requests/s on new connections",
}


def tables(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    text = (
        "# Worker classes\n\n"
        f"`python bench/classes.py`. {harness.describe(result)}\n\n"
        f"{harness.rounds(result)}; in each all four get the same Poisson arrivals, in random"
        " order. Medians; ratios are taken within a round, with their range. Latency counts from"
        " the intended time of sending. kernel and shared are ours, in those modes; stock shares"
        " one socket; gthread has four threads.\n"
    )
    for question in result["questions"]:
        header = ["class", "workers", "", *HEADERS[question]]
        text += f"\n## {TITLES[question]}\n\n"
        text += harness.markdown_table(header, cells(result["samples"], question))
    return text


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__.splitlines()[0], "classes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="of each run, instead of the usual ones")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 0.5
        arguments.questions = arguments.questions or ["keep-alive", "cost"]
    arguments.questions = arguments.questions or list(QUESTIONS)
    result = {
        "machine": harness.machine(),
        "rounds": arguments.rounds,
        "questions": arguments.questions,
        "samples": measure(arguments),
    }
    harness.write(arguments.output, result, tables(result))


if __name__ == "__main__":
    main()

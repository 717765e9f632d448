"""Resident memory of arbiter and workers of `-k hermes` beside stock gevent."""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import harness

BASE = "gevent"
MIB = 2**20
KINDS = ("rss", "uss", "pss")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start each rival in each round, serve some load, read the memory."""
    chance = random.Random(arguments.seed)
    samples = []
    for turn in range(arguments.rounds):
        rivals = list(arguments.rivals)
        chance.shuffle(rivals)
        for rival in rivals:
            with harness.serving(rival, arguments.workers) as server:
                for keep_alive in (False, True):
                    harness.wrk(server.url, arguments.seconds, 32, keep_alive)
                arbiter, *workers = [p.memory_full_info() for p in server.processes()]
            sample: dict[str, Any] = {"round": turn, "rival": rival}
            for kind in KINDS:
                sample[f"arbiter_{kind}"] = getattr(arbiter, kind)
                sample[f"worker_{kind}"] = statistics.median(getattr(w, kind) for w in workers)
            samples.append(sample)
        print(f"round {turn + 1} of {arguments.rounds} done", flush=True)
    return samples


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    medians = {
        rival: {
            key: statistics.median(s[key] for s in result["samples"] if s["rival"] == rival) / MIB
            for key in result["samples"][0]
            if key not in ("round", "rival")
        }
        for rival in dict.fromkeys(s["rival"] for s in result["samples"])
    }
    rows = [
        [
            rival,
            *(
                f"{values[f'{who}_{kind}']:.1f}"
                f" ({values[f'{who}_{kind}'] - medians[BASE][f'{who}_{kind}']:+.1f})"
                for who in ("arbiter", "worker")
                for kind in KINDS
            ),
        ]
        for rival, values in sorted(medians.items())
    ]
    header = ["server"]
    header += [f"{who} {kind.upper()}" for who in ("arbiter", "worker") for kind in KINDS]
    p = result["parameters"]
    return (
        "# Memory\n\n"
        f"`python bench/memory.py`. {harness.describe(result)}\n\n"
        f"MiB, medians of {p['rounds']} interleaved rounds, after {2 * p['seconds']:g} s of load on"
        f" {p['workers']} workers; in parentheses the difference to {BASE}. RSS: resident; USS: its"
        " own alone; PSS: shared pages divided among those who share them.\n\n"
        + harness.markdown_table(header, rows)
    )


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__, "memory")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=1, help="of each kind of load")
    parser.add_argument("--rivals", nargs="+", choices=harness.RIVALS, default=list(harness.RIVALS))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 1
    if BASE not in arguments.rivals:
        parser.error(f"--rivals must contain {BASE}, which the others are compared with")
    parameters = {
        name: getattr(arguments, name) for name in ("workers", "rounds", "seconds", "seed")
    }
    result = {
        "machine": harness.machine(),
        "parameters": parameters,
        "samples": measure(arguments),
    }
    harness.write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()

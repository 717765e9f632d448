"""What requests go through while some of them block a worker, by hang threshold.

The load of example_app/demo.py, with several seeds: open loop, a new connection for each
request, latency from the intended send time. All servers get the same plans, in turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import harness

sys.path.append(str(Path(__file__).resolve().parents[1] / "example_app"))
import demo

SERVERS = {
    "gevent": ["-k", "gevent"],
    "reuse-port": ["-k", "gevent", "--reuse-port"],
    **{
        f"hermes {threshold * 1000:g} ms": [
            *("-k", "hermes", "--hermes-strict"),
            *("--hermes-hang-threshold", f"{threshold}"),
        ]
        for threshold in (0.003, 0.01, 0.05)
    },
}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every server with every plan; one entry for each run."""
    demo.SERVERS = {name: (name, flags) for name, flags in SERVERS.items()}
    chance = random.Random(0)
    samples = []
    for seed in range(1, arguments.seeds + 1):
        for workers in arguments.workers:
            servers = list(SERVERS)
            chance.shuffle(servers)
            for name in servers:
                options = argparse.Namespace(**vars(arguments) | {"workers": workers, "seed": seed})
                outcome = demo.run(name, options)
                samples.append(
                    {
                        "server": name,
                        "workers": workers,
                        "seed": seed,
                        "requests": len(outcome.latencies),
                        "slow": sum(latency > demo.SLOW for latency in outcome.latencies),
                        "p50_ms": round(outcome.percentile(50), 2),
                        "p99_ms": round(outcome.percentile(99), 2),
                        "failed": dict(outcome.failed),
                    }
                )
        print(f"seed {seed} of {arguments.seeds} done", flush=True)
    return samples


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for workers in result["parameters"]["workers"]:
        for name in SERVERS:
            runs = [s for s in result["samples"] if (s["workers"], s["server"]) == (workers, name)]
            p99 = [run["p99_ms"] for run in runs]
            rows.append(
                [
                    str(workers),
                    name,
                    f"{sum(r['slow'] for r in runs) / sum(r['requests'] for r in runs):.2%}",
                    f"{statistics.median(r['p50_ms'] for r in runs):.1f}",
                    f"{statistics.median(p99):.0f} ({min(p99):.0f} - {max(p99):.0f})",
                    str(sum(sum(run["failed"].values()) for run in runs)),
                ]
            )
    p = result["parameters"]
    header = ["workers", "server", "over 200 ms", "p50 ms", "p99 ms", "failed"]
    return (
        "# Requests beside blocked workers\n\n"
        f"`python bench/hang.py`. {harness.describe(result)}\n\n"
        f"{p['rate']:g} requests/s, {p['blocking']:.0%} of them block their worker for"
        f" {p['block_ms']} ms and are not counted; {p['seeds']} plans of {p['seconds']:g} s, the"
        " same for all. p99: median and range over the plans. With 4 workers all of them are"
        " blocked at times, and nobody can answer.\n\n" + harness.markdown_table(header, rows)
    )


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__.splitlines()[0], "hang")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8)
    arguments = parser.parse_args()
    arguments.rate, arguments.blocking, arguments.block_ms = 200, 0.01, 1000
    if arguments.smoke:
        arguments.seeds, arguments.seconds, arguments.workers = 1, 1, [4]
    names = ("rate", "blocking", "block_ms", "seeds", "seconds", "workers")
    result = {
        "machine": harness.machine(),
        "parameters": {name: getattr(arguments, name) for name in names},
        "samples": measure(arguments),
    }
    harness.write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()

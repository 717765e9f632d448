"""Two tenants on one server: what one's blocking requests do to the other's.

Tenant A sends requests that block a worker, at a rate that fills half of the workers;
tenant B sends cheap ones to another bind address. B alone and B beside A, open loop, a
new connection for each request, latency from the intended send time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import harness

WORKERS = 8
BLOCK_S = 0.1
RATE_A = 0.5 * WORKERS / BLOCK_S  # half of the workers are always busy with A
RATE_B = 100.0
ANSWERED_WITHIN = 20.0
SHARE = 'hermes_bind_workers = {{"127.0.0.1:{a}": 0.5}}\n'
SERVERS: dict[str, tuple[list[str], str]] = {
    "least_loaded": (["-k", "hermes", "--hermes-strict"], ""),
    "least_loaded, A confined to half": (["-k", "hermes", "--hermes-strict"], SHARE),
    "cascade": (["-k", "hermes", "--hermes-strict", "--hermes-policy", "cascade"], ""),
    "gevent": (["-k", "gevent"], ""),
    "reuse-port": (["-k", "gevent", "--reuse-port"], ""),
}
ARRIVALS = ("even", "Poisson")


@contextlib.contextmanager
def serving(name: str) -> Iterator[tuple[int, int]]:
    """Start a server with two bind addresses; yield A's and B's ports."""
    flags, conf = SERVERS[name]
    a = harness.free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".py") as config:
        config.write(conf.format(a=a))
        config.flush()
        addresses = ["-b", f"127.0.0.1:{a}", "-c", config.name]
        with harness.serving(name, WORKERS, [*flags, *addresses], "app:blocking") as server:
            yield a, server.port


async def request(port: int, path: str, due: float, latencies: list[float]) -> None:
    """Send a request when it is due, and note how long after that it was answered."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, due - loop.time()))
    async with asyncio.timeout(ANSWERED_WITHIN):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
        latencies.append(loop.time() - due)
        writer.close()
    if b" 200 " not in answer[:15]:
        raise SystemExit(f"answered {answer[:50]!r}")


async def load(a: int, b: int, seconds: float, with_a: bool, arrivals: str, seed: int) -> float:
    """Run the load; return B's p99 in milliseconds."""
    chance = random.Random(seed)

    def due(rate: float, how: str) -> list[float]:
        times, now = [], 0.0
        while now < seconds:
            times.append(now)
            now += 1 / rate if how == "even" else chance.expovariate(rate)
        return times

    start = asyncio.get_running_loop().time() + 0.5
    latencies: list[float] = []
    sent = [request(b, "/", start + at, latencies) for at in due(RATE_B, "Poisson")]
    if with_a:
        # A starts earlier: B is to meet it in full swing.
        sent += [request(a, "/block", start - 0.4 + at, []) for at in due(RATE_A, arrivals)]
    await asyncio.gather(*sent)
    return statistics.quantiles(latencies, n=100)[98] * 1000


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every server with every plan; one entry for each run."""
    chance = random.Random(0)
    samples = []
    for seed in range(arguments.seeds):
        names = list(SERVERS)
        chance.shuffle(names)
        for name in names:
            with serving(name) as (a, b):
                sample: dict[str, Any] = {"server": name, "seed": seed}
                seconds = arguments.seconds
                sample["alone"] = asyncio.run(load(a, b, seconds, False, "even", seed))
                for arrivals in ARRIVALS:
                    sample[arrivals] = asyncio.run(load(a, b, seconds, True, arrivals, seed))
                    time.sleep(2 * BLOCK_S)
                samples.append(sample)
        print(f"seed {seed + 1} of {arguments.seeds} done", flush=True)
    return samples


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for name in SERVERS:
        runs = [sample for sample in result["samples"] if sample["server"] == name]
        cells = [f"{statistics.median(run['alone'] for run in runs):.1f}"]
        for arrivals in ARRIVALS:
            p99 = [run[arrivals] for run in runs]
            ratio = statistics.median(run[arrivals] / run["alone"] for run in runs)
            cells.append(f"{statistics.median(p99):.1f} ({min(p99):.1f} - {max(p99):.1f})")
            cells.append(f"{ratio:.2f}")
        rows.append([name, *cells])
    header = ["server", "B alone, ms", "beside A, even", "ratio", "beside A, Poisson", "ratio"]
    return (
        "# Two tenants\n\n"
        f"`python bench/tenants.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} workers. A's requests block a worker for {BLOCK_S * 1000:g} ms each,"
        f" {RATE_A:g} a second, which keeps half of the workers busy; B's are cheap,"
        f" {RATE_B:g} a second, Poisson. B's p99, median and range of"
        f" {len(result['samples']) // len(SERVERS)} plans. With A's arrivals even, four workers"
        " are free at any time. With Poisson arrivals A alone blocks all eight for 3 % of the"
        " time (Erlang's B formula), unless it is confined.\n\n"
        + harness.markdown_table(header, rows)
    )


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__.splitlines()[0], "tenants")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.seconds = 1, 0.3
    result = {"machine": harness.machine(), "samples": measure(arguments)}
    harness.write(arguments.output, result, table(result))


if __name__ == "__main__":
    main()

"""Show what a hung worker does to everyone else's requests, beside stock gunicorn.

Starts the Flask example under each server in turn, sends the same requests at the
same times (open loop: a request is measured from the moment it was meant to be sent,
however late the server or this program is), some of which block the worker that gets
them, and prints what the other requests went through.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVERS = {
    "hermes": ("gunicorn -k hermes", ["-k", "hermes"]),
    "gevent": ("gunicorn -k gevent", ["-k", "gevent"]),
    "reuse-port": ("gunicorn -k gevent --reuse-port", ["-k", "gevent", "--reuse-port"]),
}
READY_WITHIN = 30.0  # seconds
STOPPED_WITHIN = 15.0
ANSWERED_WITHIN = 20.0
SLOW = 0.2  # the paper counts a probe over 200 ms as one that met a hang


@dataclass
class Outcome:
    """What the requests to one server went through.

    Attributes:
        latencies: seconds, of answered requests that did not themselves block.
        blocking: how many requests blocked a worker.
        failed: refused, reset or unanswered requests, by error.
        answers: requests answered, by worker.
    """

    server: str
    latencies: list[float] = field(default_factory=list)
    blocking: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def percentile(self, percent: int) -> float:
        """Return a percentile of the latencies in milliseconds."""
        return statistics.quantiles(self.latencies, n=100)[percent - 1] * 1000

    @property
    def measured(self) -> bool:
        """Whether enough requests were answered to speak of percentiles."""
        return len(self.latencies) > 1

    @property
    def slow_share(self) -> float:
        """The share of requests that took longer than ``SLOW``."""
        return sum(latency > SLOW for latency in self.latencies) / len(self.latencies)


def schedule(rate: float, seconds: float, blocking: float, seed: int) -> list[tuple[float, bool]]:
    """Make (send time, blocks) for each request; the same for the same seed."""
    chance = random.Random(seed)
    count = round(rate * seconds)
    return [(i / rate, chance.random() < blocking) for i in range(count)]


async def request(port: int, path: str) -> str:
    """Send one request on a connection of its own and return the answer's body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        if b" 200 " not in head[:20]:
            raise ConnectionError(head[:40].decode(errors="replace") or "no answer")
        return body.decode()
    finally:
        writer.close()


async def load(outcome: Outcome, port: int, plan: list[tuple[float, bool]], block_ms: int) -> None:
    """Send the planned requests and note what became of them."""
    start = asyncio.get_running_loop().time() + 0.1

    async def one(at: float, blocks: bool) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(start + at - clock())
        try:
            path = f"/block?ms={block_ms}" if blocks else "/"
            body = await asyncio.wait_for(request(port, path), ANSWERED_WITHIN)
        except (OSError, asyncio.TimeoutError) as error:
            outcome.failed[type(error).__name__] += 1
            return
        outcome.answers[body.strip().rpartition("=")[2]] += 1
        if blocks:
            outcome.blocking += 1
        else:
            outcome.latencies.append(clock() - start - at)

    await asyncio.gather(*(one(at, blocks) for at, blocks in plan))


def free_port() -> int:
    """Find a port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[bytes], port: int, workers: int) -> None:
    """Wait until every worker has answered; they boot one after another."""
    seen: set[str] = set()
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline and len(seen) < workers:
        if server.poll() is not None:
            raise SystemExit(f"gunicorn ended with status {server.returncode}; see above")
        try:
            seen.add(asyncio.run(asyncio.wait_for(request(port, "/pid"), 1)))
        except (OSError, asyncio.TimeoutError):
            time.sleep(0.05)
    if not seen:
        raise SystemExit(f"gunicorn did not answer within {READY_WITHIN:.0f} s")


def run(name: str, arguments: argparse.Namespace) -> Outcome:
    """Start one server, send it the load, stop it."""
    title, flags = SERVERS[name]
    outcome = Outcome(title)
    port = free_port()
    plan = schedule(arguments.rate, arguments.seconds, arguments.blocking, arguments.seed)
    command = [sys.executable, "-m", "gunicorn", *flags, "-w", str(arguments.workers)]
    command += ["-b", f"127.0.0.1:{port}", "-c", os.devnull, "--chdir", str(HERE), "flask_app:app"]
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as home:
        environ = {**os.environ, "HOME": home}  # gunicorn 25+ puts a control socket there
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        try:
            wait_until_ready(server, port, arguments.workers)
            asyncio.run(load(outcome, port, plan, arguments.block_ms))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOPPED_WITHIN)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            log.seek(0)
            for line in log:
                if "hermes:" in line or "[ERROR]" in line or "Error" in line:
                    print(f"  {line.strip()}")
    return outcome


def report(outcomes: list[Outcome]) -> None:
    """Print the table."""
    print(f"\n{'':33}requests  failed  p50 ms  p99 ms  max ms  over 200 ms  per worker")
    for outcome in outcomes:
        if not outcome.measured:
            print(f"{outcome.server:33}too few answers to measure; {dict(outcome.failed)}")
            continue
        counts = sorted(outcome.answers.values())
        print(
            f"{outcome.server:33}{len(outcome.latencies) + outcome.blocking:8}"
            f"{outcome.failed.total():8}{outcome.percentile(50):8.1f}{outcome.percentile(99):8.1f}"
            f"{max(outcome.latencies) * 1000:8.0f}{outcome.slow_share:12.1%}"
            f"  {' '.join(map(str, counts))}"
        )
        for error, count in outcome.failed.items():
            print(f"{'':33}{count} x {error}")


def conclude(outcomes: list[Outcome]) -> str:
    """Say in a sentence what the numbers say."""
    ours = next((outcome for outcome in outcomes if "hermes" in outcome.server), None)
    others = [outcome for outcome in outcomes if outcome is not ours]
    if ours is None or not others or not all(outcome.measured for outcome in outcomes):
        return "No comparison: it takes the hermes server, another one, and answers from each."
    verdicts = []
    for other in others:
        if ours.slow_share < other.slow_share:
            word = "fewer than"
        elif ours.slow_share == other.slow_share:
            word = "as many as"
        else:
            word = "MORE than"
        seen = f"{other.slow_share:.1%}, p99 {other.percentile(99):.1f} ms"
        verdicts.append(f"{word} under `{other.server}` ({seen})")
    failed = f" {ours.failed.total()} requests to it FAILED." if ours.failed else ""
    return (
        f"Under `{ours.server}` {ours.slow_share:.1%} of the requests that did not block"
        f" anything took over 200 ms (p99 {ours.percentile(99):.1f} ms): {', '.join(verdicts)}."
        f"{failed}"
    )


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Make an argparse type for numbers above zero."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above zero, not {text}")
        return value

    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=positive(int), default=8, help="(%(default)s)")
    positive_float = positive(float)
    parser.add_argument("--rate", type=positive_float, default=200, help="requests/s (%(default)s)")
    parser.add_argument(
        "--seconds", type=positive_float, default=8, help="per server (%(default)s)"
    )
    parser.add_argument(
        "--blocking", type=float, default=0.01, help="share that blocks (%(default)s)"
    )
    parser.add_argument("--block-ms", type=int, default=1000, help="for how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the demo; exit 1 if a request to the hermes server failed."""
    arguments = parse()
    # So that `finally` stops the server also when the demo itself is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    print(
        f"{arguments.rate:g} requests/s for {arguments.seconds:g} s, each on a new connection;"
        f" {arguments.blocking:.0%} of them block their worker for {arguments.block_ms} ms;"
        f" {arguments.workers} workers."
    )
    outcomes = []
    for name in arguments.only:
        print(f"{SERVERS[name][0]} ...", flush=True)
        outcomes.append(run(name, arguments))
    report(outcomes)
    print("\n" + conclude(outcomes))
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps([vars(o) for o in outcomes], indent=1) + "\n")
        except OSError as error:
            raise SystemExit(f"cannot write the outcomes: {error}") from None
    if any("hermes" in outcome.server and outcome.failed for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")

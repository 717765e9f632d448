"""What it costs to be watched: throughput with `hermesctl top` and a scrape every second.

One server at its peak. In every other slice, in random order, the monitor, top and the
scraper are stopped (SIGSTOP), and so cost nothing. On a machine with neighbours the ratio
of two slices says little of a percent, so the CPU time that monitor and top take is
measured as well: they share nothing with the workers but the cores, and memory they read.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import psutil

WORKERS, CONNECTIONS = 4, 32
CASES = {"new": "new connection per request", "keep-alive": "kept-alive connections"}


class Watchers:
    """The monitor, top on a terminal of its own, a scraper."""

    def __init__(self, server: harness.Server, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._on = threading.Event()
        self.scrapes = 0
        monitor = next(
            process
            for process in psutil.process_iter(["name"])
            if process.info["name"] == "hermes-monitor"
            and os.getsid(process.pid) == server.arbiter.pid
        )
        terminal, inside = pty.openpty()
        command = [str(Path(sys.executable).with_name("hermesctl")), "top"]
        command += ["--server", str(server.arbiter.pid)]
        self._top = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside)
        self._pids = [monitor.pid, self._top.pid]
        for target, argument in ((self._read, terminal), (self._scrape, None)):
            threading.Thread(target=target, args=(argument,), daemon=True).start()

    def _read(self, terminal: int) -> None:
        with contextlib.suppress(OSError):
            while os.read(terminal, 65536):
                pass

    def _scrape(self, _: None) -> None:
        while True:
            self._on.wait()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self._url, timeout=5).read()
                self.scrapes += 1
            time.sleep(1)

    def cpu_seconds(self) -> list[float]:
        """Return what the monitor and top have used so far."""
        return [harness.on_cpu(pid) for pid in self._pids]

    def watch(self, wanted: bool) -> None:
        """Go on, or stop for a while."""
        (self._on.set if wanted else self._on.clear)()
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT if wanted else signal.SIGSTOP)

    def close(self) -> None:
        """Let all run on, and end top."""
        self.watch(True)
        self._top.terminate()
        self._top.wait()


@contextlib.contextmanager
def watched() -> Iterator[tuple[harness.Server, Watchers]]:
    """Start a server that is watched."""
    port = harness.free_port()
    with harness.serving("hermes", WORKERS, ["--hermes-stats", f"127.0.0.1:{port}"]) as server:
        time.sleep(2)  # the monitor's start
        watchers = Watchers(server, port)
        time.sleep(2)
        try:
            yield server, watchers
        finally:
            watchers.close()


def measure(rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Load it, watched and not."""
    samples, chance = [], random.Random(0)
    with watched() as (server, watchers):
        for turn in range(-1, rounds):
            for case in CASES:
                for on in chance.sample([False, True], 2):
                    watchers.watch(on)
                    used, start = watchers.cpu_seconds(), time.monotonic()
                    load = harness.wrk(server.url, seconds, CONNECTIONS, case == "keep-alive")
                    elapsed = time.monotonic() - start
                    if turn >= 0:
                        samples.append(
                            {
                                "round": turn,
                                "case": case,
                                "watched": on,
                                "requests_per_second": load.per_second,
                                "watchers_cpu": [
                                    round((after - before) / elapsed, 5)
                                    for before, after in zip(
                                        used, watchers.cpu_seconds(), strict=True
                                    )
                                ],
                                "errors": load.errors,
                            }
                        )
        if not watchers.scrapes:
            raise SystemExit("nothing was scraped")
    return samples


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows, cores = [], result["machine"]["cores"]
    for case, title in CASES.items():
        by = {
            (s["round"], s["watched"]): s["requests_per_second"]
            for s in result["samples"]
            if s["case"] == case
        }
        ratios = [by[turn, True] / by[turn, False] for turn in range(result["rounds"])]
        median, low, high = harness.median_and_interval(ratios)
        used = [s["watchers_cpu"] for s in result["samples"] if s["case"] == case and s["watched"]]
        monitor, top = (statistics.median(each) for each in zip(*used, strict=True))
        rows.append(
            [
                title,
                f"{median:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{1000 * monitor:.1f}",
                f"{1000 * top:.1f}",
                f"{(monitor + top) / cores:.2%}",
            ]
        )
    return (
        "# Being watched\n\n"
        f"`python bench/observed.py`. {harness.describe(result)}\n\n"
        f"{WORKERS} gevent workers at their peak, {harness.rounds(result)} of"
        f" {result['seconds']} s. Throughput while `hermesctl top` runs and /metrics is read every"
        " second, to that while both are stopped; median and its 95 % interval. Then"
        " the CPU time that monitor and top take, in milliseconds a second, and as a share of"
        " all cores.\n\n"
        + harness.markdown_table(["", "ratio", "95 %", "monitor", "top", "share"], rows)
    )


def main() -> None:
    """Run and write the result."""
    arguments = harness.parser(__doc__.splitlines()[0], "observed").parse_args()
    rounds, seconds = (1, 1) if arguments.smoke else (24, 3)
    result = {
        "machine": harness.machine(),
        "rounds": rounds,
        "seconds": seconds,
        "samples": measure(rounds, seconds),
    }
    harness.write(arguments.output, result, report(result))


if __name__ == "__main__":
    main()

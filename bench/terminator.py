"""What hermes_keepalive costs clients behind a proxy that ends TLS at layer 4.

HAProxy in TCP mode takes TLS off and passes bytes on, without the PROXY protocol: to the server
it looks like a client near by, but each connection that a response closes is a TLS handshake
for the client. Requests hold their worker for 20 ms, on few connections, which have a worker
each, and on many, which have to share them.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from classes import load, percentile
from contest import Contest, Run
from kept import SERVERS
from load import Plan

WORKERS = 8
LOADS = {  # connections and requests/s
    "4 connections, 20/s": (4, 20.0),
    "4 connections, 100/s": (4, 100.0),
    "24 connections, 60/s": (24, 60.0),
    "64 connections, 100/s": (64, 100.0),
    "64 connections, 300/s": (64, 300.0),
}
WHAT = {"mean_ms": "mean ms", "p99_ms": "p99 ms", "handshakes": "handshakes for 100 requests"}
CONFIGURATION = """
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen tls
    bind 127.0.0.1:{port} ssl crt {certificate}
    server one 127.0.0.1:{backend}
"""


@contextlib.contextmanager
def terminator(backend: int) -> Iterator[int]:
    """Run HAProxy in front of a port; yield its own."""
    harness.tool_version("haproxy")
    port = harness.free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key, certificate = folder / "key", folder / "certificate"
        subprocess.run(
            "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
            f" -keyout {key} -out {certificate}".split(),
            check=True,
            capture_output=True,
        )
        both = folder / "both.pem"
        both.write_text(certificate.read_text() + key.read_text())
        configuration = folder / "haproxy.cfg"
        configuration.write_text(CONFIGURATION.format(port=port, backend=backend, certificate=both))
        process = subprocess.Popen(["haproxy", "-q", "-db", "-f", str(configuration)])
        try:
            deadline = time.monotonic() + harness.READY_WITHIN
            while not harness.answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("haproxy did not start")
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait(harness.STOPPED_WITHIN)


def measure(run: Run) -> dict[str, Any]:
    """Put a load on a server behind the proxy."""
    connections, rate = LOADS[run.group]
    with (
        harness.serving(run.rival, WORKERS, SERVERS[run.rival], "app:wsgi") as server,
        terminator(server.port) as port,
    ):
        outcome = load(
            Plan(
                port=port,
                seed=run.seed,
                seconds=run.seconds,
                rate=rate,
                path="/hold/20",
                connections=connections,
                tls=True,
            )
        )
    return {
        "sent": outcome.sent,
        "failed": outcome.failed,
        "opened": outcome.opened,
        "mean_ms": round(1000 * statistics.fmean(outcome.latencies), 2),
        "p99_ms": round(percentile(outcome.latencies, 99), 2),
        "handshakes": round(100 * outcome.opened / (outcome.sent + connections), 1),
    }


def report(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for what in LOADS:
        for server in SERVERS:
            runs = [s for s in result["samples"] if (s["group"], s["rival"]) == (what, server)]
            if runs:  # a smoke run has only some
                cells = (statistics.median(run[key] for run in runs) for key in WHAT)
                rows.append([what, server, *(f"{cell:.1f}" for cell in cells)])
    return (
        "# Behind TLS at layer 4\n\n"
        f"`python bench/terminator.py`. {harness.describe(result)}\n\n"
        f"HAProxy in TCP mode takes TLS off in front of {WORKERS} workers, which requests hold for"
        f" 20 ms each; medians of {harness.rounds(result)} of {result['seconds']:g} s, in which all"
        " get the same arrivals.\n\n"
        + harness.markdown_table(["load", "server", *WHAT.values()], rows)
    )


CONTEST = Contest(
    "terminator",
    __doc__.splitlines()[0],
    measure,
    report,
    groups=tuple(LOADS),
    rivals=tuple(SERVERS),
    smoke=(("hermes", "gevent"), "64 connections, 300/s"),
    seconds=8.0,
)

if __name__ == "__main__":
    CONTEST.main()

"""What the benchmarks share: servers, load, statistics, the result's files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import gunicorn
import psutil

HERE = Path(__file__).resolve().parent
RIVALS = {
    "hermes": ["-k", "hermes", "--hermes-strict"],
    "hermes-bcc": ["-k", "hermes", "--hermes-strict", "--hermes-loader", "bcc"],
    "gevent": ["-k", "gevent"],
    "reuse-port": ["-k", "gevent", "--reuse-port"],
}
READY_WITHIN = 60.0  # seconds
STOPPED_WITHIN = 10.0
KEEP_ALIVE = 75  # seconds, the same for all


def machine() -> dict[str, Any]:
    """Describe where the numbers come from, without naming the host."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "kernel": platform.release().split("-")[0],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in ("gunicorn", "gevent", "hermes-gunicorn")},
        "wrk": "wrk " + tool_version("wrk"),
        "date": time.strftime("%Y-%m-%d"),
    }


def tool_version(tool: str) -> str:
    """Return the version a tool prints, or end with a word on how to get it."""
    if not shutil.which(tool):
        raise SystemExit(f"{tool} is needed: apt-get install {tool}")
    run = subprocess.run([tool, "-v"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+(\.\d+)?", run.stdout + run.stderr)
    return found[0] if found else "?"


@dataclass
class Server:
    """A running gunicorn: its arbiter and its port."""

    rival: str
    arbiter: psutil.Process
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/"

    def processes(self) -> list[psutil.Process]:
        """Return the arbiter and the workers, and what else it started."""
        return [self.arbiter, *self.arbiter.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Sum what arbiter and workers have used so far, user and system."""
        return sum(on_cpu(process.pid) for process in self.processes())

    def context_switches(self) -> int:
        """Sum the context switches of all their threads so far."""
        return sum(_switches(process.pid) for process in self.processes())


def on_cpu(pid: int) -> float:
    """Return the CPU time of a process so far, in seconds."""
    # By the nanosecond; the usual times come in ticks of 10 ms.
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _switches(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        found = re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text())
        total += sum(map(int, found))
    return total


def kernel_objects(pid: int) -> set[tuple[str, str]]:
    """Return kind and id of the eBPF programs and maps that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.update(re.findall(r"(prog|map)_id:\s+(\d+)", path.read_text()))
    return found


def bpftool(kind: str, number: str) -> dict[str, Any]:
    """Return what bpftool shows of a program or map; empty when it is gone."""
    command = ["bpftool", "-j", kind, "show", "id", number]
    shown = subprocess.run(command, capture_output=True, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else {}


def free_port() -> int:
    """Find a port nobody listens on, below those that the kernel gives to clients."""
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    """Say whether somebody listens on a port of 127.0.0.1."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def no_control_socket() -> list[str]:
    """Return the flags that keep gunicorn 25.1 and later from opening one."""
    version = tuple(map(int, gunicorn.__version__.split(".")[:2]))
    return ["--no-control-socket"] if version >= (25, 1) else []


def start(rival: str, flags: Sequence[str], workers: int, log: IO[str], app: str) -> Server:
    """Start a server on a free port, and on those in the flags; wait until all is ready."""
    port = free_port()
    # All of them are children, and gunicorn's only ones.
    command = [sys.executable, "-m", "gunicorn", *flags, "-w", str(workers)]
    command += ["-b", f"127.0.0.1:{port}", "--keep-alive", str(KEEP_ALIVE)]
    command += ["--log-level", "info", *no_control_socket()]
    if "-c" not in flags:
        command += ["-c", os.devnull]
    return run([*command, app], rival, port, workers, log)


def run(command: Sequence[str], rival: str, port: int, processes: int, log: IO[str]) -> Server:
    """Run the command of a server and wait until so many of its processes are ready."""
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=HERE)
    server = Server(rival, psutil.Process(process.pid), port, process)
    deadline = time.monotonic() + READY_WITHIN
    while not _ready(server, processes):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(server)
            log.seek(0)
            raise SystemExit(f"{rival} did not start:\n{log.read()}")
        time.sleep(0.05)
    return server


def stop(server: Server) -> None:
    """End a server and all that belongs to it."""
    server.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(STOPPED_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, 9)
    server.process.wait()


@contextlib.contextmanager
def serving(
    rival: str, workers: int, flags: Sequence[str] = (), app: str = "app:app"
) -> Iterator[Server]:
    """Start one of the rivals, wait until all workers have booted, stop it at the end."""
    with tempfile.TemporaryFile("w+") as log:
        server = start(rival, [*RIVALS.get(rival, ()), *flags], workers, log, app)
        try:
            yield server
        finally:
            stop(server)


@contextlib.contextmanager
def competing(name: str, rival: Any, workers: int, keep: bool = False) -> Iterator[Server]:
    """Start a server of ``rivals.py``, wait until it is ready, stop it at the end."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        command = rival.command(port, workers, keep)
        server = run(command, name, port, rival.processes(workers), log)
        try:
            yield server
        finally:
            stop(server)


def _ready(server: Server, workers: int) -> bool:
    """Whether the port answers and every worker waits for what comes."""
    with contextlib.suppress(OSError, psutil.Error):
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
        children = server.arbiter.children()
        # Those of other servers may have a helper beside them.
        return len(children) >= workers and sum(map(_waits, children)) >= workers
    return False


def _waits(process: psutil.Process) -> bool:
    # epoll, or what sync workers use, or granian's main thread. A process that boots sleeps
    # elsewhere, if at all.
    where = Path(f"/proc/{process.pid}/wchan").read_text()
    return any(word in where for word in ("poll", "select", "futex", "mutex", "accept"))


@dataclass
class Load:
    """What wrk reported."""

    requests: int
    per_second: float
    errors: str


def wrk(url: str, seconds: int, connections: int, keep_alive: bool) -> Load:
    """Send as many requests as possible for a while, from one thread."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
    if not keep_alive:
        command += ["-H", "Connection: close"]
    out = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
    errors = re.findall(r"(Socket errors: .*|Non-2xx.*)", out)
    return Load(
        int(re.search(r"(\d+) requests in", out)[1]),
        float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]),
        "; ".join(errors),
    )


def median_and_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[-51]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def describe(result: dict[str, Any]) -> str:
    """Say in a line where a result comes from."""
    m = result["machine"]
    rivals = "".join(f", {name} {version}" for name, version in m.get("rivals", {}).items())
    return (
        f"Linux {m['kernel']}, {m['cores']} cores ({m['cpu']}), Python {m['python']}, gunicorn"
        f" {m['gunicorn']}, gevent {m['gevent']}{rivals}, {m['wrk']}, {m['date']}."
    )


def rounds(result: dict[str, Any]) -> str:
    """Say how many rounds a result has."""
    return f"{result['rounds']} round" + "s" * (result["rounds"] != 1)


def write(output: Path, result: dict[str, Any], markdown: str) -> None:
    """Write the raw result, and beside it the tables made from it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown)
    print(markdown)
    print(f"written: {output.name}, {output.with_suffix('.md').name}")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Make a command line with what all benchmarks take."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--smoke", action="store_true", help="a short run, to see that it works")
    result.add_argument("--output", type=Path, default=HERE / "results" / f"{name}.json")
    return result

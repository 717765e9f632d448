"""Restarts, crashes and upgrades in a random order under load: what gets lost.

Every server gets the same sequence, drawn from a seed. A request counts as lost that was
refused, reset, closed, answered with an error or not answered in 15 s. Those on connections
that a worker held at the moment it was killed are counted apart: the worker is stopped first,
its connections are listed, then it is killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import psutil
from classes import flags

WORKERS = 4
RATE, KEPT = 300, 64
SETTLED_WITHIN = 40.0
BREATH = 0.5  # seconds between events
HOW = ("refused", "reset", "closed", "error", "unanswered")  # a request is lost
TIMEOUT = 3  # seconds, gunicorn's setting
GUNICORN = Path(sys.executable).with_name("gunicorn")
SERVERS = {
    f"{family}, {way}": (family, way)
    for family in ("gevent", "sync", "gthread", "asgi")
    for way in ("kernel", "shared", "stock", "reuse-port")
}
EVENTS = {
    "hup": 4,
    "hup, workers": 2,
    "hup, bind": 1,
    "hup, policy": 1,
    "hup, broken": 1,
    "ttin": 2,
    "ttou": 2,
    "upgrade": 2,
    "upgrade taken back": 2,
    "upgrade killed": 1,
    "kill": 4,
    "stop": 3,
    "block": 3,
    "timeout": 1,
    "usr1": 1,
}


class Chaos:
    """A server, and what can be done to it."""

    def __init__(self, name: str, folder: Path) -> None:
        family, self.way = SERVERS[name]
        self.folder, self.port = folder, harness.free_port()
        self.other_port = harness.free_port()
        self.workers, self.binds, self.policy = WORKERS, 1, "least_loaded"
        self.killed: list[tuple[int, float]] = []  # client ports, when
        self.pidfile = folder / "pid"
        self.configure()
        app = "app:asgi" if family == "asgi" else "app:wsgi"
        command = [str(GUNICORN), *flags(family, self.way), "-c", str(folder / "conf.py")]
        command += ["--chdir", str(harness.HERE), "--timeout", str(TIMEOUT)]
        command += ["--pid", str(self.pidfile), "--keep-alive", "30"]
        if family == "gthread":
            command += ["--threads", "4"]
        command += ["--max-requests", "3000", "--max-requests-jitter", "1000"]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*command, *harness.no_control_socket(), app],
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.wait(lambda: self.pidfile.exists() and self.settled())

    def configure(self, broken: bool = False) -> None:
        """Write the configuration."""
        ports = [self.port, self.other_port][: self.binds]
        text = (
            f"workers = {self.workers}\nhermes_policy = {self.policy!r}\n"
            f"bind = {[f'127.0.0.1:{port}' for port in ports]}\n"
        )
        (self.folder / "conf.py").write_text("workers = 1 +" if broken else text)

    def master(self) -> psutil.Process:
        """Return the arbiter in charge."""
        return psutil.Process(int(self.pidfile.read_text()))

    def pids(self) -> set[int]:
        """Return its workers; an error when the arbiter in charge is changing."""
        found = set()
        for child in self.master().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                # A new arbiter is a child as well, and has children.
                if not child.children():
                    found.add(child.pid)
        return found

    def settled(self) -> bool:
        """Whether there are as many workers as there are to be, and they are at work."""
        pids = self.pids()
        with contextlib.suppress(OSError):
            return len(pids) == self.workers and all(
                time.time() - psutil.Process(pid).create_time() > 0.3 for pid in pids
            )
        return False

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait for it and return its value; while it cannot be told it does not hold."""
        deadline = time.monotonic() + SETTLED_WITHIN
        while True:
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                if value := condition():
                    return value
            if time.monotonic() > deadline or self.process.poll() not in (None, 0):
                raise TimeoutError
            time.sleep(0.05)

    def do(self, event: str, chance: random.Random) -> None:
        """Do something to the server and wait until it has settled."""
        master, pids = self.master(), sorted(self.wait(self.pids))
        kind, _, how = event.partition(", ")
        if kind == "hup":
            if how == "workers":
                self.workers = chance.choice([2, 3, 5, 6])
            elif how == "bind":
                self.binds = 3 - self.binds
            elif how == "policy":
                self.policy = chance.choice(["least_loaded", "cascade"])
            self.configure(how == "broken")
            master.send_signal(signal.SIGHUP)
            if how == "broken":
                time.sleep(1)
                self.configure()
            else:
                self.wait(lambda: not self.pids() & set(pids))
        elif kind in ("ttin", "ttou"):
            wanted = self.workers + (1 if kind == "ttin" else -1)
            if not 2 <= wanted <= 12:
                return
            self.workers = wanted
            master.send_signal(signal.SIGTTIN if kind == "ttin" else signal.SIGTTOU)
        elif kind.startswith("upgrade"):
            self.upgrade(master, kind)
        elif kind in ("kill", "stop", "timeout"):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                self.harm(psutil.Process(chance.choice(pids)), kind)
        elif kind == "block":
            subprocess.Popen(
                ["curl", "-s", "-o", os.devnull, f"http://127.0.0.1:{self.port}/hold/1500"]
            )
        elif kind == "usr1":
            master.send_signal(signal.SIGUSR1)
        self.wait(self.settled)

    def upgrade(self, master: psutil.Process, kind: str) -> None:
        """Start another arbiter with USR2, and leave one of the two."""
        self.configure()
        master.send_signal(signal.SIGUSR2)
        other = Path(f"{self.pidfile}.2")
        self.wait(other.exists)
        new = psutil.Process(int(other.read_text()))
        if kind == "upgrade killed":
            time.sleep(0.3)
            children = new.children()
            new.kill()
            self.wait(lambda: not any(child.is_running() for child in children))
            other.unlink(missing_ok=True)
            return
        self.wait(lambda: len(new.children()) == self.workers)
        time.sleep(1)
        if kind == "upgrade":
            master.send_signal(signal.SIGTERM)
            self.wait(lambda: self.pidfile.exists() and self.master().pid == new.pid)
        else:
            new.send_signal(signal.SIGTERM)
            self.wait(lambda: not new.is_running() or new.status() == psutil.STATUS_ZOMBIE)

    def hold(self, victim: psutil.Process) -> None:
        """Stop a worker that is going to be killed, and list who loses a request by it."""
        victim.suspend()
        held = [c.raddr.port for c in victim.net_connections("tcp") if c.raddr]
        self.killed += [(port, time.monotonic()) for port in held]

    def harm(self, victim: psutil.Process, kind: str) -> None:
        """Stop a worker for a second, for good, or until the arbiter kills it."""
        if kind == "stop":
            victim.suspend()
            time.sleep(1)
            victim.resume()
            return
        self.hold(victim)
        if kind == "kill":
            victim.kill()
        self.wait(lambda: victim.pid not in self.pids())

    def end(self) -> None:
        """End all."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            self.master().terminate()
            self.master().wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def sequence(seed: int) -> Iterator[str]:
    """Draw events for ever."""
    chance = random.Random(seed)
    while True:
        yield chance.choices(list(EVENTS), list(EVENTS.values()))[0]


def supported(event: str, way: str) -> bool:
    """Whether gunicorn survives it without us."""
    if way in ("kernel", "shared"):
        return True
    if event == "hup, bind":
        return False  # the old workers still have the address
    return event != "hup, broken" and not (way == "reuse-port" and event.startswith("upgrade"))


def run(name: str, seconds: float, rate: float, seed: int) -> dict[str, Any]:
    """Put one server through it."""
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(name, Path(folder))
        plan = {"port": chaos.port, "rate": rate, "kept": KEPT, "seed": seed}
        load = subprocess.Popen(
            [sys.executable, str(harness.HERE / "chaos_load.py"), json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        done: collections.Counter[str] = collections.Counter()
        chance, broke = random.Random(seed), ""
        when: list[tuple[float, str]] = []
        until = time.monotonic() + seconds
        try:
            for event in sequence(seed):
                time.sleep(BREATH)
                if time.monotonic() > until:
                    break
                if supported(event, chaos.way):
                    when.append((time.monotonic(), event))
                    chaos.do(event, chance)
                    done[event] += 1
        except (TimeoutError, psutil.Error, OSError) as error:
            broke = f"{event}: {error!r}"
        time.sleep(BREATH)
        assert load.stdin
        load.stdin.close()
        load.stdin = None
        outcome = json.loads(load.communicate()[0])
        chaos.end()
        chaos.log.seek(0)
        log = chaos.log.read()
    excused = [loss for loss in outcome["lost"] if _excused(loss, chaos.killed)]
    lost = [loss for loss in outcome["lost"] if loss not in excused]
    return {
        "server": name,
        "seed": seed,
        "events": dict(done),
        "answered": outcome["answered"],
        "repeated": outcome["repeated"],
        "left_out": outcome["left_out"],
        "inside_killed": len(excused),
        "lost": dict(collections.Counter(how for how, _, _ in lost)),
        "lost_after": dict(
            collections.Counter(_during(at, when).rpartition(" +")[0] for _, _, at in lost)
        ),
        "slowest": round(outcome["slowest"], 2),
        "slowest_after": _during(outcome["slowest_at"], when),
        "broke": broke,
        "tracebacks": log.count("Traceback"),
        "log": log if broke or (lost and chaos.way in ("kernel", "shared")) else "",
    }


def _during(at: float, when: list[tuple[float, str]]) -> str:
    """Name the last event before a moment, and how long before."""
    started, event = max(((s, e) for s, e in when if s <= at), default=(at, "start"))
    return f"{event} +{at - started:.2f}"


def _excused(loss: list[Any], killed: list[tuple[int, float]]) -> bool:
    _, port, when = loss
    return any(port == other and 0 <= when - at < 3 * TIMEOUT for other, at in killed)


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    rows = []
    for run in result["runs"]:
        lost = run["lost"]
        rows.append(
            [
                run["server"],
                str(sum(run["events"].values())),
                str(run["answered"]),
                *(str(lost.get(how, 0)) for how in HOW),
                str(run["inside_killed"]),
                str(run["repeated"]),
                f"{run['slowest']:.1f}",
                run["broke"] or "-",
                str(run.get("left_out", "-")),
            ]
        )
    header = ["", "events", "answered", *HOW]
    header += ["in killed workers", "repeated", "slowest s", "gave up at", "left out"]
    return (
        "# Chaos\n\n"
        f"`python bench/chaos.py --seconds {result['seconds']:g}`. {harness.describe(result)}\n\n"
        f"{result['parallel']} servers at a time, each with {WORKERS} workers,"
        f" {result.get('rate', RATE):g} new connections/s and {KEPT} kept-alive clients."
        f" Events of a random sequence: {', '.join(EVENTS)}; and `max_requests` all the time."
        " Stock gunicorn exits at a reload with a broken configuration or with one more address,"
        " and `--reuse-port` at an upgrade as well, so they are spared those. A request is lost if"
        " it was refused, reset, closed without an answer, answered with an error or not answered"
        " in 15 s. Not counted as lost: those on connections that a killed worker held; and what"
        " kept-alive clients may repeat. Left out: new connections that the load generator had no"
        " core to make in time."
        "\n\n" + harness.markdown_table(header, rows)
    )


def main() -> None:
    """Run and write the result; fail if one of ours loses something."""
    parser = harness.parser(__doc__.splitlines()[0], "chaos")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=RATE, help="new connections per second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="servers at a time")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.smoke:
        arguments.seconds, arguments.servers = 25.0, ["gevent, kernel", "gthread, shared"]
        arguments.parallel = 2
        arguments.rate = 100.0  # seven other benchmarks run on the same cores
    runs = []
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for one in pool.map(
            lambda name: run(name, arguments.seconds, arguments.rate, arguments.seed),
            arguments.servers,
        ):
            runs.append(one)
            shown = {key: value for key, value in one.items() if key != "log"}
            print(json.dumps(shown), flush=True)
    logs = [one.pop("log") for one in runs]
    result = {
        "machine": harness.machine(),
        "seconds": arguments.seconds,
        "rate": arguments.rate,
        "parallel": arguments.parallel,
        "runs": runs,
    }
    harness.write(arguments.output, result, table(result))
    print(*filter(None, logs), sep="\n", end="", file=sys.stderr)
    ours = [one for one in runs if SERVERS[one["server"]][1] in ("kernel", "shared")]
    if failed := [one for one in ours if one["lost"] or one["broke"]]:
        raise SystemExit(f"something was lost: {json.dumps(failed)}")


if __name__ == "__main__":
    main()

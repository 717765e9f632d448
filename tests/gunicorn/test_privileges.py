"""Only the arbiter holds the capabilities that eBPF needs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import gunicorn
import psutil
import pytest
from gunicorn_server import Server, as_nobody, ask_server, wait_for

OURS = 1 << 38 | 1 << 39  # CAP_PERFMON, CAP_BPF
SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
CLASSES = {"hermes": "gevent", "hermes_sync": "sync", "hermes_gthread": "gthread"}
if int(gunicorn.__version__.split(".")[0]) >= 24:
    CLASSES["hermes_asgi"] = "asgi"


def capabilities(pid: int) -> dict[str, int]:
    """Return a process's sets of capabilities."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = dict(line.split(":", 1) for line in lines if line.startswith("Cap"))
    return {name: int(words[name], 16) for name in SETS}


def ours(pid: int) -> set[str]:
    """Return the sets in which a process holds one of the capabilities."""
    return {name for name, held in capabilities(pid).items() if held & OURS}


def monitor_of(server: Server) -> int:
    """Ask for the monitor, and return its process."""
    ask_server(server.process.pid, "status")
    session = server.process.pid
    wanted = [
        process.pid
        for process in psutil.process_iter(["name"])
        if process.info["name"] == "hermes-monitor" and session_of(process.pid) == session
    ]
    (pid,) = wanted
    return pid


def session_of(pid: int) -> int:
    """Return a process's session: all that a server started is in one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def start_class(start: Any, worker_class: str, *flags: str, **options: Any) -> Server:
    """Start a server with one worker of that class."""
    app = "apps:asgi" if "asgi" in worker_class else "apps:app"
    return start(*flags, worker_class=worker_class, app=app, workers=1, **options)  # type: ignore[no-any-return]


def child_of(server: Server, kind: str = "subprocess") -> int:
    """Have the application start a process."""
    return int(server.get(f"/child?{kind}"))


@pytest.mark.parametrize("worker_class", CLASSES)
def test_an_ambient_capability_stays_in_the_arbiter(start, worker_class):
    server = start_class(start, worker_class, prefix=as_nobody("+bpf", "+perfmon"))
    assert server.lines("hermes: kernel dispatch")
    assert ours(server.process.pid) == set(SETS)
    (worker,) = server.worker_pids()
    children = [child_of(server), child_of(server, "fork")]
    assert [ours(pid) for pid in [worker, *children, monitor_of(server)]] == [set()] * 4
    # What else the server was given its workers have, as those of the stock class.
    stock = start_class(start, CLASSES[worker_class], prefix=as_nobody("+bpf", "+perfmon"))
    (other,) = stock.worker_pids()
    given = {name: held & ~OURS for name, held in capabilities(other).items()}
    assert capabilities(worker) == given
    assert given["CapAmb"]


def test_the_arbiter_can_still_dispatch_after_a_reload_and_an_upgrade(start):
    server = start("--pid", "pid", prefix=as_nobody("+bpf"), workers=1)
    before = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not before & server.worker_pids(), "the reload")
    server.wait_ready()
    server.signal(signal.SIGUSR2)
    second = server.folder / "pid.2"
    wait_for(second.exists, "the next arbiter")
    wait_for(lambda: len(server.lines("hermes: kernel dispatch")) == 2, "its dispatch")
    arbiter = int(second.read_text())
    assert ours(arbiter) >= {"CapEff", "CapAmb"}
    (worker,) = wait_for(psutil.Process(arbiter).children, "its worker")
    wait_for(lambda: not ours(worker.pid), "the worker to let go of it")


@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_worker_that_root_starts_as_somebody_else_has_none(start, worker_class):
    # An inheritable capability is all that a change of the user leaves.
    inheritable = ["setpriv", "--inh-caps=+bpf,+perfmon"]
    flags = ("--user", "nobody", "--worker-tmp-dir", "/dev/shm")
    # Imported by root: nobody may not be able to read this environment.
    conf = "import gevent.fileobject, gevent.subprocess\n"
    server = start_class(start, worker_class, *flags, prefix=inheritable, conf=conf)
    assert server.lines("hermes: kernel dispatch")
    assert ours(server.process.pid) == {"CapInh", "CapPrm", "CapEff"}
    (worker,) = server.worker_pids()
    assert [ours(pid) for pid in [worker, child_of(server), monitor_of(server)]] == [set()] * 3


def test_roots_workers_stay_what_they_are(start):
    (stock,) = start_class(start, "sync").worker_pids()
    server = start_class(start, "hermes_sync")
    (worker,) = server.worker_pids()
    assert capabilities(worker) == capabilities(stock)

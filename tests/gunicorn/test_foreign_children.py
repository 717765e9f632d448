"""In a process that is no hermes worker nothing of ours is open, in both modes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import gunicorn
import psutil
import pytest
from gunicorn_server import Server, listens, wait_for

VERSION = int(gunicorn.__version__.split(".")[0])
STOCK = {"hermes": "gevent", "hermes_sync": "sync", "hermes_gthread": "gthread"}
if VERSION >= 24:
    STOCK["hermes_asgi"] = "asgi"
MODES = ["kernel", "shared"]
CHILDREN = ["fork", "multiprocessing", "subprocess"]
OURS = re.compile(r"memfd:hermes|bpf")


def listening() -> set[str]:
    """Return the inodes of all TCP sockets that listen."""
    # What changes while the kernel lists it may hide other lines of one listing.
    texts = [Path("/proc/net/tcp").read_text() for _ in range(4)]
    lines = [line for text in texts for line in text.splitlines()[1:]]
    return {fields[9] for fields in map(str.split, lines) if fields[3] == "0A"}


def open_files(pid: int) -> Counter[str]:
    """Say what a process has open, one word for each kind of file, but for connections.

    A client's may still be closing when the next one asks for a child.
    """
    listeners, kinds = listening(), Counter[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            kind, _, inode = target.partition(":")
            if kind == "socket":
                if inode.strip("[]") not in listeners:
                    continue
                kind = "listener"
            kind = "file" if kind.startswith("/") and not OURS.search(kind) else kind
            kinds[target if kind == "anon_inode" else kind] += 1
    return kinds


def shared_with_us(pid: int) -> list[str]:
    """Return the lines of a process's memory map that are the worker status table."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if line.split()[1][3] == "s" and OURS.search(line)]


def executed(pid: int) -> bool:
    """Say whether a child is what it is to become: its files are closed then."""
    return Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"


def start_with(start: Any, worker_class: str, *flags: str, **options: Any) -> Server:
    """Start a server with one worker of that class."""
    app = "apps:asgi" if "asgi" in worker_class else "apps:app"
    return start(*flags, worker_class=worker_class, app=app, workers=1, **options)  # type: ignore[no-any-return]


def children_of(server: Server) -> dict[str, Counter[str]]:
    """Have the application start each kind of child, and say what each has open."""
    found = {}
    for kind in CHILDREN:
        pid = int(server.get(f"/child?{kind}"))
        if kind == "subprocess":
            wait_for(lambda pid=pid: executed(pid), "the program")
        found[kind] = open_files(pid)
        assert shared_with_us(pid) == []
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("worker_class", STOCK)
def test_what_the_application_forks_has_nothing_of_ours(start, worker_class, mode):
    stock = children_of(start_with(start, STOCK[worker_class]))
    server = start_with(start, worker_class, "--hermes-mode", mode)
    (worker,) = server.worker_pids()
    assert shared_with_us(worker)  # or this test proves nothing
    wait_for(lambda: children_of(server) == stock, f"no more than {stock}")
    for _ in range(5):
        server.get("/pid")  # and the worker has what it needs
    assert "Traceback" not in server.log


def test_a_child_that_turns_its_copy_of_the_loop_serves_nobody(start):
    stock = int(start_with(start, "gevent").get("/child?turning"))
    server = start_with(start, "hermes")
    for _ in range(3):
        server.get("/fork")
    pid = int(server.get("/child?turning"))
    for _ in range(50):
        assert int(server.get("/pid")) != pid
    # With the stock class it ends when it sees that its parent is not the arbiter; not on
    # Python 3.13, where it ends by itself.
    wait_for(lambda: not alive(stock), "the stock child's end")
    wait_for(lambda: not alive(pid), "the child's end")
    assert "Traceback" not in server.log


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended may not have been waited for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_of_another_class_after_a_reload_has_nothing_of_ours(start, mode):
    (stock,) = start_with(start, "sync").worker_pids()
    conf = f"worker_class = 'hermes'\nhermes_mode = {mode!r}\n"
    server = start(worker_class=None, workers=1, conf=conf)
    before = server.worker_pids()
    path = server.folder / "gunicorn.conf.py"
    path.write_text(path.read_text() + "worker_class = 'sync'\n")
    server.signal(signal.SIGHUP)
    wait_for(lambda: not before & server.worker_pids(), "the new workers")
    (worker,) = wait_for(server.worker_pids, "a worker")
    assert shared_with_us(worker) == []
    assert open_files(worker) == open_files(stock)
    assert int(server.get("/pid")) == worker


DIRTY = """
from pathlib import Path
Path("dirty.py").write_text("from gunicorn.dirty.app import DirtyApp as App")
dirty_apps = ["dirty:App"]
dirty_workers = 1
"""


def dirty_processes(server: Server, number: int) -> list[int]:
    """Return the ids of the latest dirty arbiter and worker, once there were so many of each."""

    def started(what: str) -> list[int]:
        return [int(pid) for pid in re.findall(rf"Spawned {what} \(pid: (\d+)\)", server.log)]

    kinds = ("dirty arbiter", "dirty worker")
    wait_for(lambda: all(len(started(kind)) >= number for kind in kinds), "dirty processes")
    return [started(kind)[-1] for kind in kinds]


@pytest.mark.skipif(VERSION < 25, reason="gunicorn 25 and later have dirty workers")
@pytest.mark.parametrize("mode", MODES)
def test_a_dirty_arbiter_that_is_started_again_has_nothing_of_ours(launch, mode):
    found = []
    for worker_class in ("sync", "hermes_sync"):
        # gunicorn ends the dirty arbiter of another server of the same name.
        flags = ("--name", f"{worker_class}-{mode}", "--hermes-mode", mode)
        server = launch(*flags, worker_class=worker_class, workers=1, conf=DIRTY)
        wait_for(lambda server=server: listens(server.port), "the server")
        arbiter, _ = dirty_processes(server, 1)
        server.get("/pid")  # all is set up
        os.kill(arbiter, signal.SIGKILL)
        pids = dirty_processes(server, 2)
        assert not any(map(shared_with_us, pids))
        found.append([open_files(pid) for pid in pids])
    stock, ours = found
    assert ours == stock

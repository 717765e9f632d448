"""What fails for a moment works again afterwards."""

from __future__ import annotations

import contextlib
import resource

import psutil
import pytest
from gunicorn_server import wait_for


@contextlib.contextmanager
def without_files(process: psutil.Process):
    """Let a process open no more files."""
    before = process.rlimit(resource.RLIMIT_NOFILE)
    process.rlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("worker_class", ["hermes", "hermes_sync", "hermes_gthread"])
def test_a_moment_without_files_does_not_end_rescue(start, worker_class):
    server = start("--threads", "1", worker_class=worker_class)
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(server.connect())
        busy.send("/block?0.5")
        (mark,) = wait_for(lambda: list(server.folder.glob("blocked-*")), "the block")
        helper = psutil.Process(int(mark.name.partition("-")[2]))
        (frozen,) = (psutil.Process(p) for p in server.worker_pids() if p != helper.pid)
        frozen.suspend()
        stack.callback(frozen.resume)
        with without_files(helper):
            client = stack.enter_context(server.connect())  # to the one that seems idle
            client.send("/pid")
            busy.receive()
            busy.close()
            (line,) = wait_for(lambda: server.lines("hermes: cannot take over"), "a word")
        assert client.receive() == (200, str(helper.pid).encode())
    assert "Too many open files" in line
    assert "LimitNOFILE" in line

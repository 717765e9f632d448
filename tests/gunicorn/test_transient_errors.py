"""What fails for a moment works again afterwards."""

from __future__ import annotations

import contextlib
import resource
import socket

import psutil
import pytest
from gunicorn_server import ask_server, free_port, wait_for

from hermes_gunicorn.core.errors import HermesError


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


def listening(port: int) -> psutil.Process | None:
    """Return the process that listens on a port of 127.0.0.1."""
    for each in psutil.net_connections("tcp4"):
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
            return psutil.Process(each.pid)
    return None


def test_a_monitor_that_serves_statistics_is_started_again(start):
    port = free_port()
    server = start("--hermes-stats", f"127.0.0.1:{port}", workers=1)
    first = wait_for(lambda: listening(port), "the monitor")
    first.kill()
    again = wait_for(lambda: (found := listening(port)) and found != first, "another one")
    assert again
    assert server.get("/pid")


def test_a_monitor_answers_after_a_moment_without_files(start):
    port = free_port()
    server = start("--hermes-stats", f"127.0.0.1:{port}", workers=1)
    monitor = wait_for(lambda: listening(port), "the monitor")
    assert ask_server(server.process.pid, "status")
    with without_files(monitor), contextlib.suppress(HermesError):
        ask_server(server.process.pid, "status")  # for which it may have a number already
    assert ask_server(server.process.pid, "status")


FAILS_TWICE = """
from gunicorn.instrument.statsd import Statsd


class FailsTwice(Statsd):
    failures = 2

    def gauge(self, name, value):
        if self.failures:
            self.failures -= 1
            raise OSError("on purpose")
        super().gauge(name, value)


logger_class = FailsTwice
"""


def test_statsd_is_reported_to_after_an_error(start):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        sink.settimeout(10)
        to = f"127.0.0.1:{sink.getsockname()[1]}"
        server = start("--statsd-host", to, workers=1, conf=FAILS_TWICE)
        wait_for(lambda: sink.recv(4096).startswith(b"hermes.workers.hung"), "a gauge")
    assert len(server.lines("hermes: error in _report_metrics")) == 1

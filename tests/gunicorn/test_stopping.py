"""A worker that is to end does so as soon as gunicorn's own, but for what it owes."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil
import pytest
from gunicorn_server import Server, wait_for

STOCK = ["sync", "gthread", "gevent"]
OURS = ["hermes_sync", "hermes_gthread", "hermes", "hermes_gevent_pywsgi"]
FEW = 40  # heartbeats; while it waits for nothing a worker has one each millisecond or two

TELL_WHAT_HAPPENS = """
import os
import signal
import time

import apps
from gunicorn.workers.base import Worker

from hermes_gunicorn.core.layout import WORKER

beats = 0
notify, serve = Worker.notify, apps.app


def notify_and_count(worker):
    global beats
    beats += 1
    notify(worker)


def write(publisher, **words):
    for name, value in words.items():
        publisher._words[WORKER.index(name)] = value


def app(environ, start_response):
    global beats
    print(f"{os.getpid()} begins a request", flush=True)
    path = environ["PATH_INFO"]
    publisher = getattr(apps.worker, "publisher", None)
    if publisher and path in ("/coming", "/stolen"):
        now = time.monotonic_ns()
        write(publisher, dispatched=publisher._words[WORKER.index("dispatched")] + 3)
        write(publisher, last_dispatch_ns=now)
        if path == "/stolen":
            write(publisher, rescued_at_ns=now + 1)
    if path == "/stolen":
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        return serve(environ, start_response)
    finally:
        beats = 0


def worker_exit(server, worker):
    print(f"{worker.pid} ends after {beats} heartbeats", flush=True)


Worker.notify = notify_and_count
apps.app = app
"""


def heartbeats_at_the_end(server: Server, pid: int) -> int:
    """Wait for a worker's end and return how many heartbeats it had after its last request."""
    (line,) = wait_for(lambda: server.lines(f"{pid} ends after"), "its end")
    return int(line.split()[-2])


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Say whether a process has not been given a signal yet, as it waits for a core."""
    with contextlib.suppress(OSError):  # it has ended of it
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                return bool(int(line.split()[1], 16) >> number - 1 & 1)
    return False


@contextlib.contextmanager
def at_work_with_a_queue(server: Server, waiting: int):
    """Have both workers block until released, with so many more that block behind them."""
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(server.connect()).send("/hold?end")
        try:
            wait_for(lambda: len(server.held("end")) == 2, "both to be at work")
            for _ in range(waiting):
                stack.enter_context(server.connect()).send("/block?0.5")
            yield
        finally:
            server.release("end")


@pytest.mark.parametrize(
    ("worker_class", "number"),
    [
        ("sync", signal.SIGINT),
        ("hermes_sync", signal.SIGINT),
        ("sync", signal.SIGABRT),
        ("hermes_sync", signal.SIGABRT),
        ("hermes_gthread", signal.SIGQUIT),
        ("hermes", signal.SIGQUIT),
    ],
)
def test_who_is_to_stop_at_once_begins_no_further_request(start, worker_class, number):
    server = start("--threads", "1", worker_class=worker_class, conf=TELL_WHAT_HAPPENS)
    with at_work_with_a_queue(server, 8):
        victim = min(server.worker_pids())
        begun = len(server.lines(f"{victim} begins"))
        psutil.Process(victim).send_signal(number)
        wait_for(lambda: not is_pending(victim, number), "the signal to arrive")
        server.release("end")
        heartbeats_at_the_end(server, victim)
        # gevent is told when its loop has turned once more, as the stock class is.
        assert len(server.lines(f"{victim} begins")) - begun <= (worker_class == "hermes")


@pytest.mark.parametrize("worker_class", [*STOCK, *OURS])
def test_a_life_that_max_requests_ends_is_over_at_once(start, worker_class):
    server = start("--max-requests", "20", worker_class=worker_class, conf=TELL_WHAT_HAPPENS)
    before = server.worker_pids()
    while not (ended := [pid for pid in before if server.lines(f"{pid} ends after")]):
        with contextlib.suppress(ConnectionError):  # gunicorn 23's own gthread loses some
            server.get("/coming")
    assert heartbeats_at_the_end(server, ended[0]) < FEW


@pytest.mark.parametrize("worker_class", ["sync", "hermes_sync"])
def test_what_siblings_took_is_not_waited_for(start, worker_class):
    server = start(worker_class=worker_class, conf=TELL_WHAT_HAPPENS)
    victim = int(server.get("/stolen"))
    assert heartbeats_at_the_end(server, victim) < FEW

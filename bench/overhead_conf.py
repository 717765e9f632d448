"""For ``overhead.py``: times the parts of a worker's work for us, where it happens."""

import atexit
import json
import os
import time

clock = time.perf_counter_ns
parts = {}


def timed(function, part):
    """Add up what a function takes, and how often it is called."""
    total = parts.setdefault(part, [0, 0])

    def call(*arguments):
        start = clock()
        try:
            return function(*arguments)
        finally:
            total[0] += clock() - start
            total[1] += 1

    return call


def post_worker_init(worker):
    """Put the clocks in, before the worker runs; write what they show when it ends."""
    publisher, begin = worker.publisher, worker.begin
    for name in ("opened", "closed", "began", "ended", "woke", "polls"):
        setattr(publisher, name, timed(getattr(publisher, name), name))
    worker.look = timed(worker.look, "look")
    worker.notify = timed(worker.notify, "notify")
    worker._turned = timed(worker._turned, "turned")

    def begin_and_time(*arguments):
        begin(*arguments)
        worker._schedule = timed(worker._schedule, "schedule")

    worker.begin = begin_and_time
    empty = timed(lambda: None, "empty")
    for _ in range(20_000):
        empty()
    atexit.register(write, os.getpid(), worker)


def write(pid, worker):
    """Leave the sums beside the server's log."""
    if os.getpid() == pid:
        with open(os.path.join(os.environ["HERMES_OVERHEAD"], str(pid)), "w") as file:
            json.dump(parts, file)

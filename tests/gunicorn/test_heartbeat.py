"""The arbiter hears of a worker between requests, as it does of gunicorn's own."""

from __future__ import annotations

import contextlib

import pytest

TELL_THE_AGE_OF_THE_HEARTBEAT = """
import time
import apps

ended = 0.0
serve = apps.app


def app(environ, start_response):
    global ended
    late = ended - apps.worker.tmp.last_update()
    print(f"heard of {late:.3f} s before the last request ended", flush=True)
    try:
        return serve(environ, start_response)
    finally:
        ended = time.monotonic()


apps.app = app
"""


def ages(server) -> list[float]:
    """Return for each request how old the heartbeat was when the one before it had ended."""
    return [float(line.split()[2]) for line in server.lines("heard of")]


def serve_in_a_row(server, path: str, count: int) -> None:
    """Send requests that hold their workers, all at the same time."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(count)]
        for client in clients:
            client.send(path)
        for client in clients:
            assert client.receive()[0] == 200
            client.close()  # for which gunicorn's sync worker waits


@pytest.mark.parametrize("worker_class", ["sync", "hermes_sync"])
def test_a_sync_worker_is_heard_of_before_each_request(start, worker_class):
    server = start(worker_class=worker_class, conf=TELL_THE_AGE_OF_THE_HEARTBEAT)
    before = len(ages(server))
    serve_in_a_row(server, "/block?0.1", 16)
    seen = ages(server)[before:]
    assert len(seen) >= 16
    assert max(seen) < 0.05, seen  # half a request


@pytest.mark.parametrize("worker_class", ["gevent", "hermes", "hermes_gevent_pywsgi"])
def test_a_gevent_worker_is_heard_of_each_second_while_requests_block_it(start, worker_class):
    # Siblings take four at a time from one that hangs.
    server = start(worker_class=worker_class, conf=TELL_THE_AGE_OF_THE_HEARTBEAT)
    serve_in_a_row(server, "/block?0.6", 16)
    assert max(ages(server)) < 1.5

"""The arbiter hears of a worker between requests, as it does of gunicorn's own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import psutil
import pytest
from gunicorn_server import Client

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


def send(server, path: str, count: int) -> list[Client]:
    """Send requests at the same time."""
    clients = [server.connect() for _ in range(count)]
    for client in clients:
        client.send(path)
        client.sock.shutdown(socket.SHUT_WR)  # for which gunicorn's sync worker waits
    return clients


def receive(clients: list[Client]) -> None:
    """Receive the answers."""
    for client in clients:
        with client:
            assert client.receive()[0] == 200


@contextlib.contextmanager
def at_rest(process: psutil.Process) -> Iterator[None]:
    """Have a process suspended."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.mark.parametrize("worker_class", ["sync", "hermes_sync"])
def test_a_sync_worker_is_heard_of_before_each_request(start, worker_class):
    server = start(worker_class=worker_class, conf=TELL_THE_AGE_OF_THE_HEARTBEAT)
    before = len(ages(server))
    one, other = (psutil.Process(pid) for pid in server.worker_pids())
    with at_rest(other):  # so that its share is taken beside one's own
        with at_rest(one):
            waiting = send(server, "/block?0.1", 10)
        receive(waiting)
    seen = ages(server)[before:]
    assert len(seen) == 10
    assert max(seen) < 0.05, seen  # half a request


@pytest.mark.parametrize("worker_class", ["hermes", "hermes_gevent_pywsgi"])
def test_a_gevent_worker_is_heard_of_each_second_while_requests_block_it(start, worker_class):
    # Siblings take four at a time from one that hangs. Stock gevent has this only while it
    # accepts one at a time, and is late where several clients speak at the same time.
    server = start(worker_class=worker_class, conf=TELL_THE_AGE_OF_THE_HEARTBEAT)
    receive(send(server, "/block?0.6", 16))
    assert max(ages(server)) < 1.5

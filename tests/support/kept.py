"""Clients that keep their connections, and see whether the server does."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

from gunicorn_server import Client, Server

# For workers: where cores are short connections are kept, and other tests use the cores.
CORES_TO_SPARE = """
from hermes_gunicorn.workers import mixin
mixin.waited_for_cores = lambda: 0
"""


def ask(client: Client, path: str, **options: object) -> tuple[int, bytes, bool]:
    """Send a request; return status, body, and whether the answer says that it is the last."""
    client.send(path, **options)  # type: ignore[arg-type]
    return answer(client)


def answer(client: Client) -> tuple[int, bytes, bool]:
    """Read an answer: status, body, and whether it says that it is the last."""
    head = client._until(b"\r\n\r\n")
    client.buffer = head + b"\r\n\r\n" + client.buffer
    status, body = client.receive()
    return status, body, b"\r\nconnection: close" in head.lower()


@contextlib.contextmanager
def blocking(server: Server, clients: int = 4, seconds: float = 0.2) -> Iterator[list[bool]]:
    """Have clients block workers for half of the time; collect whether answers close."""
    closed: list[bool] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with server.connect() as client:
                last = False
                while not last and not stop.wait(random.uniform(0, 2 * seconds)):
                    last = ask(client, f"/block?{seconds}")[2]
                    closed.append(last)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield closed
    finally:
        stop.set()
        for thread in threads:
            thread.join()

"""What waits in a worker's own queue without having woken it is served within a second."""

from __future__ import annotations

import gunicorn
import pytest

CLASSES: dict[str, tuple[str, ...]] = {
    "hermes": (),
    "hermes_gthread": ("--threads", "2"),
    "hermes_asgi": ("--asgi-loop", "asyncio"),
    "hermes_asgi-uvloop": ("--asgi-loop", "uvloop"),
    "hermes_sync": (),  # its poll looks at the queue itself
}
HAS_ASGI = int(gunicorn.__version__.split(".")[0]) >= 24


@pytest.mark.parametrize("name", [name for name in CLASSES if HAS_ASGI or "asgi" not in name])
def test_a_lone_worker_finds_what_its_poll_does_not_report(start, name):
    """Kernels before 6.18.27 and the like move connections there without a wake-up.

    Here the listener is taken out of the worker's epoll set behind its back.
    """
    worker_class = name.split("-")[0]
    app = "apps:asgi" if worker_class == "hermes_asgi" else "apps:app"
    server = start(*CLASSES[name], worker_class=worker_class, app=app, workers=1)
    server.get("/deafen")
    clients = [server.connect() for _ in range(3)]
    for client in clients:
        client.send("/pid")
    assert {int(client.receive()[1]) for client in clients} == server.worker_pids()
    for client in clients:
        client.close()

"""Uvicorn's worker with the mixin, by the line that docs/workers.md gives."""

from __future__ import annotations

import contextlib
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from gunicorn_server import under_load, unprivileged, wait_for
from kept import CORES_TO_SPARE, blocking

DOCS = Path(__file__).parents[2] / "docs" / "workers.md"


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.ebpf), "shared"])
def serve(request: pytest.FixtureRequest, launch):
    """Start a server with the documented class."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class HermesUvicornWorker" in block]

    def serve(threshold="0.2", **options):
        if request.param == "shared":
            options |= {"prefix": unprivileged(), "unix": True}
        conf = f"{code}\nworker_class = HermesUvicornWorker\n{CORES_TO_SPARE}"
        server = launch(
            *("--hermes-hang-threshold", threshold, "--hermes-rescue-after", threshold),
            **(options | {"worker_class": None, "app": "apps:asgi", "conf": conf}),
        )
        return server.wait_ready()

    return serve


def test_kept_alive_connections_are_spread_evenly(serve):
    server = serve("60", workers=4)  # other tests use the cores as well
    server.settle(0)
    pids: Counter[bytes] = Counter()
    with contextlib.ExitStack() as stack:
        for opened in range(32):
            client = stack.enter_context(server.connect())
            pids[client.get("/pid")] += 1
            server.settle(opened + 1)
    assert len(pids) == 4
    assert max(pids.values()) - min(pids.values()) <= 2
    wait_for(
        lambda: all(row["connections"] <= 1 for row in server.rows()), "the connections to close"
    )


def test_nothing_waits_for_a_worker_that_blocks(serve):
    server = serve(workers=3)
    with server.connect() as client, contextlib.ExitStack() as stack:
        client.send("/hold?end")
        (blocked,) = wait_for(lambda: server.held("end"), "the block")
        # Kept open, so that in shared mode the next one finds the other worker with fewer.
        others = [stack.enter_context(server.connect()) for _ in range(40)]
        pids = {int(other.get("/pid")) for other in others}
        server.release("end")
        assert client.receive()[0] == 200
    assert pids == server.worker_pids() - {blocked}


def test_connections_are_kept_only_while_requests_do_not_hold_their_worker(serve):
    server = serve("0.05", workers=2)
    assert server.keeps("/pid")
    with blocking(server) as closed:
        wait_for(lambda: any(closed), "connections to be closed")
    wait_for(lambda: server.keeps("/pid"), "connections to be kept again")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTTIN])
def test_signals_under_load_lose_nothing(serve, number: signal.Signals):
    server = serve(workers=2)
    with under_load(server) as failures:
        old = server.worker_pids()
        server.signal(number)
        if number == signal.SIGHUP:
            wait_for(lambda: not old & server.worker_pids(), "new workers")
        server.wait_ready(3 if number == signal.SIGTTIN else 2)
    assert not failures

"""Half-open handshakes do not change who gets the connections of honest clients."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from gunicorn_server import wait_for
from half_open import scanner

WORKERS = 4


@pytest.mark.parametrize("worker_class", ["hermes", "hermes_gthread"])
def test_honest_clients_are_spread_beside_scanners_and_after_them(start, worker_class):
    # Other tests use the cores as well: who waits for one is not to look hung or to be helped.
    unhurried = ("--hermes-hang-threshold", "1", "--hermes-rescue-after", "1")
    server = start(*unhurried, workers=WORKERS, worker_class=worker_class)
    pids: Counter[bytes] = Counter()
    queued = 0
    with scanner(server.port, 300):
        until = time.monotonic() + 4
        while time.monotonic() < until:
            pids[server.get("/pid")] += 1
            time.sleep(0.02)
        queued = sum(row["queued"] for row in server.rows())
    # What has piled up until then, 1,000 or so, would be there still.
    assert queued < 600
    wait_for(lambda: not any(row["queued"] > 1 for row in server.rows()), "the queues to heal", 2.5)
    for _ in range(100):
        pids[server.get("/pid")] += 1
        time.sleep(0.01)
    assert len(pids) == WORKERS
    assert max(pids.values()) < 0.6 * sum(pids.values()), pids

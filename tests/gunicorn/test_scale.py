"""More workers than one group of 64 slots holds."""

from __future__ import annotations

import contextlib
from collections import Counter

import psutil
import pytest
from gunicorn_server import ask_server, under_load, wait_for

WORKERS = 130


@pytest.mark.ebpf
def test_130_workers_share_kept_alive_connections_evenly(launch):
    # On a few cores a worker may wait its turn for long.
    server = launch(
        *("--preload", "--hermes-hang-threshold", "600", "--hermes-rescue-after", "600"),
        workers=WORKERS,
    )
    server.wait_ready(seconds=300)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]

    def is_idle() -> bool:
        # From outside: a worker that answers has a request for as long as it waits for a core.
        workers = ask_server(server.process.pid, "status")["workers"]
        return not any(worker["requests"] or worker["queued"] for worker in workers)

    wait_for(is_idle, "all questions to be off the books")
    with contextlib.ExitStack() as stack:
        counts: Counter[int] = Counter()
        # One that has accepted seems to have less to do than one that waits for a core.
        for worker in workers:
            worker.suspend()
        clients = [stack.enter_context(server.connect()) for _ in range(3 * WORKERS)]
        for worker in workers:
            worker.resume()
        for client in clients:
            client.send("/slot")
        for client in clients:
            counts[int(client.receive()[1])] += 1
        groups = Counter(slot // 64 for slot in counts)
        assert sorted(groups.values()) == [43, 43, 44]
        by_group = Counter({g: sum(c for s, c in counts.items() if s // 64 == g) for g in groups})
        # Three connections for each worker, whatever the group.
        assert len(counts) == WORKERS
        assert set(counts.values()) <= {2, 3, 4}
        assert all(abs(by_group[g] - 3 * groups[g]) <= 13 for g in groups)
    with under_load(server) as failures:
        for _ in range(100):
            server.get("/slot")
    assert not failures

"""What the product is for: no connection waits on a stuck worker, load is even."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from gunicorn_server import Client, Server, under_load, wait_for

PROG_TYPE_SK_REUSEPORT = 21
# However long a busy machine takes over a test.
PATIENT = ("--keep-alive", "300", "--timeout", "300")


def program_runs(server: Server) -> int:
    """Sum the runs of the programs whose fds the arbiter holds."""
    runs = 0
    for info in Path(f"/proc/{server.process.pid}/fdinfo").iterdir():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        if int(fields.get("prog_type", 0)) == PROG_TYPE_SK_REUSEPORT:
            runs += int(fields["run_cnt"])
    return runs


def quiet(server: Server) -> bool:
    """Whether nothing is in flight but the request that asks."""
    table = server.table()
    return all(
        (row["requests"], row["connections"])
        == ((1, 1) if row["slot"] == table["slot"] else (0, 0))
        and not row["queued"]
        for row in table["rows"][1:]
        if row["state"] == 2
    )


@contextlib.contextmanager
def two_workers(server: Server) -> Iterator[tuple[Client, int, Client]]:
    """Connect to one worker, and to another from which to watch it.

    A new connection would not do to watch a worker that is about to block: until it
    has read the request that blocks it, it is idle and may be given the connection.
    """
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.connect())
        slot = json.loads(first.get("/table"))["slot"]
        while True:
            other = stack.enter_context(server.connect())
            if json.loads(other.get("/table"))["slot"] != slot:
                yield first, slot, other
                return


def blocked(row: dict[str, int]) -> bool:
    """Whether the worker is inside a request that does not let its loop turn.

    A request in flight alone could be the last one, answered but not yet counted out.
    """
    busy = row["busy_since_ns"] and time.monotonic_ns() - row["busy_since_ns"]
    return row["requests"] > 0 and busy > 50_000_000


@pytest.mark.ebpf
def test_no_connection_waits_on_a_blocked_worker(start, loader, bpf_stats):
    """400 connections while one of 4 workers is blocked: none meets it."""
    server = start(*loader, *PATIENT, workers=4)
    with two_workers(server) as (blocker, victim, other):

        def rows() -> list[dict[str, int]]:
            table: dict[str, list[dict[str, int]]] = json.loads(other.get("/table"))
            return table["rows"]

        before, runs = rows(), program_runs(server)
        blocker.send("/hold?end")
        wait_for(lambda: blocked(rows()[victim]), "the block")
        # It lasts until all are answered: what meets it would have to be rescued.
        answers = Counter(int(server.get("/pid")) for _ in range(400))
        after = rows()
        (pid,) = server.held("end")
        server.release("end")
        assert blocker.receive()[0] == 200
    assert answers[pid] == 0
    assert answers.total() == 400
    # From a worker that waits for a core others may take something; not from this one.
    assert after[victim]["rescued_at_ns"] == before[victim]["rescued_at_ns"]
    assert after[victim]["dispatched"] == before[victim]["dispatched"]
    assert sum(r["dispatched"] for r in after) - sum(r["dispatched"] for r in before) == 400
    assert program_runs(server) - runs == 400


@pytest.mark.ebpf
def test_kept_alive_connections_are_spread_evenly(start, loader):
    """48 kept-alive connections over 8 workers: each has 6."""
    # Other tests use the cores as well: who waits for one is not to look hung or to be helped.
    flags = ("--hermes-hang-threshold", "60", "--hermes-rescue-after", "60", "--keep-alive", "60")
    server = start(*loader, *flags, workers=8)
    server.settle(0)
    clients: list[Client] = []
    try:
        for _ in range(48):
            clients.append(server.connect())
            clients[-1].get("/pid")
            server.settle(len(clients))
        pids = Counter(client.get("/pid") for client in clients)
        assert sorted(pids.values()) == [6] * 8
        assert Counter(client.get("/pid") for client in clients) == pids
    finally:
        for client in clients:
            client.close()


def test_a_killed_worker_costs_nothing_but_its_own_requests(start, loader):
    server = start(*loader, workers=3)
    slots = {row["slot"] for row in server.rows()}
    with under_load(server) as failures:
        for _ in range(3):
            victim = int(server.get("/pid"))
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in server.worker_pids(), "the kill")  # noqa: B023
            server.wait_ready()
    # A request that was inside the victim is lost, no other.
    assert len(failures) <= 3, failures
    assert {row["slot"] for row in server.rows()} == slots
    assert all(row["generation"] >= 1 for row in server.rows())
    assert sum(row["generation"] for row in server.rows()) == 6
    for _ in range(100):
        server.get("/pid")


def test_a_blocked_worker_is_left_alone_until_its_loop_turns_again(start):
    server = start(*PATIENT, workers=2)
    with two_workers(server) as (blocker, slot, other):
        victim = blocker.get("/pid")
        blocker.send("/hold?end")
        wait_for(lambda: blocked(json.loads(other.get("/table"))["rows"][slot]), "the block")
        assert victim not in {server.get("/pid") for _ in range(50)}
        server.release("end")
        assert blocker.receive()[0] == 200
    wait_for(lambda: server.get("/pid") == victim, "the worker's return")


def test_counters_never_drift(start):
    """After all kinds of requests and ends nothing is in flight and nothing queued."""
    server = start(workers=2)

    def mixed() -> None:
        for i in range(40):
            with server.connect() as client:
                client.send(["/pid", "/error", "/missing", "/stream?5", "/sleep?0.01"][i % 5])
                if i % 4:
                    client.receive()
        with server.connect():
            pass  # opened and closed without a word
        with server.connect() as client:
            client.sock.sendall(b"nonsense\r\n\r\n")

    threads = [threading.Thread(target=mixed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: quiet(server), "all counters to return to zero")


def test_a_scanners_bare_syn_is_written_off(start):
    """A connection that was dispatched but taken by nobody leaves no phantom load."""
    server = start(workers=2)
    # Reset while it waits: the kernel drops it from the accept queue on some paths.
    for _ in range(20):
        client = Client(server.address)
        client.sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: RST on close
        client.close()
    wait_for(lambda: quiet(server), "the phantom load to go")


def test_a_worker_that_scribbles_over_the_table_harms_nobody(start):
    """Any worker can write anywhere: connections are answered, and the table heals."""
    server = start(workers=3)
    with under_load(server) as failures:
        for _ in range(300):
            server.get("/scramble")
    assert failures == []
    server.wait_ready()
    # The hang threshold is the arbiter's, and it was scribbled over as well.
    assert not server.lines("hermes: error")
    assert len(server.worker_pids()) == 3


def test_a_child_of_the_application_does_not_disturb_the_row(start):
    server = start(workers=2)
    for _ in range(5):
        server.get("/fork")
    wait_for(lambda: quiet(server), "quiet")
    assert len(server.rows()) == 2

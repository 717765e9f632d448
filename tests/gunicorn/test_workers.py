"""What holds for every worker class."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from gunicorn_server import Client, Server, under_load, wait_for

CLASSES = {
    "hermes": [],
    "hermes_sync": [],
    "hermes_gthread": ["--threads", "2"],
}
SOON = 1.0  # seconds: far from what a stuck worker would make it


@pytest.fixture(params=CLASSES)
def worker_class(request: pytest.FixtureRequest) -> str:
    """Each class in turn."""
    return str(request.param)


@pytest.fixture
def serve(start, worker_class: str):
    """Start a server with workers of that class."""

    def serve(*flags: str, **options) -> Server:
        return start(*CLASSES[worker_class], *flags, worker_class=worker_class, **options)

    return serve


@contextlib.contextmanager
def sent(server: Server, path: str) -> Iterator[Client]:
    """Send a request and do not wait."""
    with server.connect() as client:
        client.send(path)
        yield client


@contextlib.contextmanager
def blocked(server: Server, *seconds: float) -> Iterator[None]:
    """Have as many workers block, each inside a request."""
    with contextlib.ExitStack() as stack:
        for number, duration in enumerate(seconds):
            client = stack.enter_context(sent(server, f"/block?{duration}"))
            # gunicorn's sync worker waits a while for a client's end, alone with it.
            client.sock.shutdown(socket.SHUT_WR)
            found = wait_for(
                lambda n=number: len(list(server.folder.glob("blocked-*"))) > n, "the block"
            )
            assert found
        yield


def ask(server: Server, count: int) -> list[tuple[float, int]]:
    """Send requests at the same time; return how long each took and who answered."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: timed(server), range(count)))


def timed(server: Server) -> tuple[float, int]:
    """Send a request; return the seconds it took and who answered."""
    start = time.monotonic()
    pid = int(server.get("/pid"))
    return time.monotonic() - start, pid


def test_all_workers_answer(serve):
    server = serve(workers=3)
    with under_load(server) as failures:
        seen = {int(server.get("/pid")) for _ in range(100)}
    assert seen == server.worker_pids()
    assert not failures


def test_capacity_is_what_the_class_can_run_at_once(serve, worker_class: str):
    server = serve(workers=2)
    expected = {"hermes": 1000, "hermes_sync": 1, "hermes_gthread": 2}[worker_class]
    assert {row["capacity"] for row in server.rows()} == {expected}


def test_counters_return_to_zero(serve):
    server = serve(workers=2)
    with under_load(server) as failures:
        for _ in range(50):
            server.get("/pid")
        for path in ("/missing", "/error", "/echo"):
            with contextlib.suppress(AssertionError, ConnectionError):
                server.get(path)
        server.connect().close()
    assert not failures

    def quiet() -> bool:
        table = server.table()
        return all(
            (row["requests"], row["connections"])
            == ((1, 1) if row["slot"] == table["slot"] else (0, 0))
            and not row["queued"]
            for row in table["rows"][1:]
            if row["state"] == 2
        )

    wait_for(quiet, "all counters to return to zero")


def test_nothing_waits_for_a_worker_that_blocks(serve):
    """Both workers block, one for long; what the kernel sent to that one the other takes."""
    # The kernel is not to notice: rescue alone has to do it.
    server = serve("--hermes-hang-threshold", "60", "--threads", "1", workers=2)
    with blocked(server, 5, 0.4):
        answers = ask(server, 8)
        assert max(seconds for seconds, _ in answers) < 0.4 + SOON
        assert len({pid for _, pid in answers}) == 1
        assert sum(row["rescued"] for row in server.rows()) > 0


def test_a_frozen_worker_is_noticed_helped_and_taken_back(serve):
    server = serve(workers=3)
    frozen = min(server.worker_pids())
    psutil.Process(frozen).suspend()
    try:
        # The first ones may be sent to it, for it waits in poll, they say.
        for _ in range(30):
            seconds, pid = timed(server)
            assert seconds < SOON
            assert pid != frozen
        assert sum(bool(row["frozen_since_ns"]) for row in server.rows()) <= 1
    finally:
        psutil.Process(frozen).resume()
    wait_for(lambda: timed(server)[1] == frozen, "the worker to come back")
    assert not any(row["frozen_since_ns"] for row in server.rows())


@pytest.mark.parametrize("path", ["/spin?2", "/regex?25"])
def test_a_worker_whose_loop_does_not_turn_gets_nothing(serve, path: str):
    """An endless loop, and C code that holds the GIL."""
    server = serve(workers=3)
    with sent(server, path) as client, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(client.receive)
        answers = []
        while not stuck.done():
            answers.append(timed(server))
        assert stuck.result()[0] == 200
    assert len(answers) > 20
    assert max(seconds for seconds, _ in answers) < SOON


def test_what_waited_for_a_killed_worker_is_answered(serve):
    server = serve("--hermes-hang-threshold", "60", "--threads", "1", workers=2)
    old = server.worker_pids()
    with blocked(server, 60, 60), ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(timed, server) for _ in range(6)]
        wait_for(lambda: established(server) >= 8, "them to be sent to somebody")
        for pid in old:
            psutil.Process(pid).kill()
        assert not {future.result()[1] for future in waiting} & old


def established(server: Server) -> int:
    """Count the clients' connections that the kernel has completed."""
    connections = psutil.Process().net_connections("tcp")
    return sum(c.status == "ESTABLISHED" and c.raddr[1:] == (server.port,) for c in connections)


def test_a_killed_worker_costs_nothing_but_its_own_requests(serve):
    server = serve(workers=3)
    with under_load(server) as failures:
        for _ in range(3):
            victim = int(server.get("/pid"))
            psutil.Process(victim).kill()
            wait_for(lambda v=victim: v not in server.worker_pids(), "its end")
            wait_for(lambda: len(server.worker_pids()) == 3, "its successor")
    # Those inside the worker at that moment: two clients send one at a time.
    assert len(failures) <= 3 * 2, failures


def test_term_lets_requests_finish(serve):
    server = serve(workers=2)
    with sent(server, "/sleep?1") as client:
        wait_for(lambda: sum(row["requests"] for row in server.rows()) > 1, "the request")
        server.signal(signal.SIGTERM)
        assert client.receive()[0] == 200
    assert server.wait_ended() == 0
    assert not server.lines("Traceback")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU])
def test_signals_under_load_lose_nothing(serve, number: signal.Signals):
    server = serve(workers=3)
    wanted = 3 + {signal.SIGTTIN: 1, signal.SIGTTOU: -1}.get(number, 0)
    with under_load(server) as failures:
        old = server.worker_pids()
        server.signal(number)
        if number == signal.SIGHUP:
            wait_for(lambda: not old & server.worker_pids(), "new workers", 30)
        wait_for(lambda: len(server.worker_pids()) == wanted, f"{wanted} workers")
        server.wait_ready(wanted)
    assert not failures
    assert not server.lines("Traceback")


def test_max_requests_under_load_loses_nothing(serve):
    server = serve("--max-requests", "40", "--max-requests-jitter", "20", workers=2)
    before = server.worker_pids()
    with under_load(server, 200) as failures:
        wait_for(lambda: not before & server.worker_pids(), "all workers to be recycled", 30)
    assert not failures


def test_an_idle_server_does_next_to_nothing(serve):
    server = serve(workers=4)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    time.sleep(3)  # until the timers have slowed down

    def switches() -> int:
        return sum(w.num_ctx_switches().voluntary for w in workers)

    before = switches()
    time.sleep(2)
    # Each has a heartbeat a second and a look a second.
    assert switches() - before <= 4 * 2 * 6


def test_concurrent_slow_requests_use_all_the_capacity(serve, worker_class: str):
    """As many requests as there is room for, spread over all workers, take one turn."""
    server = serve(workers=2)
    room = {"hermes": 8, "hermes_sync": 2, "hermes_gthread": 4}[worker_class]
    start = time.monotonic()
    threads = [threading.Thread(target=server.get, args=("/sleep?1",)) for _ in range(room)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 1.9

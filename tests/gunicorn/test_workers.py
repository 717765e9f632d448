"""What holds for every worker class."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gunicorn
import psutil
import pytest
from gunicorn_server import Client, Server, as_nobody, under_load, wait_for
from kept import blocking
from nginx import nginx
from websockets.sync.client import connect as websocket

CLASSES = {
    "hermes": "hermes",
    "hermes_gevent_pywsgi": "hermes_gevent_pywsgi",
    "hermes_sync": "hermes_sync",
    "hermes_gthread": "hermes_gthread",
    "asyncio": "hermes_asgi",
    "uvloop": "hermes_asgi",
}
CAPACITY = {"hermes_sync": 1, "hermes_gthread": 2}  # else worker_connections
ROOM = 50
MODES = ["kernel", "shared-tcp", "shared-unix"]
SOON = 1.0  # seconds: far from what a stuck worker would make it
HAS_ASGI = int(gunicorn.__version__.split(".")[0]) >= 24
NOBODY = as_nobody()


def configurations() -> Iterator[Any]:
    """Each class in each mode; one of them behind nginx as well."""
    for name, worker_class in CLASSES.items():
        if worker_class == "hermes_asgi" and not HAS_ASGI:
            continue
        for mode in [*MODES, "shared-nginx"] if name == "hermes_gthread" else MODES:
            yield pytest.param((name, mode), id=f"{name}-{mode}")


@pytest.fixture(params=configurations())
def configuration(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A worker class and a mode."""
    name, mode = request.param
    return str(name), str(mode)


@pytest.fixture
def worker_class(configuration: tuple[str, str]) -> str:
    """The name of the class."""
    return CLASSES[configuration[0]]


@pytest.fixture
def mode(configuration: tuple[str, str]) -> str:
    """The mode; all but ``kernel`` run without privilege."""
    return configuration[1]


@pytest.fixture
def serve(launch, configuration: tuple[str, str], worker_class: str, mode: str, tmp_path: Path):
    """Start a server with workers of that class, and wait for them."""
    with contextlib.ExitStack() as stack:

        def serve(*flags: str, **options: Any) -> Server:
            flags = ("--threads", "2", "--worker-connections", str(ROOM), *flags)
            if worker_class == "hermes_asgi":
                flags = ("--asgi-loop", configuration[0], *flags)
                options["app"] = "apps:asgi"
            if mode != "kernel":
                options |= {"prefix": NOBODY, "unix": mode != "shared-tcp"}
            server: Server = launch(*flags, worker_class=worker_class, **options)
            if mode == "shared-nginx":
                assert server.unix
                server.port = stack.enter_context(nginx(tmp_path, server.unix))
                server.unix = None
            return server.wait_ready()

        yield serve


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


def received_and_closed(client: Client) -> float:
    """Read a response and close, for which gunicorn's sync worker waits; return when."""
    client.receive()
    client.close()
    return time.monotonic()


def test_all_workers_answer(serve):
    server = serve(*UNHURRIED, workers=3)
    seen: set[int] = set()

    def all_seen() -> bool:
        # At the same time: a proxy that keeps its connections may need no more than two else.
        seen.update(pid for _, pid in ask(server, 8))
        return seen == server.worker_pids()

    with under_load(server) as failures:
        wait_for(all_seen, "an answer from each worker")
    assert not failures


def test_capacity_is_what_the_class_can_run_at_once(serve, worker_class: str):
    server = serve(workers=2)
    expected = CAPACITY.get(worker_class, ROOM)
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


def test_nothing_waits_for_a_worker_that_blocks(serve, mode: str):
    """Both workers block, one for long; what the kernel sent to that one the other takes."""
    # The kernel is not to notice: rescue alone has to do it.
    server = serve("--hermes-hang-threshold", "60", "--threads", "1", workers=2)
    with blocked(server, 5, 0.4):
        answers = ask(server, 8)
        assert max(seconds for seconds, _ in answers) < 0.4 + SOON
        assert len({pid for _, pid in answers}) == 1
        assert (sum(row["rescued"] for row in server.rows()) > 0) == (mode == "kernel")


def test_what_waits_beside_a_request_that_blocks_is_not_stuck_behind_it(serve, worker_class: str):
    # Who goes on first is not to take all that waits for the other.
    unhurried = ("--hermes-hang-threshold", "0.5", "--hermes-rescue-after", "0.5")
    server = serve(*unhurried, workers=2)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.suspend()
        stack.enter_context(sent(server, "/block?3"))
        clients = [stack.enter_context(sent(server, "/pid")) for _ in range(16)]
        begin = time.monotonic()
        for worker in workers:
            worker.resume()
        with ThreadPoolExecutor(len(clients)) as pool:
            ends = list(pool.map(received_and_closed, clients))
    late = sum(end - begin > 2 for end in ends)
    assert late <= (3 if worker_class == "hermes_asgi" else 0)  # of the four accepted at a time


def test_a_frozen_worker_is_noticed_helped_and_taken_back(serve):
    # Other tests use the cores as well: those that wait for one are not to look frozen.
    server = serve("--hermes-hang-threshold", "0.2", workers=3)
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
    wait_for(lambda: not any(row["frozen_since_ns"] for row in server.rows()), "all to be well")


@pytest.mark.parametrize("path", ["/spin?2", "/regex?25"])
def test_a_worker_whose_loop_does_not_turn_gets_nothing(serve, path: str):
    """An endless loop, and C code that holds the GIL."""
    # Other tests use the cores as well: those that wait for one are not to look hung.
    server = serve("--hermes-hang-threshold", "0.2", workers=3)
    with sent(server, path) as client, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: list(server.folder.glob("blocked-*")), "the block")
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
    with blocked(server, 60, 60), contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(sent(server, "/pid")) for _ in range(6)]
        for pid in old:
            psutil.Process(pid).kill()
        answers = [client.receive() for client in waiting]
        assert {status for status, _ in answers} == {200}
        assert not {int(pid) for _, pid in answers} & old


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


def only(*names: str, modes: Sequence[str] = MODES) -> Any:
    """Run a test for these classes only, and not behind nginx, which keeps connections."""
    chosen = [c for c in configurations() if c.values[0][0] in names and c.values[0][1] in modes]
    return pytest.mark.parametrize("configuration", chosen, indirect=True)


@only(*CLASSES, modes=["kernel"])
def test_what_waits_for_a_worker_that_is_told_to_stop_is_answered(serve):
    server = serve(workers=2)
    with contextlib.ExitStack() as stack:
        # More than is accepted while connections may be on their way still, one second.
        clients = [stack.enter_context(sent(server, "/spin?0.4")) for _ in range(12)]
        wait_for(lambda: len(list(server.folder.glob("blocked-*"))) == 2, "both to be at work")
        server.signal(signal.SIGTERM)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(received_and_closed, clients))
    assert server.wait_ended() == 0


# gunicorn 25's ASGI worker, stock as well, counts connections that have ended and waits for them.
WAIT_FOR_NOBODY = {"asyncio", "uvloop"} if gunicorn.__version__.startswith("25.") else set()


@only(*CLASSES.keys() - WAIT_FOR_NOBODY, modes=["kernel"])
def test_a_server_that_is_told_to_stop_does_so_however_much_still_comes(serve):
    server = serve(workers=2)
    with under_load(server, rate=10_000, clients=16):
        wait_for(lambda: sum(row["accepted"] for row in server.rows()) > 100, "the load")
        server.signal(signal.SIGTERM)
        assert server.process.wait(5) == 0  # half of graceful_timeout, at which it is killed


# Other tests use the cores as well: who waits for one is not to look hung or to be helped.
UNHURRIED = ("--hermes-hang-threshold", "1", "--hermes-rescue-after", "1")
SAY_WHEN_LEAVING = """
from hermes_gunicorn.workers.mixin import HermesMixin
leave = HermesMixin.leave
def leave_and_say(worker):
    leave(worker)
    print("leaving", flush=True)
HermesMixin.leave = leave_and_say
"""


def spread(connections: Counter[Any]) -> int:
    """Return by how many the fullest of four workers exceeds the emptiest."""
    return max(connections.values()) - (min(connections.values()) if len(connections) == 4 else 0)


@only(*CLASSES.keys() - {"hermes_sync"})
@pytest.mark.parametrize("end", ["told", "orphaned"])
def test_who_has_not_spoken_yet_is_answered_by_a_worker_that_leaves(serve, end: str):
    server = serve(*UNHURRIED, "--keep-alive", "30", workers=1, conf=SAY_WHEN_LEAVING)
    (pid,) = server.worker_pids()
    with server.connect() as client:
        server.get("/pid")  # who comes later is accepted later
        if end == "told":
            psutil.Process(pid).terminate()
        else:
            server.process.kill()
        wait_for(lambda: server.lines("leaving"), "a word")
        assert int(client.get("/pid")) == pid


def keep_32(server: Server) -> Counter[Any]:
    """Open connections one after the other; return how many each worker has."""
    pids: Counter[Any] = Counter()
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            client = stack.enter_context(server.connect())
            pids[client.get("/pid")] += 1
            time.sleep(random.expovariate(50))
    return pids


@only(*CLASSES.keys() - {"hermes_sync"})
def test_kept_alive_connections_are_spread_evenly(serve):
    server = serve(*UNHURRIED, "--keep-alive", "30", workers=4)
    assert spread(keep_32(server)) <= 2


SAYS_LATE_WHAT_IT_SERVES = """
import time
from hermes_gunicorn.workers.mixin import HermesMixin
serves = HermesMixin.serves
def serves_and_waits_for_a_core(worker, index):
    answer = serves(worker, index)
    if not answer:
        time.sleep(0.003)
    return answer
HermesMixin.serves = serves_and_waits_for_a_core
"""


@only(*CLASSES.keys() - {"hermes_sync"})
def test_a_pause_that_ends_as_it_begins_does_not_last(serve):
    server = serve(*UNHURRIED, "--keep-alive", "30", workers=4, conf=SAYS_LATE_WHAT_IT_SERVES)
    begin = time.monotonic()
    keep_32(server)
    assert time.monotonic() - begin < 3


KEEPING = ("hermes", "hermes_gthread", "asyncio", "uvloop")


@only(*KEEPING)
def test_connections_are_kept_only_while_requests_do_not_hold_their_worker(serve):
    server = serve("--keep-alive", "30", "--threads", "1", workers=2)
    assert server.keeps("/pid")
    with blocking(server) as closed:
        wait_for(lambda: any(closed), "connections to be closed")
    assert len(server.lines("hermes_keepalive")) == 1
    wait_for(lambda: server.keeps("/pid"), "connections to be kept again")


@only(*KEEPING)
@pytest.mark.parametrize(("setting", "workers"), [("always", 2), ("auto", 1)])
def test_connections_are_kept_where_the_user_says_so_or_nobody_else_is_there(
    serve, setting: str, workers: int
):
    flags = ("--keep-alive", "30", "--threads", "1", "--hermes-keepalive", setting)
    server = serve(*flags, workers=workers)
    with blocking(server) as closed:
        wait_for(lambda: len(closed) >= 20, "answers")
    assert not any(closed)


@only(*CLASSES.keys() - set(KEEPING))
def test_who_does_not_obey_hermes_keepalive_says_nothing_of_it(serve):
    server = serve(workers=2)
    for _ in range(40):
        server.get("/block?0.1")
    assert not server.lines("hermes_keepalive")


@only("asyncio", "uvloop")
def test_websockets_are_spread_evenly(serve):
    server = serve(*UNHURRIED, workers=4)
    with contextlib.ExitStack() as stack:
        sessions = []
        for _ in range(32):
            client = stack.enter_context(server.connect())
            # gunicorn 24 does not answer a close: so as not to wait for that.
            session = websocket("ws://localhost/", sock=client.sock, close_timeout=0.1)
            sessions.append(stack.enter_context(session))
        pids: Counter[Any] = Counter()
        for session in sessions:
            session.send("who")
            pids[session.recv(timeout=10)] += 1
        # Each is in flight for as long as it is open.
        assert sum(row["requests"] for row in server.rows()) >= 32
    assert spread(pids) <= 2


@pytest.mark.skipif(HAS_ASGI, reason="this gunicorn has an ASGI worker")
def test_without_gunicorns_asgi_worker_there_is_a_clear_message(launch):
    server = launch(worker_class="hermes_asgi", app="apps:asgi")
    assert server.wait_ended() != 0
    (line,) = server.lines("hermes_asgi needs gunicorn 24 or later")
    assert gunicorn.__version__ in line
    assert not server.lines("Traceback")


def test_no_worker_holds_the_kernels_objects(start):
    """They are the arbiter's; what a worker has of the table is memory."""
    server = start(workers=2)
    for pid in server.worker_pids():
        links = [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
        assert not [link for link in links if "bpf" in str(link)]


def test_an_idle_server_does_next_to_nothing(serve):
    server = serve(workers=4)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]

    def switches() -> int:
        return sum(w.num_ctx_switches().voluntary for w in workers)

    def is_quiet() -> bool:
        before = switches()
        time.sleep(2)
        # Each has a heartbeat a second and a look a second.
        return switches() - before <= 4 * 2 * 6

    wait_for(is_quiet, "the timers to slow down")


def test_concurrent_slow_requests_use_all_the_capacity(serve, worker_class: str):
    """As many requests as there is room for, spread over all workers, take one turn."""
    server = serve(workers=2)
    room = 2 * CAPACITY.get(worker_class, 4)
    start = time.monotonic()
    threads = [threading.Thread(target=server.get, args=("/sleep?1",)) for _ in range(room)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 1.9

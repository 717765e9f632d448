"""What holds for every worker class."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gunicorn
import psutil
import pytest
from gunicorn_server import Client, Server, under_load, unprivileged, wait_for
from kept import CORES_TO_SPARE, answer, blocking
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
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
CAPACITY = {"hermes_sync": 1, "hermes_gthread": 2, "hermes_asgi": FILES}  # else worker_connections
ROOM = 50
MODES = ["kernel", "shared-tcp", "shared-unix"]
VERSION = tuple(map(int, gunicorn.__version__.split(".")[:2]))
HAS_ASGI = VERSION >= (24, 0)


def configurations() -> Iterator[Any]:
    """Each class in each mode; one of them behind nginx as well."""
    for name, worker_class in CLASSES.items():
        if worker_class == "hermes_asgi" and not HAS_ASGI:
            continue
        for mode in [*MODES, "shared-nginx"] if name == "hermes_gthread" else MODES:
            needs = {"kernel": [pytest.mark.ebpf], "shared-nginx": [pytest.mark.nginx]}
            yield pytest.param((name, mode), id=f"{name}-{mode}", marks=needs.get(mode, []))


def only(*names: str, modes: Sequence[str] = MODES) -> Any:
    """Run a test for these classes only, and not behind nginx, which keeps connections."""
    chosen = [c for c in configurations() if c.values[0][0] in names and c.values[0][1] in modes]
    return pytest.mark.parametrize("configuration", chosen, indirect=True)


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
def arguments(
    configuration: tuple[str, str], worker_class: str, mode: str
) -> Callable[..., tuple[tuple[str, ...], dict[str, Any]]]:
    """What starts a server with workers of that class, beside the test's own wishes."""

    def arguments(*flags: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
        flags = ("--threads", "2", "--worker-connections", str(ROOM), *flags)
        if worker_class == "hermes_asgi":
            flags = ("--asgi-loop", configuration[0], *flags)
            options["app"] = "apps:asgi"
        if mode != "kernel":
            options |= {"prefix": unprivileged(), "unix": mode != "shared-tcp"}
        return flags, options | {"worker_class": worker_class}

    return arguments


@pytest.fixture
def serve(launch, arguments, mode: str, tmp_path: Path):
    """Start a server with workers of that class, and wait for them."""
    with contextlib.ExitStack() as stack:

        def serve(*flags: str, **options: Any) -> Server:
            flags, options = arguments(*flags, **options)
            server: Server = launch(*flags, **options)
            if mode == "shared-nginx":
                assert server.unix
                server.port = stack.enter_context(nginx(tmp_path, server.unix))
                server.unix = None
            return server.wait_ready()

        yield serve


# Other tests use the cores as well: who waits for one is not to look hung or to be helped.
UNHURRIED = ("--hermes-hang-threshold", "60", "--hermes-rescue-after", "60")


@pytest.fixture
def calm(share, serve, arguments, mode: str):
    """A server with four workers for tests that leave it as it was, with a hang threshold."""

    def calm(threshold: float) -> Server:
        flags = (*UNHURRIED, "--keep-alive", "30", "--timeout", "300")
        server: Server
        if mode == "shared-nginx":
            server = serve(*flags, workers=4)
        else:
            flags, options = arguments(*flags, workers=4)
            server = share(*flags, **options)
        server.tune(threshold)
        server.settle(0)
        return server

    return calm


NEVER = 0.0  # as a hang threshold


# A client that says nothing is to be waited for, however slow the test is.
SAY_WHEN_LEAVING = """
from hermes_gunicorn.workers import mixin
mixin.HermesMixin.handshake_grace = 60
HermesMixin = mixin.HermesMixin
leave = HermesMixin.leave
def leave_and_say(worker):
    leave(worker)
    print("leaving", flush=True)
HermesMixin.leave = leave_and_say
"""


@contextlib.contextmanager
def sent(server: Server, path: str) -> Iterator[Client]:
    """Send a request and do not wait."""
    with server.connect() as client:
        client.send(path)
        yield client


@contextlib.contextmanager
def holding(server: Server, *names: str, path: str = "/hold") -> Iterator[list[Client]]:
    """Have as many workers inside a request each, until the test releases its name."""
    with contextlib.ExitStack() as stack:
        clients = []
        for name in names:
            clients.append(stack.enter_context(sent(server, f"{path}?{name}")))
            # gunicorn's sync worker waits a while for a client's end, alone with it.
            if path == "/hold":
                clients[-1].sock.shutdown(socket.SHUT_WR)
            wait_for(lambda n=name: server.held(n), f"a worker to hold {name}")
        try:
            yield clients
        finally:
            for name in names:
                server.release(name)


def ask(server: Server, count: int) -> list[int]:
    """Send requests at the same time; return who answered."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: int(server.get("/pid")), range(count)))


def receive_and_close(client: Client) -> tuple[int, bytes]:
    """Read a response and close, for which gunicorn's sync worker waits."""
    answer = client.receive()
    client.close()
    return answer


@pytest.mark.quick
def test_all_workers_answer(calm):
    server = calm(NEVER)
    seen: set[int] = set()

    def all_seen() -> bool:
        # At the same time: a proxy that keeps its connections may need no more than two else.
        seen.update(ask(server, 8))
        return seen == server.worker_pids()

    with under_load(server) as failures:
        wait_for(all_seen, "an answer from each worker")
    assert not failures


@only(*CLASSES, modes=["kernel"])
def test_capacity_is_what_the_class_can_run_at_once(calm, worker_class: str):
    expected = CAPACITY.get(worker_class, ROOM)
    assert {row["capacity"] for row in calm(NEVER).rows()} == {expected}


def test_counters_return_to_zero(calm):
    server = calm(NEVER)
    with under_load(server) as failures:
        for _ in range(50):
            server.get("/pid")
        for path in ("/missing", "/error", "/echo"):
            with contextlib.suppress(AssertionError, ConnectionError):
                server.get(path)
        server.connect().close()
    assert not failures
    server.settle(0)


def test_nothing_waits_for_a_worker_that_blocks(serve, mode: str):
    """Both workers block; what the kernel sent to one the other takes once it is back."""
    # The kernel is not to notice: rescue alone has to do it.
    server = serve(
        *("--hermes-hang-threshold", "60", "--threads", "1", "--timeout", "300"), workers=2
    )
    with holding(server, "long", "short"), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(sent(server, "/pid")) for _ in range(8)]
        if mode == "kernel":
            dispatched = [worker["queued"] for worker in server.status()["workers"]]
            assert min(dispatched) > 0
        server.release("short")
        with ThreadPoolExecutor(len(clients)) as pool:
            answers = [int(body) for _, body in pool.map(receive_and_close, clients)]
        assert set(answers) == {*server.held("short")}
        assert not {*answers} & {*server.held("long")}
        assert (sum(row["rescued"] for row in server.rows()) > 0) == (mode == "kernel")


def test_what_waits_beside_a_request_that_blocks_is_not_stuck_behind_it(serve, worker_class: str):
    # Who goes on first is not to take all that waits for the other.
    unhurried = ("--hermes-hang-threshold", "0.5", "--hermes-rescue-after", "0.5")
    server = serve(*unhurried, workers=2)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    # Of the four accepted at a time.
    stuck = 3 if worker_class == "hermes_asgi" else 0
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.suspend()
        stack.callback(server.release, "end")
        stack.enter_context(sent(server, "/hold?end"))
        clients = [stack.enter_context(sent(server, "/pid")) for _ in range(16)]
        for worker in workers:
            worker.resume()
        with ThreadPoolExecutor(len(clients)) as pool:
            answers = [pool.submit(receive_and_close, client) for client in clients]
            try:
                wait_for(lambda: sum(a.done() for a in answers) >= 16 - stuck, "all the others")
                assert server.held("end")
            finally:
                server.release("end")
            assert {answer.result()[0] for answer in answers} == {200}


def test_a_frozen_worker_is_noticed_helped_and_taken_back(calm):
    # Other tests use the cores as well: those that wait for one are not to look frozen.
    server = calm(0.2)
    frozen = min(server.worker_pids())
    psutil.Process(frozen).suspend()
    try:
        # The first ones may be sent to it, for it waits in poll, they say. It stays frozen until
        # they are answered.
        assert frozen not in {int(server.get("/pid")) for _ in range(30)}
        assert sum(bool(row["frozen_since_ns"]) for row in server.rows()) <= 1
    finally:
        psutil.Process(frozen).resume()
    wait_for(lambda: int(server.get("/pid")) == frozen, "the worker to come back")
    wait_for(lambda: not any(row["frozen_since_ns"] for row in server.rows()), "all to be well")


def ninth_decile(server: Server) -> float:
    """Return how many seconds nine of ten requests on new connections take at most."""
    took = []
    for _ in range(60):
        began = time.monotonic()
        server.get("/pid")
        took.append(time.monotonic() - began)
    return statistics.quantiles(took, n=10)[-1]


@only(*CLASSES, modes=["kernel", "shared-tcp"])
@pytest.mark.timing
@pytest.mark.parametrize("what", ["blocked", "frozen"])
def test_requests_take_no_longer_beside_a_worker_that_does_not_turn(serve, what: str):
    """A third of them would wait for it until it is back."""
    server = serve("--threads", "1", "--timeout", "300", workers=3)
    before = ninth_decile(server)
    if what == "blocked":
        with holding(server, "end"):
            during = ninth_decile(server)
    else:
        frozen = psutil.Process(min(server.worker_pids()))
        frozen.suspend()
        during = ninth_decile(server)
        frozen.resume()
    assert during < 3 * before + 0.1


def nothing_goes_to_the_one_inside(server: Server, path: str) -> None:
    """Have a worker's loop not turn until 30 requests have been answered by others."""

    def is_seen(pid: int) -> bool:
        (worker,) = (each for each in server.status()["workers"] if each["pid"] == pid)
        # A loop that turns in another thread is in poll.
        return bool(worker["hung"] or not worker["busy"])

    with sent(server, f"{path}?end") as client:
        try:
            (stuck,) = wait_for(lambda: server.held("end"), "the request to be served")
            # Until then it is as good as others that have something to do.
            wait_for(lambda: is_seen(stuck), "it to count as hung")
            assert stuck not in {int(server.get("/pid")) for _ in range(30)}
        finally:
            server.release("end")
        assert client.receive()[0] == 200


@only(*CLASSES.keys() - {"hermes_gthread"})  # whose loop turns beside such a thread
def test_a_worker_in_an_endless_loop_gets_nothing(calm):
    # Other tests use the cores as well: those that wait for one are not to look hung.
    nothing_goes_to_the_one_inside(calm(0.2), "/burn")


def test_what_waited_for_a_killed_worker_is_answered(serve):
    server = serve("--hermes-hang-threshold", "60", "--threads", "1", workers=2)
    old = server.worker_pids()
    with holding(server, "one", "two"), contextlib.ExitStack() as stack:
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


def test_term_lets_requests_finish(serve, worker_class: str):
    server = serve(workers=2, conf=SAY_WHEN_LEAVING)
    with holding(server, "end", path="/wait") as (client,):
        server.signal(signal.SIGTERM)
        # A sync worker cannot say it while it serves.
        word = "Handling signal: term" if worker_class == "hermes_sync" else "leaving"
        wait_for(lambda: server.lines(word), "the stop to begin")
        server.release("end")
        assert client.receive()[0] == 200
    assert server.wait_ended() == 0
    assert not server.lines("Traceback")


def test_signals_under_load_lose_nothing(serve):
    server = serve(workers=3)
    with under_load(server) as failures:
        for number, wanted in ((signal.SIGTTIN, 4), (signal.SIGTTOU, 3), (signal.SIGHUP, 3)):
            old = server.worker_pids()
            server.signal(number)
            if number == signal.SIGHUP:
                wait_for(lambda: not old & server.worker_pids(), "new workers")  # noqa: B023
            wait_for(lambda: len(server.worker_pids()) == wanted, f"{wanted} workers")  # noqa: B023
            server.wait_ready(wanted)
            assert not failures, number
    assert not failures
    assert not server.lines("Traceback")


def test_max_requests_under_load_loses_nothing(serve):
    server = serve("--max-requests", "40", "--max-requests-jitter", "20", workers=2)
    before = server.worker_pids()
    with under_load(server, 200) as failures:
        wait_for(lambda: not before & server.worker_pids(), "all workers to be recycled")
    assert not failures


@only(*CLASSES, modes=["kernel"])
def test_a_worker_in_c_code_that_holds_the_gil_gets_nothing(calm):
    nothing_goes_to_the_one_inside(calm(0.2), "/hold-the-gil")


@only(*CLASSES, modes=["kernel"])
def test_what_waits_for_a_worker_that_is_told_to_stop_is_answered(serve):
    server = serve(workers=2)
    with contextlib.ExitStack() as stack:
        # More than is accepted while connections may be on their way still, one second.
        clients = [stack.enter_context(sent(server, "/block?0.4")) for _ in range(12)]
        wait_for(lambda: len(list(server.folder.glob("blocked-*"))) == 2, "both to be at work")
        server.signal(signal.SIGTERM)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(receive_and_close, clients))
    assert server.wait_ended() == 0


# gunicorn 25's ASGI worker, stock as well, counts connections that have ended and waits for them.
WAIT_FOR_NOBODY = {"asyncio", "uvloop"} if gunicorn.__version__.startswith("25.") else set()


@only(*CLASSES.keys() - WAIT_FOR_NOBODY, modes=["kernel"])
def test_a_server_that_is_told_to_stop_does_so_however_much_still_comes(serve):
    # Far more than a test may take: a worker that does not end by itself hangs the test.
    server = serve("--graceful-timeout", "600", workers=2)
    with under_load(server, rate=10_000, clients=16):
        wait_for(lambda: sum(row["accepted"] for row in server.rows()) > 100, "the load")
        server.signal(signal.SIGTERM)
        assert server.wait_ended() == 0


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


@only(*CLASSES.keys() - {"hermes_sync"})
def test_kept_alive_connections_are_spread_evenly(calm, mode: str):
    server = calm(NEVER)
    pids: Counter[Any] = Counter()
    with contextlib.ExitStack() as stack:
        for opened in range(32):
            client = stack.enter_context(server.connect())
            pids[client.get("/pid")] += 1
            server.settle(opened + 1)
    # Where the workers decide, one that has no core for some milliseconds forgoes its turn.
    assert spread(pids) <= (0 if mode == "kernel" else 2)


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


@only(*CLASSES.keys() - {"hermes_sync"}, modes=["shared-tcp"])
@pytest.mark.timing
def test_a_pause_that_ends_as_it_begins_does_not_last(serve):
    """It is over within milliseconds; one that is missed lasts until the heartbeat, a second."""
    server = serve(*UNHURRIED, "--keep-alive", "30", workers=4, conf=SAYS_LATE_WHAT_IT_SERVES)
    took = []
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            began = time.monotonic()
            stack.enter_context(server.connect()).get("/pid")
            took.append(time.monotonic() - began)
            time.sleep(random.expovariate(50))
    assert sum(seconds > 0.3 for seconds in took) <= 1, took


KEEPING = ["hermes", "hermes_gthread"]
if VERSION >= (25, 1):  # whose ASGI parser says whether a request was received to its end
    KEEPING += ["asyncio", "uvloop"]


@only(*KEEPING, modes=["kernel", "shared-tcp"])
def test_connections_are_kept_only_while_requests_do_not_hold_their_worker(serve):
    server = serve("--keep-alive", "30", "--threads", "1", workers=2, conf=CORES_TO_SPARE)
    assert server.keeps("/pid")
    with blocking(server) as closed:
        wait_for(lambda: any(closed), "connections to be closed")
    assert len(server.lines("hermes_keepalive")) == 1
    wait_for(lambda: server.keeps("/pid"), "connections to be kept again")


@only(*KEEPING, modes=["kernel", "shared-tcp"])
def test_a_worker_that_is_never_without_a_queue_closes_connections(serve):
    """Those of three clients, who leave it no pause; nobody else asks for anything."""
    server = serve("--keep-alive", "30", "--threads", "1", workers=2, conf=CORES_TO_SPARE)
    with contextlib.ExitStack() as stack:
        clients: dict[bytes, list[Client]] = {}
        while max(map(len, clients.values()), default=0) < 3:
            client = stack.enter_context(server.connect())
            clients.setdefault(client.get("/pid"), []).append(client)
        (three,) = (each for each in clients.values() if len(each) == 3)
        for client in three:
            client.send("/block?0.05")

        def one_is_closed() -> bool:
            for client in three:
                if answer(client)[2]:
                    return True
                client.send("/block?0.05")
            return False

        wait_for(one_is_closed, "a connection to be closed")


@only(*KEEPING, modes=["kernel"])
@pytest.mark.parametrize(("setting", "workers"), [("always", 2), ("auto", 1)])
def test_connections_are_kept_where_the_user_says_so_or_nobody_else_is_there(
    serve, setting: str, workers: int
):
    flags = ("--keep-alive", "30", "--threads", "1", "--hermes-keepalive", setting)
    server = serve(*flags, workers=workers)
    with blocking(server) as closed:
        wait_for(lambda: len(closed) >= 20, "answers")
    assert not any(closed)


@only(*CLASSES.keys() - set(KEEPING), modes=["kernel"])
def test_who_does_not_obey_hermes_keepalive_says_nothing_of_it(serve):
    server = serve(workers=2)
    for _ in range(15):
        server.get("/block?0.1")
    assert not server.lines("hermes_keepalive")


@only("asyncio", "uvloop")
def test_websockets_are_spread_evenly(calm, mode: str):
    server = calm(NEVER)
    with contextlib.ExitStack() as stack:
        sessions = []
        for opened in range(32):
            client = stack.enter_context(server.connect())
            # gunicorn 24 does not answer a close: so as not to wait for that.
            session = websocket("ws://localhost/", sock=client.sock, close_timeout=0.1)
            sessions.append(stack.enter_context(session))
            server.settle(opened + 1, requests=opened + 1)  # each for as long as it is open
        pids: Counter[Any] = Counter()
        for session in sessions:
            session.send("who")
            pids[session.recv(timeout=10)] += 1
    assert spread(pids) <= (0 if mode == "kernel" else 2)


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


@only(*CLASSES, modes=["kernel", "shared-tcp"])
def test_an_idle_server_does_next_to_nothing(calm):
    server = calm(0.2)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]

    def switches() -> int:
        return sum(w.num_ctx_switches().voluntary for w in workers)

    def is_quiet() -> bool:
        before, began = switches(), time.monotonic()
        time.sleep(1)
        # Each has a heartbeat a second and a look a second.
        return switches() - before <= len(workers) * 6 * (time.monotonic() - began)

    wait_for(is_quiet, "the timers to slow down")


@only(*CLASSES, modes=["kernel", "shared-tcp"])
def test_concurrent_slow_requests_use_all_the_capacity(calm, worker_class: str):
    """As many requests as there is room for, spread over all workers, are served at once."""
    server = calm(NEVER)
    room = min(CAPACITY.get(worker_class, 4), 4)
    with contextlib.ExitStack() as stack:
        stack.callback(server.release, "end")
        clients = [stack.enter_context(sent(server, "/wait?end")) for _ in range(4 * room)]
        wait_for(lambda: len(server.held("end")) == 4 * room, "all to be served")
        if worker_class in ("hermes_sync", "hermes_gthread"):
            assert set(Counter(server.held("end")).values()) == {room}
        server.release("end")
        with ThreadPoolExecutor(len(clients)) as pool:
            assert {status for status, _ in pool.map(receive_and_close, clients)} == {200}

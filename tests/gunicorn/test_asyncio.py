"""Workers on an asyncio loop, ours beside the stock ones: asgi's, on both loops, and uvicorn's."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gunicorn
import psutil
import pytest
from gunicorn_server import Server, free_port, listens, wait_for

SUPPORT = Path(__file__).parents[1] / "support"
UVICORN = """
from uvicorn_worker import UvicornWorker
from hermes_gunicorn.workers.asgi import HermesAsyncioMixin

class Stock(UvicornWorker):
    CONFIG_KWARGS = {"loop": "auto", "http": "auto"} | OPTIONS

class Ours(HermesAsyncioMixin, Stock): ...
"""
HAS_ASGI = int(gunicorn.__version__.split(".")[0]) >= 24
KINDS = ["asyncio", "uvloop", "uvicorn"] if HAS_ASGI else ["uvicorn"]
# Other tests use the cores as well: who waits for one is not to look hung or to be helped.
UNHURRIED = ("--hermes-hang-threshold", "1", "--hermes-rescue-after", "1")

# Other tests use the cores as well; that is not to count.
CORES_TO_SPARE = """
from hermes_gunicorn.core.keepalive import Keeping
Keeping.short_of_cores = property(lambda self: False, lambda self, value: None)
"""

each_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("whose", ["stock", "ours"])


@pytest.fixture
def serve(launch):
    """Start a server of one kind, stock or ours."""

    def serve(kind: str, whose: str, *flags: str, **options: Any) -> Server:
        options = {"app": "apps:asgi", "worker_class": None} | options
        options["environ"] = {"PYTHONPATH": str(SUPPORT)} | options.get("environ", {})
        uvicorn_options = options.pop("uvicorn", {})
        if kind == "uvicorn":
            conf = UVICORN.replace("OPTIONS", repr(uvicorn_options))
            conf += f"worker_class = {whose.capitalize()}\n"
            options["conf"] = conf + options.get("conf", "")
        else:
            flags = ("--asgi-loop", kind, *flags)
            options["worker_class"] = "asgi" if whose == "stock" else "hermes_asgi"
        server: Server = launch(*flags, **options)
        server.wait_ready()
        if whose == "stock":  # whose workers lose a signal that comes while they boot
            seen: set[int] = set()

            def all_answered() -> bool:
                seen.add(int(server.get("/pid")))
                return seen >= server.worker_pids()

            wait_for(all_answered, "an answer from each worker")
        return server

    return serve


@contextlib.contextmanager
def in_flight(server: Server, seconds: float) -> Iterator[socket.socket]:
    """Have a request wait for so long in the application, which is not blocked by it."""
    with server.connect() as client:
        client.get("/pid")
        client.send(f"/sleep?{seconds}")
        # In the order in which they arrive at a worker: the other one has begun before.
        server.get("/pid")
        yield client.sock


def answered(sock: socket.socket) -> bool:
    """Tell whether something can be read."""
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@each_kind
@both
def test_a_server_that_drains_refuses_new_clients(serve, kind: str, whose: str):
    server = serve(kind, whose, workers=2)
    with in_flight(server, 6) as sock:
        server.signal(signal.SIGTERM)
        wait_for(lambda: not listens(server.port), "the address to be free", 5)
        assert not answered(sock)
        wait_for(lambda: answered(sock), "the answer")
    assert server.wait_ended() == 0


def can_bind(port: int) -> bool:
    """Tell whether a new server could start."""
    with socket.socket() as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        return True
    return False


# uvicorn's own workers live on when the arbiter is gone, and keep its address.
@pytest.mark.parametrize(
    ("kind", "whose"),
    [*[(kind, "ours") for kind in KINDS], *[(kind, "stock") for kind in KINDS[:-1]]],
)
def test_who_outlives_the_arbiter_gives_the_address_up_at_once(serve, kind: str, whose: str):
    server = serve(kind, whose, workers=2)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    with in_flight(server, 6) as sock:
        server.process.kill()
        wait_for(lambda: can_bind(server.port), "the address to be free", 5)
        assert not answered(sock)
        wait_for(lambda: answered(sock), "the answer")
    _, alive = psutil.wait_procs(workers, 10)
    assert not alive


def test_uvicorns_worker_does_not_wait_for_ever_without_an_arbiter(serve):
    server = serve("uvicorn", "ours", "--graceful-timeout", "1", workers=1)
    worker = psutil.Process(min(server.worker_pids()))
    with in_flight(server, 300):
        server.process.kill()
        _, alive = psutil.wait_procs([worker], 15)
    assert not alive


@both
def test_a_client_that_never_speaks_tls_does_not_delay_uvicorns_stop(
    serve, whose: str, certificate: list[str]
):
    server = serve("uvicorn", whose, *certificate, workers=1)
    with socket.create_connection(server.address):
        server.get("/pid")
        server.signal(signal.SIGTERM)
        assert server.process.wait(6) == 0  # it would be killed at 10


@each_kind
@both
@pytest.mark.parametrize("what", ["connections", "websockets"])
def test_there_are_more_open_connections_than_worker_connections(
    serve, kind: str, whose: str, what: str
):
    server = serve(kind, whose, "--worker-connections", "20", "--keep-alive", "60", workers=1)
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    extra = f"Connection: Upgrade\r\nUpgrade: websocket\r\n{key}"
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            client = stack.enter_context(server.connect())
            if what == "connections":
                client.get("/pid")
            else:
                client.send("/", extra=extra)
                assert client.receive(head_only=True)[0] == 101
        assert server.get("/pid")


FORMS = [
    *([("asyncio", "asgi_forms:function", {})] if HAS_ASGI else []),
    ("uvicorn", "asgi_forms:Double", {}),
    ("uvicorn", "asgi_forms:factory", {}),
    ("uvicorn", "asgi_forms:function", {"interface": "asgi3"}),
    ("uvicorn", "apps:app", {"interface": "wsgi"}),
    ("uvicorn", "apps:asgi", {"reset_contextvars": True}),
]


@pytest.mark.parametrize(("kind", "app", "options"), FORMS)
def test_requests_are_counted_however_the_application_is_called(
    serve, kind: str, app: str, options: dict[str, Any]
):
    server = serve(kind, "ours", app=app, uvicorn=options, workers=1)

    def requests() -> int:
        (row,) = server.rows()
        return row["requests"] - 1  # but for the one that asks

    with server.connect() as client:
        client.get("/pid")
        wait_for(lambda: requests() == 0, "the connection to be idle")
        client.send("/sleep?2")
        wait_for(lambda: requests() == 1, "the request to be in flight")
        client.receive()
        wait_for(lambda: requests() == 0, "the request to end")
    wait_for(lambda: server.rows()[0]["connections"] == 1, "the connection to be closed")


@each_kind
@both
def test_a_request_does_not_see_the_context_of_another_connections(serve, kind: str, whose: str):
    server = serve(kind, whose, app="asgi_forms:remembering", workers=2, conf=CORES_TO_SPARE)
    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(lambda _: server.get("/user"), range(80)))
    assert seen == {b""}


def test_who_was_alone_shares_with_workers_that_are_added(serve):
    """What waits beside a request that blocks is not stuck behind it, after TTIN as well."""
    server = serve(KINDS[0], "ours", *UNHURRIED, workers=1)
    server.signal(signal.SIGTTIN)
    server.wait_ready(2)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.suspend()
        clients = [stack.enter_context(server.connect()) for _ in range(17)]
        for number, client in enumerate(clients):
            client.send("/pid" if number else "/block?3")
        begin = time.monotonic()
        for worker in workers:
            worker.resume()
        with ThreadPoolExecutor(len(clients)) as pool:
            ends = list(pool.map(lambda client: (client.receive(), time.monotonic()), clients[1:]))
    assert sum(end - begin > 2 for _, end in ends) <= 3  # of the four accepted at a time


def holding(server: Server, stop: threading.Event) -> None:
    """Have the workers blocked for 30 ms again and again, for about a quarter of the time."""
    while not stop.wait(0.05):
        with contextlib.suppress(OSError, ConnectionError):
            server.get("/block?0.03")


def silent(server: Server, stop: threading.Event, says: bytes, stays: bool) -> None:
    """Connect 300 times a second and send no request."""
    with contextlib.ExitStack() as stack:
        while not stop.wait(1 / 300):
            sock = socket.create_connection(server.address)
            if says:
                sock.sendall(says)
            if stays:
                stack.enter_context(sock)
            else:
                sock.close()


def median(server: Server, *disturbed: Any) -> float:
    """Return how long a request takes, in ms, while the workers are blocked at times."""
    stop = threading.Event()
    threads = [threading.Thread(target=holding, args=(server, stop)) for _ in range(2)]
    if disturbed:
        threads.append(threading.Thread(target=silent, args=(server, stop, *disturbed)))
    for thread in threads:
        thread.start()
    times = []
    try:
        for _ in range(60):
            time.sleep(0.02)
            begin = time.monotonic()
            server.get("/pid")
            times.append(time.monotonic() - begin)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return 1000 * statistics.median(times)


@pytest.mark.parametrize(
    ("says", "stays"),
    [(b"", True), (b"", False), (b"GET /pid HTTP/1.1\r\n", True)],
    ids=["silent", "gone", "unfinished"],
)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_clients_that_send_no_request_do_not_keep_others_waiting(
    serve, kind: str, says: bytes, stays: bool
):
    server = serve(kind, "ours", "--keep-alive", "30", workers=2, conf=CORES_TO_SPARE)
    alone = median(server)
    disturbed = median(server, says, stays)
    stock = median(serve(kind, "stock", "--keep-alive", "30", workers=2), says, stays)
    print(f"{alone=:.1f} {disturbed=:.1f} {stock=:.1f} ms")
    assert disturbed < 3 * max(alone, stock) + 5


CONTRACT = """
from asyncio_contract import Contract as Stock
from hermes_gunicorn.workers.asgi import HermesAsyncioMixin

class Ours(HermesAsyncioMixin, Stock): ...
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_create_server_does_what_the_loops_own_does(launch, loop: str, certificate: list[str]):
    found = {}
    environ = {"PYTHONPATH": str(SUPPORT), "LOOP": loop}
    environ |= {"CERT": certificate[1], "KEY": certificate[3]}
    for whose in ("Stock", "Ours"):
        server = launch(
            conf=f"{CONTRACT}\nworker_class = {whose}\n",
            bind=[f"127.0.0.1:{free_port()}" for _ in range(5)],
            worker_class=None,
            workers=1,
            environ=environ,
        )
        path = server.folder / "found.json"
        wait_for(path.exists, "what it found")
        found[whose] = json.loads(path.read_text())
    assert found["Ours"] == found["Stock"]
    # So that nothing is equal that failed in both.
    assert found["Ours"]["late"] == [False, False, True, True, 7, [True], True]
    assert found["Ours"]["forever"] == [True, True, True, True, False, 0, -1]
    assert len(server.lines("cannot count the requests of Echo")) == 1


ONE_FAILS = """
from gunicorn.workers.gasgi import ASGIWorker
from hermes_gunicorn.workers.asgi import HermesAsyncioMixin

class Stock(ASGIWorker):
    async def _serve(self):
        create_server = self.loop.create_server

        async def create(*args, sock, **options):
            if sock.getsockname()[1] == PORT:
                raise OSError("on purpose")
            return await create_server(*args, sock=sock, **options)

        self.loop.create_server = create
        await super()._serve()

class Ours(HermesAsyncioMixin, Stock): ...
"""


@pytest.mark.skipif(not HAS_ASGI, reason="this gunicorn has no ASGI worker")
@both
def test_who_cannot_serve_one_address_serves_the_other(launch, whose: str):
    port, other = free_port(), free_port()
    server = launch(
        conf=f"{ONE_FAILS.replace('PORT', str(other))}\nworker_class = {whose.capitalize()}\n",
        bind=[f"127.0.0.1:{other}", f"127.0.0.1:{port}"],
        port=port,
        worker_class=None,
        app="apps:asgi",
        workers=1,
    ).wait_ready()
    assert server.get("/pid")
    if whose == "ours":
        wait_for(lambda: server.lines("no server was created for", str(other)), "a word")


BEGIN_FAILS = """
from hermes_gunicorn.workers.mixin import HermesMixin

def begin(worker, *args):
    raise RuntimeError("on purpose")

HermesMixin.begin = begin
"""


@each_kind
def test_a_worker_that_cannot_help_others_serves(serve, kind: str):
    server = serve(kind, "ours", conf=BEGIN_FAILS, workers=1)
    assert server.get("/pid")
    assert server.lines("does not take over other")

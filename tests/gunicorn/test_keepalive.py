"""Whether a connection is closed: what the stock class answers to, ours answers to as well.

All servers here are made to believe that requests block them (``FORCED``), so that each
response which may close its connection does.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gunicorn
import pytest
from gunicorn_server import APPS, Server, wait_for
from kept import answer, ask

DOCS = Path(__file__).parents[2] / "docs" / "workers.md"
VERSION = int(gunicorn.__version__.split(".")[0])
FORCED = """
import os
from apps import post_worker_init as remember

def post_worker_init(worker):
    remember(worker)
    keeping = getattr(worker, "keeping", None)

    def weigh(*arguments, **options):
        keeping._wait_ns = 1e9
        keeping.closing = os.path.exists("forced")

    if keeping is not None:
        keeping.weigh = weigh
"""
UVICORN = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
H11 = UVICORN.replace("UvicornWorker", "UvicornH11Worker")
LARGE = 8 << 20  # bytes: more than sockets hold
APP = """
from apps import *

async def asgi(scope, receive, send, other=asgi):
    if scope["type"] != "http" or scope["path"] != "/own":
        return await other(scope, receive, send)
    headers = [(b"content-length", b"2"), (b"connection", b"keep-alive")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})
"""


class Class(NamedTuple):
    """How to choose a worker class; the stock one, and ours."""

    stock: str
    ours: str
    flags: tuple[str, ...] = ()
    conf: str = ""


CLASSES = {
    "gevent": Class("gevent", "hermes"),
    "gthread": Class("gthread", "hermes_gthread", ("--threads", "20")),
    "asyncio": Class("asgi", "hermes_asgi", ("--asgi-loop", "asyncio")),
    "uvloop": Class("asgi", "hermes_asgi", ("--asgi-loop", "uvloop")),
    "uvicorn": Class("UvicornWorker", "HermesUvicornWorker", conf=UVICORN),
    "uvicorn-h11": Class("UvicornH11Worker", "HermesUvicornH11Worker", conf=H11),
}
WSGI = ("gevent", "gthread")
GUNICORNS_ASGI = ("asyncio", "uvloop")


FAMILIES = [name for name in CLASSES if VERSION >= 24 or name not in GUNICORNS_ASGI]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of the class."""
    return str(request.param)


@pytest.fixture(scope="module", params=["stock", "ours"])
def ours(request: pytest.FixtureRequest) -> bool:
    """Whether it is ours: a test that the stock class fails proves nothing."""
    return bool(request.param == "ours")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, family: str, ours: bool) -> Iterator[Server]:
    """Two workers of that class, with connections to both that are kept."""
    choice = CLASSES[family]
    name = choice.ours if ours else choice.stock
    files = tmp_path_factory.mktemp("files")
    conf = FORCED
    if choice.conf:
        conf += f"{choice.conf}\nworker_class = {name}\n"
    (files / "gunicorn.conf.py").write_text(conf)
    (files / "apps.py").write_text(APPS.read_text())
    (files / "both.py").write_text(APP)
    server = Server(
        tmp_path_factory.mktemp("server"),
        *choice.flags,
        # A busy machine is no reason to do otherwise.
        *("--keep-alive", "75", "--hermes-hang-threshold", "5", "--hermes-rescue-after", "5"),
        worker_class=None if choice.conf else name,
        files=files,
        app="both:app" if family in WSGI else "both:asgi",
    )
    try:
        server.wait_ready()
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                assert stack.enter_context(server.connect()).get("/pid")
            (server.folder / "forced").touch()
            if ours:
                wait_for(lambda: all(closes(server) for _ in range(6)), "connections to be closed")
            yield server
    finally:
        server.kill()
        print(server.log[-5000:])


def unread(family: str) -> int:
    """Return of how many bytes the stock class reads the rest after an early answer."""
    return 50_000 if family == "gthread" else LARGE


def closes(server: Server) -> bool:
    """Say whether a response closes its connection, where nothing is against it."""
    with server.connect() as client:
        status, _, last = ask(client, "/pid")
        assert status == 200
        assert not last or client.sock.recv(1) == b""
        return last


@pytest.mark.parametrize(
    "options", [{}, {"body": b"ignored"}, {"method": "HEAD"}], ids=["GET", "POST", "HEAD"]
)
def test_a_short_response_closes_its_connection_and_the_stock_class_keeps_it(server, ours, options):
    def last() -> bool:
        with server.connect() as client:
            client.send("/pid", **options)
            return b"\r\nconnection: close" in client._until(b"\r\n\r\n").lower()

    if ours:
        wait_for(last, "a sibling to be free")
    else:
        assert not last()


def test_an_upload_that_is_answered_early_is_not_reset(server, family):
    if family in GUNICORNS_ASGI:
        pytest.skip("gunicorn's own closes it, unread")
    body = random.randbytes(unread(family))
    for _ in range(3):
        with server.connect() as client:
            assert ask(client, "/missing", body=body)[0] == 404


def test_a_chunked_upload_that_is_answered_early_is_not_reset(server, family):
    if family in GUNICORNS_ASGI:
        pytest.skip("gunicorn's own closes it, unread")
    with server.connect() as client:
        client.send("/missing", method="POST", extra="Transfer-Encoding: chunked\r\n")
        chunk = b"%x\r\n" % 10000 + bytes(10000) + b"\r\n"
        client.sock.sendall(chunk * (unread(family) // 10000) + b"0\r\n\r\n")
        assert answer(client)[0] == 404


def test_a_body_that_is_still_to_come_is_waited_for(server, family):
    if family in GUNICORNS_ASGI:
        pytest.skip("gunicorn's own closes it, unread")
    with server.connect() as client:
        client.send("/missing", method="POST", extra="Content-Length: 4\r\n")
        assert answer(client)[::2] == (404, False)
        client.sock.sendall(b"body")
        assert ask(client, "/pid")[0] == 200


def test_pipelined_requests_are_answered(server, family):
    if family in GUNICORNS_ASGI and VERSION < 27:
        pytest.skip("gunicorn's own drops them")
    one = b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n"
    post = b"POST /pid HTTP/1.1\r\nHost: test\r\nContent-Length: 3\r\n\r\nabc"
    for requests in ([one] * 5, [one, post, one], [post, post, one]):
        with server.connect() as client:
            client.sock.sendall(b"".join(requests))
            assert [answer(client)[0] for _ in requests] == [200] * len(requests)


def test_a_request_of_which_a_part_has_come_is_answered(server, family):
    if family in GUNICORNS_ASGI and VERSION < 27:
        pytest.skip("gunicorn's own drops it")
    one = b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n"
    with server.connect() as client:
        client.sock.sendall(one + one[:10])
        assert answer(client)[::2] == (200, False)
        client.sock.sendall(one[10:])
        assert answer(client)[0] == 200


def test_what_an_application_says_about_its_connection_holds(server, family):
    if family in WSGI:
        pytest.skip("a WSGI application cannot say that")
    with server.connect() as client:
        assert ask(client, "/own") == (200, b"ok", False)
        assert ask(client, "/own") == (200, b"ok", False)


def test_a_response_whose_end_is_not_known_keeps_its_connection(server, family):
    if family not in WSGI:
        pytest.skip("the application streams under WSGI only")
    with server.connect() as client:
        assert ask(client, "/stream?100")[::2] == (200, False)
        assert ask(client, "/stream?100")[::2] == (200, False)


def test_a_client_that_asks_for_the_end_gets_it(server):
    with server.connect() as client:
        assert ask(client, "/pid", extra="Connection: close\r\n")[0] == 200
        assert client.sock.recv(1) == b""


def test_a_raw_connection_stays_the_applications(server, family):
    if family != "gevent":
        pytest.skip("the application takes it under gevent only")
    with server.connect() as client:
        client.send("/upgrade", extra="Connection: Upgrade\r\nUpgrade: echo\r\n")
        assert client.receive(head_only=True)[0] == 101
        for i in range(3):
            client.sock.sendall(b"%d\n" % i)
            assert client._until(b"\n") == b"%d" % i

"""Whatever works under gunicorn's gevent worker works the same under ours."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time

import pytest
from gunicorn_server import Server, under_load, wait_for


@pytest.fixture(params=["gevent", "hermes"])
def worker_class(request: pytest.FixtureRequest) -> str:
    """The model and ours in turn: a test that the model fails proves nothing."""
    return str(request.param)


def assert_nothing_in_flight(server: Server) -> None:
    """Wait until the table shows nothing but the request that asks; true without one."""

    def idle() -> bool:
        table = server.table()
        return all(
            row["requests"] == row["connections"] == (row["slot"] == table["slot"])
            for row in table.get("rows", [])[1:]
        )

    wait_for(idle, "requests and connections to return to zero")


def test_keep_alive(start, worker_class):
    server = start(worker_class=worker_class)
    with server.connect() as client:
        assert len({client.get("/pid") for _ in range(20)}) == 1
    assert_nothing_in_flight(server)


def test_pipelining(start, worker_class):
    server = start(worker_class=worker_class)
    with server.connect() as client:
        one = b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n"
        client.sock.sendall(one * 3)
        assert len({client.receive() for _ in range(3)}) == 1
    assert_nothing_in_flight(server)


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_bodies(start, worker_class, size):
    server = start(worker_class=worker_class)
    body = os.urandom(size)
    assert server.get("/echo", body=body) == body
    with server.connect() as client:
        client.send("/echo", extra="Transfer-Encoding: chunked\r\n", method="POST")
        if body:
            client.sock.sendall(b"%x\r\n%s\r\n" % (len(body), body))
        client.sock.sendall(b"0\r\n\r\n")
        assert client.receive() == (200, body)
    assert_nothing_in_flight(server)


def test_streaming(start, worker_class):
    server = start(worker_class=worker_class)
    assert server.get("/stream?1000").split() == [b"%d" % i for i in range(1000)]
    assert_nothing_in_flight(server)


def test_errors(start, worker_class):
    server = start(worker_class=worker_class)
    for path, method, wanted in [
        ("/error", "GET", 500),
        ("/missing", "GET", 404),
        ("/pid", "HEAD", 200),
    ]:
        with server.connect() as client:
            client.send(path, method=method)
            assert client.receive(head_only=True)[0] == wanted
    with server.connect() as client:
        client.sock.sendall(b"no http\r\n\r\n")
        assert client.receive()[0] == 400
    assert_nothing_in_flight(server)


def test_clients_that_leave_early(start, worker_class):
    server = start(worker_class=worker_class)
    for _ in range(10):
        with server.connect() as client:
            client.send("/sleep?0.05")
        with server.connect() as client:
            client.sock.sendall(b"GET /pid HT")
        server.connect().close()
    assert_nothing_in_flight(server)


def test_tls(start, worker_class, certificate):
    server = start(*certificate, worker_class=worker_class)
    assert len({server.get("/pid") for _ in range(20)}) <= 2
    with server.connect() as client:
        assert len({client.get("/pid") for _ in range(5)}) == 1
    with socket.create_connection(server.address) as plain:  # fails in the handshake
        plain.sendall(b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n")
        plain.settimeout(10)
        with contextlib.suppress(ConnectionError):
            plain.recv(1000)
    assert_nothing_in_flight(server)


def test_long_connections_as_websockets_are(start, worker_class):
    server = start(worker_class=worker_class)
    with server.connect() as client:
        client.send("/upgrade", extra="Connection: Upgrade\r\nUpgrade: echo\r\n")
        assert client.receive(head_only=True)[0] == 101
        for i in range(10):
            client.sock.sendall(b"%d\n" % i)
            assert client._until(b"\n") == b"%d" % i
            server.get("/pid")
        if worker_class == "hermes":
            # This one and the one that asks; the last of the others may still be closing.
            wait_for(lambda: sum(row["connections"] for row in server.rows()) == 2, "the count")
    assert_nothing_in_flight(server)


def test_max_requests(start, worker_class):
    server = start("--max-requests", "20", worker_class=worker_class)
    old = server.worker_pids()
    with under_load(server):
        wait_for(lambda: not old & server.worker_pids(), "both workers to be replaced")
    server.wait_ready()


def test_max_requests_loses_nothing(start):
    server = start("--max-requests", "30", "--max-requests-jitter", "20", workers=3)
    old = server.worker_pids()
    with under_load(server) as failures:
        wait_for(lambda: not old & server.worker_pids(), "all workers to be replaced")
    assert failures == []


def test_a_worker_that_exceeds_the_timeout_is_replaced(start, worker_class):
    server = start("--timeout", "2", worker_class=worker_class)
    with server.connect() as client:
        client.send("/hold?never")
        wait_for(lambda: server.lines("WORKER TIMEOUT"), "the timeout")
        for _ in range(20):
            server.get("/pid")
    server.wait_ready()


def test_preload(start, worker_class):
    server = start("--preload", worker_class=worker_class)
    assert server.get("/pid")


def test_reload_on_a_changed_file(start, worker_class):
    server = start("--reload", "--reload-engine", "poll", worker_class=worker_class)
    old = server.worker_pids()
    stamp = itertools.count(time.time() + 1)

    def replaced() -> bool:
        # Again and again: the reloader may not have looked at the file before.
        os.utime(server.folder / "apps.py", (next(stamp), next(stamp)))
        return not old & server.worker_pids()

    wait_for(replaced, "both workers to be replaced")
    server.wait_ready()
    assert server.get("/pid")


def test_an_app_that_cannot_be_imported_ends_the_server(launch, worker_class):
    server = launch(worker_class=worker_class, app="nowhere:app")
    assert server.wait_ended() != 0
    assert server.lines("No module named 'nowhere'")
    assert not server.lines("hermes: error")


def test_usr1_reopens_the_logs(start, worker_class, tmp_path):
    log = tmp_path / "access.log"
    server = start("--access-logfile", str(log), worker_class=worker_class)
    server.get("/pid")
    log.rename(tmp_path / "rotated.log")
    server.signal(signal.SIGUSR1)
    wait_for(log.exists, "a new access log")

    def written() -> bool:
        server.get("/pid")
        return "/pid" in log.read_text()

    wait_for(written, "an entry in the new log")


def test_worker_connections_limit_what_a_worker_takes(start, worker_class):
    server = start("--worker-connections", "3", workers=1, worker_class=worker_class)
    clients = [server.connect() for _ in range(6)]
    try:
        for client in clients:
            client.send("/sleep?0.5")
        assert [client.receive()[0] for client in clients] == [200] * 6
    finally:
        for client in clients:
            client.close()

"""hermes_stats: through upgrades and deaths, among slow and nosy clients, for a proxy."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import prometheus_client
import psutil
import pytest
from gunicorn_server import Server, free_port, listens, wait_for


def ask(port: int, path: str = "/stats.json", method: str = "GET", **headers: str) -> Any:
    """Ask for something; return the response, and its body as ``text``."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        response.text = response.read().decode()  # type: ignore[attr-defined]
        return response


def tells_of(port: int, arbiter: int) -> bool:
    """Say whether the statistics are that server's; the last one may end in the middle."""
    with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
        return f'"arbiter": {arbiter}' in ask(port).text
    return False


def privileged_port() -> int:
    """Find a port that only root may bind."""
    while True:
        port = random.randrange(600, 1024)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def monitor(server: Server) -> psutil.Process | None:
    """Return the monitor's process."""
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if (
                process.info["name"] == "hermes-monitor"
                and os.getsid(process.pid) == server.process.pid
            ):
                return process
    return None


def nobodys(folder: Path, *lines: str) -> str:
    """Return a configuration whose workers are nobody, which may use the server's folder."""
    folder.chmod(0o755)
    return "\n".join(["user = 'nobody'", "group = 'nogroup'", *lines, ""])


def newer_than(arbiter: int) -> list[int]:
    """Return the arbiters that another has executed, once they have a worker."""
    return [child.pid for child in psutil.Process(arbiter).children() if child.children()]


@pytest.fixture
def port() -> int:
    """Where the statistics are to be."""
    return free_port()


@pytest.fixture
def server(start, port) -> Server:
    """A server with statistics there."""
    result: Server = start("--hermes-stats", str(port), workers=1)
    wait_for(lambda: listens(port), "the statistics")
    return result


def test_an_upgrade_keeps_statistics_that_need_privilege(start, tmp_path):
    port = privileged_port()
    server = start(conf=nobodys(tmp_path, f"hermes_stats = '{port}'"), workers=1)
    assert ask(port).status == 200
    assert monitor(server).uids().real == 65534
    refused: list[OSError] = []
    stop = threading.Event()

    def connect() -> None:
        while not stop.wait(0.01):
            try:
                socket.create_connection(("127.0.0.1", port), 10).close()
            except OSError as error:
                refused.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    old = server.process.pid
    server.signal(signal.SIGUSR2)

    (new,) = wait_for(lambda: newer_than(old), "the new server and its worker")
    assert f'"arbiter": {old}' in ask(port).text
    server.signal(signal.SIGTERM)
    server.process.wait(20)
    wait_for(lambda: tells_of(port, new), "the new server's statistics")
    stop.set()
    thread.join()
    assert refused == []
    # And once more, as the new one was handed the address itself.
    os.kill(new, signal.SIGUSR2)
    (newest,) = wait_for(lambda: newer_than(new), "the newest server")
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: tells_of(port, newest), "the newest server's statistics")


def test_a_failed_upgrade_leaves_the_statistics_alone(server, port):
    old = server.process.pid
    server.signal(signal.SIGUSR2)
    (new,) = wait_for(lambda: newer_than(old), "the new server")
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(new), "its end")
    assert f'"arbiter": {old}' in ask(port).text


def test_an_address_that_becomes_free_is_taken_though_it_needs_privilege(start, tmp_path):
    port = privileged_port()
    with socket.create_server(("127.0.0.1", port)):
        server = start(conf=nobodys(tmp_path, f"hermes_stats = '{port}'"), workers=1)
        wait_for(lambda: server.lines("WARNING", f"no statistics on 127.0.0.1:{port}"), "a word")
    wait_for(lambda: listens(port), "the statistics")
    assert ask(port).status == 200
    assert len(server.lines("no statistics on")) == 1


def test_a_killed_monitor_is_started_again_later_each_time(server, port):
    for count in (1, 2):
        process = wait_for(lambda: monitor(server), "the monitor")
        assert ask(port).status == 200
        process.kill()
        process.wait()
        wait_for(lambda n=count: len(server.lines("the monitor has ended")) == n, "a word")
    wait_for(lambda: monitor(server), "the next monitor")
    assert ask(port).status == 200
    pauses = [int(line.partition("again, in ")[2].split()[0]) for line in server.lines("has ended")]
    assert pauses[0] < pauses[1]


def test_busily_slow_clients_keep_nobody_from_asking(server, port):
    stop = threading.Event()
    ended: list[int] = []

    def drip(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\nX: ")
            while not stop.wait(0.3):
                sock.sendall(b"x")
        ended.append(not stop.is_set())

    threads = []
    for _ in range(48):
        sock = socket.create_connection(("127.0.0.1", port), 5)
        threads.append(threading.Thread(target=drip, args=(sock,)))
        threads[-1].start()
    try:
        for _ in range(3):
            assert ask(port).status == 200
        # Each has an end, however much it says.
        wait_for(lambda: len(ended) == len(threads), "their end")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(ended)


def test_head_is_answered_and_the_rest_is_told_what_there_is(server, port):
    for path in ("/", "/metrics"):
        head, whole = ask(port, path, "HEAD"), ask(port, path)
        assert (head.status, head.text) == (200, "")
        assert head.headers["Content-Type"] == whole.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0
    answer = ask(port, "/", "POST")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_only_names_that_are_ours_are_answered(server, port):
    ours = ["localhost", "LOCALHOST.", "127.0.0.1", "[::1]", "192.0.2.7", socket.gethostname()]
    for name in [*ours, *(f"{each}:{port}" for each in ours), "a.localhost"]:
        assert ask(port, Host=name).status == 200, name
    for name in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.x"):
        for path in ("/", "/stats.json", "/metrics", "/nothing"):
            answer = ask(port, path, Host=name)
            assert answer.status == 403
            assert "localhost or an IP address" in answer.text


def test_who_is_asked_by_a_name_over_the_network_answers(start):
    port = free_port()
    name = f"stats.example:{port}"
    up = "ip link set lo up && ip addr add 192.0.2.7/32 dev lo"
    server = start(
        *("--hermes-stats", f"0.0.0.0:{port}"),
        prefix=["unshare", "-n", "sh", "-c", f'{up} && exec "$@"', "sh"],
        unix=True,
        workers=1,
    )

    def status(address: str) -> str:
        code = (
            "import http.client as c, sys; h = c.HTTPConnection(sys.argv[1], int(sys.argv[2]))\n"
            "h.request('GET', '/', headers={'Host': sys.argv[3]}); print(h.getresponse().status)"
        )
        inside = ["nsenter", "-t", str(server.process.pid), "-n"]
        run = subprocess.run(
            [*inside, sys.executable, "-c", code, address, str(port), name],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    assert (status("192.0.2.7"), status("127.0.0.1")) == ("200", "403")


def test_a_unix_socket_has_the_owner_and_mode_of_gunicorns_own(start, tmp_path):
    path = tmp_path / "stats"
    lines = ("umask = 0o117", f"hermes_stats = 'unix:{path}'")
    server = start(conf=nobodys(tmp_path, *lines), unix=True, workers=1)
    stock = os.stat(server.unix)
    told = os.stat(path)
    assert (told.st_uid, told.st_gid, told.st_mode) == (stock.st_uid, stock.st_gid, stock.st_mode)
    assert told.st_mode & 0o777 == 0o660
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"GET /stats.json HTTP/1.1\r\nHost: shop.example\r\n\r\n")
        assert sock.recv(99).startswith(b"HTTP/1.0 200")


def mappings(server: Server) -> int:
    """Count what the monitor has mapped of tables."""
    text = Path(f"/proc/{monitor(server).pid}/maps").read_text()
    return sum("memfd:hermes" in line or "bpf-map" in line for line in text.splitlines())


@pytest.mark.parametrize("mode", ["kernel", "shared"])
def test_reloads_leave_no_mapping_behind(start, port, mode):
    one, two = free_port(), free_port()
    binds = f"bind = ['127.0.0.1:{one}', '127.0.0.1:{two}']\n"
    options = {"bind": [], "port": one, "workers": 1, "conf": binds}
    server = start("--hermes-stats", str(port), "--hermes-mode", mode, **options)
    file = server.folder / "gunicorn.conf.py"
    text = file.read_text()

    def addresses() -> int:
        return ask(port).text.count('"mode": ')

    wait_for(lambda: listens(port), "the statistics")
    wait_for(lambda: addresses() == 2, "both addresses")
    before = mappings(server)
    process = monitor(server)
    for _ in range(3):
        for wanted, conf in ((1, text.replace(f", '127.0.0.1:{two}'", "")), (2, text)):
            file.write_text(conf)
            server.signal(signal.SIGHUP)
            wait_for(lambda n=wanted: addresses() == n, "the reload")
    assert monitor(server) == process
    assert mappings(server) == before


def instead_of_prometheus(then: str) -> list[str]:
    """Return a command prefix that puts a folder in the place of prometheus_client's."""
    folder = Path(prometheus_client.__file__).parent
    return [
        *("unshare", "--mount", "sh", "-c"),
        f'new=$(mktemp -d) && cp -r {folder}/. "$new" && mount -t tmpfs none {folder}'
        f' && cp -r "$new/." {folder} && rm -r "$new" && cd {folder} && {then} && cd - >/dev/null'
        ' && exec "$@"',
        "sh",
    ]


def test_metrics_are_there_though_the_workers_user_cannot_read_the_library(start, tmp_path, port):
    server = start(
        conf=nobodys(tmp_path, f"hermes_stats = '{port}'"),
        prefix=instead_of_prometheus("chmod 700 ."),
        workers=1,
    )
    wait_for(lambda: listens(port), "the statistics")
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        answer = ask(port, "/metrics", Accept=accept)
        assert (answer.status, "hermes_workers" in answer.text) == (200, True)
    assert monitor(server).uids().real == 65534


def test_what_the_monitor_says_is_in_the_error_log(start, tmp_path, port):
    log = tmp_path / "error.log"
    prefix = instead_of_prometheus("echo 'raise ValueError(1)' > __init__.py")
    server = start(
        *("--hermes-stats", str(port), "--error-log", str(log)), prefix=prefix, workers=1
    )
    wait_for(lambda: listens(port), "the statistics")
    assert ask(port, "/metrics").status == 501
    wait_for(lambda: "no /metrics" in log.read_text(), "a word")
    (line,) = [line for line in log.read_text().splitlines() if "no /metrics" in line]
    assert f"[{server.process.pid}] [WARNING] hermes:" in line
    assert "hermes" not in server.log

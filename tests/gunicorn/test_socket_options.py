"""The user configures one socket: connections have its options, whoever dispatches them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import gunicorn
import pytest
from gunicorn_server import APPS, free_port, wait_for

STOCK_AND_OURS = ["sync", "hermes_sync"]
APP = """
import json
from apps import app as other
from hermes_gunicorn.kernel.options import OPTIONS

# What changes by itself while a connection lives.
VOLATILE = {"SO_INCOMING_CPU", "TCP_QUICKACK", "TCP_WINDOW_CLAMP", "SO_RCVBUF"}

def app(environ, start_response):
    if environ["PATH_INFO"] != "/options":
        return other(environ, start_response)
    sock, found = environ["gunicorn.socket"], {}
    for option in OPTIONS:
        if str(option) not in VOLATILE:
            try:
                value = option.read(sock)
            except OSError:
                continue
            found[str(option)] = value.hex() if isinstance(value, bytes) else value
    body = json.dumps(found).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
SET = """
import socket, struct
from apps import post_worker_init

def set_options(sock):
    for level, option, value in (
        (1, 9, 1), (6, 4, 123), (6, 5, 17), (6, 6, 4),  # keep-alive
        (0, 1, 0x28), (1, 12, 5), (1, 36, 77),  # IP_TOS, SO_PRIORITY, SO_MARK
        (6, 9, 7), (6, 18, 5000), (6, 1, 0), (6, 23, 16),  # defer-accept, user-timeout, no-delay
        (1, 7, 60000), (1, 13, struct.pack("ii", 1, 3)), (6, 13, b"reno"), (0, 2, 33),
        (6, 25, 16384), (1, 47, struct.pack("Q", 10**9)), (1, 18, 2),
    ):
        sock.setsockopt(level, option, value)
"""
WHERE = {
    "when_ready": """
def when_ready(server):
    for listener in server.LISTENERS:
        set_options(listener)
""",
    "pre_fork": """
def pre_fork(server, worker):
    for listener in server.LISTENERS:
        set_options(listener)
""",
    "post_fork": """
def post_fork(server, worker):
    for listener in server.LISTENERS:
        set_options(listener)
""",
    "a listener from outside": """
listener = socket.socket()
listener.setsockopt(1, 2, 1)
set_options(listener)
listener.setsockopt(0, 15, 1)  # IP_FREEBIND
listener.bind(("127.0.0.1", PORT))
bind = f"fd://{listener.fileno()}"
""",
}


@pytest.fixture
def options_of(launch, tmp_path):
    """Start a server and return the options of ten connections."""

    def run(name: str, where: str) -> list[dict[str, object]]:
        port = free_port()
        files = tmp_path / name
        files.mkdir()
        (files / "apps.py").write_text(APPS.read_text())
        (files / "shown.py").write_text(APP)
        conf = SET + WHERE[where].replace("PORT", str(port))
        (files / "gunicorn.conf.py").write_text(conf)
        bind = [] if "bind =" in conf else [f"127.0.0.1:{port}"]
        server = launch(worker_class=name, files=files, app="shown:app", bind=bind, port=port)
        server.wait_ready()
        if name.startswith("hermes"):
            assert server.lines("hermes: kernel dispatch on"), server.log
        return [json.loads(server.get("/options")) for _ in range(10)]

    return run


@pytest.mark.parametrize("where", WHERE)
def test_connections_have_what_was_set_on_the_listener(options_of, where):
    stock, ours = (options_of(name, where) for name in STOCK_AND_OURS)
    assert (stock[0]["SO_MARK"], stock[0]["TCP_KEEPIDLE"]) == (77, 123)
    assert [each["SO_MARK"] for each in ours] == [77] * 10
    assert ours == stock


LATER = """
import threading, time
from apps import post_worker_init

def when_ready(server):
    def run():
        time.sleep(0.1)
        server.LISTENERS[0].setsockopt(1, 36, 78)
        server.log.info("marked")
    threading.Thread(target=run, daemon=True).start()
"""


def test_what_is_set_while_it_serves_holds_within_a_turn_of_the_arbiter(start):
    server = start(worker_class="hermes_sync", conf=LATER)
    wait_for(lambda: server.lines("marked"), "the option")

    def marks() -> set[str]:
        listed = subprocess.run(
            ["ss", "-Hltne", f"sport = :{server.port}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
        return {line.partition("fwmark:")[2].partition(" ")[0] for line in listed.splitlines()}

    assert wait_for(lambda: marks() == {"0x4e"}, "the mark on all listeners")


def test_what_cannot_be_copied_is_said_once_and_the_kernel_dispatches(start):
    """SO_MARK needs CAP_NET_ADMIN, which whoever opened the socket had."""
    server = start(
        worker_class="hermes_sync",
        bind=[],
        conf="bind = 'fd://9'\n",
        **opened_as_nobody(mark=79),
    )
    assert server.lines("hermes: kernel dispatch on")
    (line,) = server.lines("WARNING", "hermes: SO_MARK of http://")
    assert "do not have it" in line
    assert "CAP_NET_ADMIN" in line


OPEN = """
import ctypes, os, socket, sys
sock = socket.socket()
sock.setsockopt(1, 2, 1)
if {mark}:
    sock.setsockopt(1, 36, {mark})
sock.bind(("127.0.0.1", {port}))
os.dup2(sock.fileno(), 9)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def opened_as_nobody(mark: int = 0, keep: str = "+bpf") -> dict[str, object]:
    """Return options for a server of user nobody that is given a socket of nobody's as fd 9."""
    port = free_port()
    caps = "-all,+dac_read_search,+net_admin,+net_bind_service,+bpf"
    less = f"-all,+dac_read_search,{keep}"
    return {
        "port": port,
        "prefix": [
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
            *(f"--inh-caps={caps}", f"--ambient-caps={caps}"),
            *(sys.executable, "-c", OPEN.format(mark=mark, port=port)),
            *("setpriv", f"--inh-caps={less}", f"--ambient-caps={less}"),
        ],
    }


HAS_BACKLOG_METRIC = int(gunicorn.__version__.split(".")[0]) >= 24
MODES = {
    "kernel": {"worker_class": "hermes_sync"},
    "shared": {"worker_class": "hermes_sync", "conf": "hermes_mode = 'shared'\n"},
    "unix": {"worker_class": "hermes_sync", "unix": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_statsd_is_told_of_all_connections_that_wait(start, mode):
    """With the workers stopped, 20 connections stay where they are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        sink.settimeout(10)
        wanted = {"hermes.connections.queued:20|g"}
        arguments = ["--statsd-host", f"127.0.0.1:{sink.getsockname()[1]}"]
        if HAS_BACKLOG_METRIC and mode != "unix":
            arguments.append("--enable-backlog-metric")
            wanted.add("gunicorn.backlog:20|h")
        server = start(*arguments, "--timeout", "0", **MODES[mode])
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGSTOP)
        clients = [server.connect() for _ in range(20)]
        heard: set[str] = set()

        def told() -> bool:
            heard.add(sink.recv(4096).decode())
            return wanted <= heard

        try:
            wait_for(told, "20 that wait")
        finally:
            for client in clients:
                client.close()

"""Policies, many addresses and groups, as configured."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from pathlib import Path

import psutil
import pytest
from gunicorn_server import Client, Server, ask_server, free_port, under_load, wait_for

from hermes_gunicorn.core.layout import CASCADE, LEAST_LOADED


def configure(server: Server, text: str) -> None:
    """Write another configuration file; HUP reads it."""
    (server.folder / "gunicorn.conf.py").write_text("from apps import post_worker_init\n" + text)


def pids(address: tuple[str, int], count: int) -> set[int]:
    """Return who answers there."""
    found = set()
    for _ in range(count):
        with Client(address) as client:
            found.add(int(client.get("/pid")))
    return found


def test_the_cascade_serves_and_its_first_stage_runs(start):
    server = start("--hermes-policy", "cascade", "--hermes-theta", "0.25", workers=3)
    assert server.lines("policy cascade")
    with under_load(server) as failures:
        wait_for(lambda: server.table()["selected"], "a selection")
        assert len(pids(server.address, 100)) == 3
    assert not failures


def test_the_cascade_avoids_who_has_clearly_more_connections(start):
    server = start("--hermes-policy", "cascade", "--keep-alive", "60", workers=2)
    with contextlib.ExitStack() as stack:
        for opened in range(40):
            stack.enter_context(server.connect()).get("/pid")
            server.settle(opened + 1)
        low, high = sorted(worker["connections"] for worker in server.status()["workers"])
        # theta is half of the average of 20: nobody gets more while above 30.
        assert high - low <= 24


def test_a_reload_switches_the_policy_and_a_running_server_can_be_switched(start):
    server = start(workers=2)
    assert server.table()["policy"] == LEAST_LOADED
    configure(server, "hermes_policy = 'cascade'\n")
    server.signal(signal.SIGHUP)
    wait_for(lambda: server.table()["policy"] == CASCADE, "the policy of the reload")
    server.wait_ready()
    ask_server(server.process.pid, "set", name="policy", value="least_loaded")
    server.signal(signal.SIGTTIN)
    server.wait_ready(3)
    # A worker more does not bring back what the file says.
    assert server.table()["policy"] == LEAST_LOADED


CONFINED = """
bind = ["127.0.0.1:{a}", "127.0.0.1:{b}"]
hermes_bind_workers = {{"127.0.0.1:{b}": 0.5}}
"""


@pytest.fixture
def confined(start) -> tuple[Server, tuple[str, int]]:
    """Four workers; two of them serve the second address."""
    a, b = free_port(), free_port()
    server = start(workers=4, port=a, bind=[], conf=CONFINED.format(a=a, b=b))
    return server, ("127.0.0.1", b)


def block_all(
    server: Server, address: tuple[str, int], members: set[int], name: str
) -> list[Client]:
    """Send blocking requests until each of those workers is inside one, and some more."""
    clients = [Client(address) for _ in range(6)]
    for client in clients:
        client.send(f"/hold?{name}")
    wait_for(lambda: members <= {*server.held(name)}, "all of them to block")
    return clients


def test_a_confined_address_cannot_hang_the_other_workers(confined):
    server, other = confined
    members = pids(other, 40)
    assert len(members) == 2
    assert len(pids(server.address, 40)) == 4
    clients = block_all(server, other, members, "end")
    try:
        # Nobody takes what waits there, and the rest of the server does not notice.
        free = server.worker_pids() - members
        wait_for(lambda: pids(server.address, 5) <= free, "both to count as hung")
        assert pids(server.address, 60) <= free
        server.release("end")
        for client in clients:
            assert client.receive()[0] == 200
        assert {*server.held("end")} == members
    finally:
        for client in clients:
            client.close()


def test_a_share_of_the_workers_survives_restarts(confined):
    server, other = confined
    (victim, *_) = members = pids(other, 40)
    psutil.Process(victim).kill()
    wait_for(lambda: victim not in server.worker_pids(), "its end")
    server.wait_ready(4)
    after = pids(other, 40)
    assert len(after) == 2
    assert after & members == members - {victim}
    with under_load(server) as failures:
        old = server.worker_pids()
        server.signal(signal.SIGHUP)
        wait_for(lambda: not old & server.worker_pids(), "new workers")
        server.wait_ready(4)
    assert not failures
    wait_for(lambda: len(pids(other, 40)) == 2, "two of the new ones to serve it")
    for left in (3, 2, 1):
        server.signal(signal.SIGTTOU)
        wait_for(lambda left=left: len(server.worker_pids()) == left, "one worker less")
        assert pids(other, 10) <= server.worker_pids()


def test_a_unix_socket_can_be_confined_too(start, tmp_path: Path):
    port, path = free_port(), str(tmp_path / "sock")
    conf = f"""
bind = ["127.0.0.1:{port}", "unix:{path}"]
hermes_bind_workers = {{"unix:{path}": 0.25}}
"""
    start(workers=4, port=port, bind=[], conf=conf)
    found = set()
    for _ in range(40):
        with Client(path) as client:
            found.add(client.get("/pid"))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        ("hermes_bind_workers = {'127.0.0.1:1': 0.5}", "names '127.0.0.1:1', which is not in bind"),
        ("hermes_groups = 3", "hermes_groups is 3 and there are 2 workers"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_in_a_line(launch, conf, says):
    server = launch(workers=2, conf=conf)
    assert server.wait_ended() != 0
    assert len(server.lines("Error:", says)) == 1


@pytest.mark.ebpf
def test_clients_keep_to_their_locality_group(start):
    conf = "hermes_groups = 2\nhermes_group_by = 'client'\n"
    # Other tests use the cores as well: who waits for one is not to look hung.
    server = start("--hermes-hang-threshold", "60", workers=4, conf=conf)
    assert server.table()["localities"] == 2
    groups = []
    for last in range(2, 10):
        found = set()
        asked = 0
        while asked < 12 or (len(found) < 2 and asked < 500):
            asked += 1
            server.settle()  # at equal load the hash decides
            with socket.create_connection(
                server.address, timeout=10, source_address=(f"127.0.0.{last}", 0)
            ) as sock:
                sock.sendall(b"GET /table HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            found.add(json.loads(answer.partition(b"\r\n\r\n")[2])["slot"])
        assert len(found) == 2  # both workers of the group, and no other
        groups.append({slot // 64 for slot in found})
    assert all(len(group) == 1 for group in groups)
    assert {0} in groups
    assert {1} in groups


FEW_FILES = """
import resource
def on_starting(server):
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
"""


@pytest.mark.ebpf
def test_too_few_open_files_cost_workers_their_listener_not_the_service(start):
    server = start(workers=10, conf=FEW_FILES)
    assert server.lines("hermes: cannot open listeners in advance", "allow more open files")
    for workers in range(11, 16):
        server.signal(signal.SIGTTIN)
        wait_for(lambda n=workers: len(server.worker_pids()) == n, "one worker more")
    assert server.lines("hermes: no listener for slot", "allow more open files")
    assert len(pids(server.address, 100)) > 5
    assert not server.lines("Traceback")

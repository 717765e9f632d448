"""Listening sockets: held from outside, few files for them, more workers, other addresses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gunicorn_server import Server, free_port, listens, under_load, wait_for

UNHURRIED = ("--hermes-hang-threshold", "1")  # who waits for a core is not to look hung

ACTIVATE = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as channel:
    channel.connect(sys.argv[1])
    _, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
    os.dup2(fd, 100)
os.dup2(100, 3)
if sys.argv[2] == "systemd":
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Holder:
    """Holds a listening socket, as systemd and circus do, and gives it to servers."""

    def __init__(self, folder: Path) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self._path = str(folder / "holder")
        self._channel = socket.socket(socket.AF_UNIX)
        self._channel.bind(self._path)
        self._channel.listen()

    def start(self, launch: Any, how: str, *arguments: str, **options: Any) -> Server:
        """Start a server with the socket and wait for its workers."""
        server: Server = launch(
            *arguments,
            prefix=[sys.executable, "-c", ACTIVATE, self._path, how],
            port=self.port,
            bind=[],
            conf=options.pop("conf", "bind = 'fd://3'\n" if how == "fd" else ""),
            **options,
        )
        client, _ = self._channel.accept()
        with client:
            socket.send_fds(client, [b"x"], [self.sock.fileno()])
        # The workers of an earlier server may answer meanwhile.
        wait_for(lambda: len(server.lines("Booting worker")) == 2, "workers")
        wait_for(lambda: int(server.get("/pid")) in server.worker_pids(), "an answer of its own")
        return server.wait_ready()

    def close(self) -> None:
        """Let go of everything."""
        self.sock.close()
        self._channel.close()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """A socket that no server owns."""
    holder = Holder(tmp_path)
    yield holder
    holder.close()


def dispatched(server: Server) -> int:
    """Count the connections that the kernel gave to a worker."""
    count: int = server.table()["binds"][0]["dispatched"]
    return count


def dispatches(server: Server) -> bool:
    """Say whether the kernel gives some connections to workers, each of them."""
    before = dispatched(server)
    for _ in range(10):
        server.get("/pid")
    return dispatched(server) == before + 11


@pytest.mark.parametrize(
    ("how", "number"), [("systemd", signal.SIGTERM), ("fd", signal.SIGKILL)], ids=["systemd", "fd"]
)
def test_a_held_socket_is_dispatched_to_at_every_start(launch, holder, how, number):
    for strict in ([], ["--hermes-strict"], []):
        server = holder.start(launch, how, *UNHURRIED, *strict)
        assert server.lines("hermes: kernel dispatch on", str(holder.port))
        assert not server.lines("hermes: shared mode")
        wait_for(lambda s=server: dispatches(s), "dispatch by the kernel")
        # After KILL the workers live on for a moment, beside those of the next start.
        server.signal(number)
        server.wait_ended()


FORKS = """
def when_ready(server):
    import os, time
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print("child", child, flush=True)
"""


def test_what_an_arbiter_has_forked_does_not_keep_the_next_from_dispatching(launch, holder):
    server = holder.start(launch, "systemd", conf=FORKS)
    child = int(re.search(r"child (\d+)", server.log)[1])
    server.process.kill()
    server.wait_ended()
    # It has the first arbiter's listener, and nothing of its socket array and program.
    server = holder.start(launch, "systemd", *UNHURRIED, "--hermes-strict")
    assert not server.lines("WARNING", "hermes:", "another server, or a process")
    wait_for(lambda: dispatches(server), "dispatch by the kernel")
    psutil.Process(child).kill()


def test_two_servers_on_a_held_socket_both_serve(launch, holder):
    """As while a process manager starts the new one before it stops the old."""
    one = holder.start(launch, "systemd", *UNHURRIED)
    with under_load(one) as failures:
        two = holder.start(launch, "systemd", *UNHURRIED)
        assert len(two.lines("WARNING", "hermes:", "another server, or a process")) == 1
        one.signal(signal.SIGTERM)
        one.wait_ended()
    assert failures == []
    wait_for(lambda: dispatches(two), "dispatch to the second")


def listening(pid: int, port: int) -> set[str]:
    """Return the listening sockets of a port that a process has, by inode."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    mine = {row[9] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(fd))
    return mine & {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def test_after_a_reload_with_many_more_workers_each_has_all_siblings_listeners(start):
    server = start(conf="workers = 2\n", worker_class="hermes_gthread")
    old = server.worker_pids()
    (server.folder / "gunicorn.conf.py").write_text(
        "from apps import post_worker_init\nworkers = 14\n"
    )
    server.signal(signal.SIGHUP)
    wait_for(lambda: len(server.worker_pids() - old) == 14, "the new workers")
    wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
    server.wait_ready(14)
    opened = listening(server.process.pid, server.port)
    assert len(opened) >= 1 + 14 + 2
    lacking = {pid: len(opened - listening(pid, server.port)) for pid in server.worker_pids()}
    assert set(lacking.values()) == {0}


def test_a_worker_that_ttin_adds_has_the_listeners_of_as_many_again(start):
    server = start(worker_class="hermes_gthread")
    for count in range(3, 9):
        known = server.worker_pids()
        server.signal(signal.SIGTTIN)
        (new,) = wait_for(lambda k=known: server.worker_pids() - k, "a new worker")
        server.wait_ready(count)
        assert len(listening(new, server.port)) >= 1 + 2 * count


def settled(server: Server) -> dict[int, int]:
    """Return how many listeners each worker uses, by pid, once each has answered."""
    found: dict[int, int] = {}

    def all_answered() -> bool:
        with server.connect() as client:
            pid = int(client.get("/pid"))
            found[pid] = len(json.loads(client.get("/table"))["binds"])
        return found.keys() == server.worker_pids()

    wait_for(all_answered, "an answer of each worker")
    return found


def test_with_few_files_each_worker_has_its_listeners_before_there_are_spare_ones(start):
    ports = [free_port() for _ in range(4)]
    server = start(
        *UNHURRIED,
        prefix=["prlimit", "--nofile=128:128"],
        bind=[f"127.0.0.1:{port}" for port in ports],
        port=ports[3],
        workers=8,
        worker_class="hermes_gthread",
    )
    # Its own and the one that all share, at each of four addresses.
    assert set(settled(server).values()) == {8}
    for port in ports:  # and those of its siblings
        opened = listening(server.process.pid, port)
        assert len(opened) >= 1 + 8
        for pid in server.worker_pids():
            assert len(listening(pid, port)) >= 1 + 8
    assert not server.lines("no listener for slot")
    assert len(server.lines("cannot open listeners in advance")) == 1
    # It still has files enough for twice the workers.
    old = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
    server.wait_ready(8)
    assert set(settled(server).values()) == {8}


CONF = "from apps import post_worker_init\nworker_class = 'hermes_gthread'\nbind = [{}]\n"


@pytest.mark.parametrize(
    ("upgraded", "reloaded"), [("ba", "b"), ("b", "a"), ("a", "ac")], ids=lambda names: names
)
def test_after_an_upgrade_with_another_bind_a_reload_serves_the_right_addresses(
    launch, tmp_path, upgraded, reloaded
):
    ports = {name: free_port() for name in "abc"}
    pidfile = tmp_path / "pid"

    def conf(names: str) -> str:
        return CONF.format(", ".join(f"'localhost:{ports[name]}'" for name in names))

    server = launch(
        "--pid", str(pidfile), conf=conf("ab"), bind=[], port=ports["a"], worker_class=None
    ).wait_ready()
    path = server.folder / "gunicorn.conf.py"
    path.write_text(conf(upgraded))
    server.signal(signal.SIGUSR2)
    new = Path(f"{pidfile}.2")
    wait_for(lambda: new.exists() and new.read_text().strip(), "the new pid file")
    master = psutil.Process(int(new.read_text()))
    wait_for(lambda: len(master.children()) == 2, "the new workers")
    server.signal(signal.SIGTERM)
    server.wait_ended()
    served = sorted(reloaded)
    old = {child.pid for child in master.children()}
    with under_load(server) if "a" in served else contextlib.nullcontext([]) as failures:
        path.write_text(conf(reloaded))
        master.send_signal(signal.SIGHUP)
        wait_for(lambda: not old & {child.pid for child in master.children()}, "their end")
        wait_for(lambda: [name for name in "abc" if listens(ports[name])] == served, "the ports")
    assert failures == []
    master.terminate()
    master.wait(20)


def test_a_reload_that_would_need_a_closed_descriptor_changes_nothing(launch, holder):
    conf = "from apps import post_worker_init\nbind = {}\n"
    server = holder.start(launch, "fd", worker_class="hermes_gthread")
    old = server.worker_pids()
    (server.folder / "gunicorn.conf.py").write_text(conf.format(["fd://3", "127.0.0.1:0"]))
    server.signal(signal.SIGHUP)
    wait_for(lambda: server.lines("ERROR", "fd://", "restart the server"), "a word")
    server.get("/pid")
    assert server.worker_pids() == old


def test_a_held_socket_is_kept_in_a_reload_that_names_its_address(launch, holder):
    """Stock gunicorn closes it and ends, as it cannot bind the address anew."""
    other = free_port()
    server = holder.start(launch, "systemd", worker_class="hermes_gthread")
    old = server.worker_pids()
    with under_load(server) as failures:
        (server.folder / "gunicorn.conf.py").write_text(
            "from apps import post_worker_init\n"
            f"bind = ['127.0.0.1:{other}', '127.0.0.1:{holder.port}']\n"
        )
        server.signal(signal.SIGHUP)
        wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
        wait_for(lambda: listens(other), "the new address")
    assert failures == []


ATTACKS = """
import ctypes, signal, socket, struct

def post_fork(server, worker):
    # For the test's sake by signal; it could as well be a request that does this.
    def detach(*_):
        worker.sockets[0].setsockopt(socket.SOL_SOCKET, 68, 0)  # SO_DETACH_REUSEPORT_BPF
        print("done", flush=True)

    def replace(*_):
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 4))
        program = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(code))
        worker.sockets[0].setsockopt(socket.SOL_SOCKET, 51, program)  # ..._ATTACH_..._CBPF
        worker.sockets[-1].setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
        print("done", flush=True)

    signal.signal(signal.SIGRTMIN, detach)
    signal.signal(signal.SIGRTMIN + 1, replace)
"""


def get_many(server: Server, count: int) -> list[str]:
    """Send requests, all at once; return what fails."""
    failures: list[str] = []

    def get() -> None:
        try:
            server.get("/pid")
        except (OSError, AssertionError) as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=get) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("then", ["turn", "fork", "reload", "freeze"])
@pytest.mark.parametrize("attack", ["detach", "replace"])
def test_when_a_worker_takes_the_program_away_requests_are_answered(start, attack, then):
    conf = ATTACKS + "workers = 2\n"
    server = start(*UNHURRIED, conf=conf, worker_class="hermes_gthread")
    number = signal.SIGRTMIN + (attack == "replace")
    for turn in range(1, 3):
        before = server.worker_pids()
        attacker = min(before)
        os.kill(attacker, number)
        wait_for(lambda t=turn: len(server.lines("done")) == t, "the attack")
        if then == "fork":
            psutil.Process(attacker).kill()
        elif then == "reload":
            server.signal(signal.SIGHUP)
        elif then == "freeze":  # and what the hash sends there waits until it is rescued
            psutil.Process(attacker).suspend()
        assert get_many(server, 20) == []
        if then == "freeze":
            psutil.Process(attacker).resume()
        elif then != "turn":
            ended = before if then == "reload" else {attacker}
            wait_for(lambda e=ended: not e & server.worker_pids(), "their end")
        server.wait_ready()
        wait_for(lambda: dispatches(server), "dispatch by the kernel")
    if then == "turn":
        (line,) = server.lines("hermes: the eBPF program was detached from")
        assert str(server.port) in line

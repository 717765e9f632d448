"""What must not end or hurt a server: bad reloads, failed upgrades, deaths at bad moments."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
from gunicorn_server import as_nobody, free_port, under_load, wait_for


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.ebpf), "shared"])
def mode(request: pytest.FixtureRequest) -> str:
    """How connections are shared."""
    return str(request.param)


FIRST_LINES = "from apps import post_worker_init\nworker_class = 'hermes'\n"
BROKEN = {
    "syntax": "workers = = 2",
    "value": "workers = 'many'",
    "ours": "hermes_hang_threshold = -1",
    "class": "worker_class = 'no.such.Worker'",
    "import": "import no_such_module",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_reload_with_a_broken_configuration_changes_nothing(start, text):
    server = start(conf="worker_class = 'hermes'\n", worker_class=None)
    old = server.worker_pids()
    conf = server.folder / "gunicorn.conf.py"
    with under_load(server) as failures:
        conf.write_text(FIRST_LINES + text + "\n")
        server.signal(signal.SIGHUP)
        wait_for(lambda: server.lines("ERROR", "reload rejected"), "a word")
        assert server.worker_pids() == old
        # And once it is mended all is as ever.
        conf.write_text(FIRST_LINES + "keepalive = 3\n")
        server.signal(signal.SIGHUP)
        wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
        server.wait_ready()
    assert failures == []


RELOADS = [
    ("hermes_policy = 'least_loaded'", "hermes_policy = 'cascade'"),
    ("hermes_mode = 'auto'", "hermes_mode = 'shared'"),
    ("hermes_mode = 'shared'", "hermes_mode = 'auto'"),
    ("workers = 2", "workers = 5"),
    ("workers = 5", "workers = 2"),
    ("bind = [{one}]", "bind = [{one}, {two}]"),
    ("bind = [{two}, {one}]", "bind = [{one}]"),
]


@pytest.mark.parametrize(("before", "after"), RELOADS)
def test_a_reload_with_other_settings_loses_nothing(start, before, after):
    port = free_port()
    binds = {"one": f"'127.0.0.1:{port}'", "two": f"'127.0.0.1:{free_port()}'"}
    fixed = "worker_class = 'hermes'\nbind = [{one}]\n"
    server = start(
        conf=(fixed + before).format(**binds),
        worker_class=None,
        bind=[],
        port=port,
        workers=5 if before == "workers = 5" else 2,
    )
    old = server.worker_pids()
    with under_load(server, 200) as failures:
        text = f"from apps import post_worker_init\n{fixed}{after}\n".format(**binds)
        (server.folder / "gunicorn.conf.py").write_text(text)
        server.signal(signal.SIGHUP)
        wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
        server.wait_ready(5 if after == "workers = 5" else 2)
    assert failures == []


def test_a_reload_to_an_address_in_use_changes_nothing(start):
    port = free_port()
    server = start(conf=f"bind = '127.0.0.1:{port}'\n", bind=[], port=port)
    old = server.worker_pids()
    conf = server.folder / "gunicorn.conf.py"
    with socket.create_server(("127.0.0.1", 0)) as other, under_load(server) as failures:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        conf.write_text(conf.read_text() + f"bind = ['127.0.0.1:{port}', '{taken}']\n")
        server.signal(signal.SIGHUP)
        wait_for(lambda: server.lines("Still running with the previous configuration"), "a word")
        assert server.lines("Can't connect to", str(other.getsockname()[1]))
        assert server.worker_pids() == old
    assert failures == []


def test_scaling_far_up_and_down_to_one_loses_nothing(start, mode):
    server = start("--hermes-mode", mode, workers=1)
    with under_load(server, 200) as failures:
        for count in [*range(2, 9), *range(7, 0, -1)]:
            server.signal(signal.SIGTTIN if count > len(server.worker_pids()) else signal.SIGTTOU)
            wait_for(lambda n=count: len(server.worker_pids()) == n, f"{count} workers")
        server.wait_ready(1)
    assert failures == []


def test_winch_ends_the_workers_and_what_comes_waits_for_others(start, mode):
    # Only a daemon heeds it; this one stays where the test sees it.
    conf = "def on_starting(server):\n    server.cfg.set('daemon', True)\n"
    server = start("--hermes-mode", mode, conf=conf)
    for number in (signal.SIGTTIN, signal.SIGHUP):
        with under_load(server) as failures:
            server.signal(signal.SIGWINCH)
            wait_for(lambda: not server.worker_pids(), "the workers' end")
            with server.connect() as client:
                client.send("/pid")
                server.signal(number)
                assert client.receive()[0] == 200
        assert failures == []


@pytest.mark.parametrize(
    ("mode", "worker_class"), [("kernel", "hermes_sync"), ("shared", "hermes")]
)
def test_a_worker_that_exceeds_the_timeout_costs_only_what_was_in_it(start, mode, worker_class):
    server = start("--hermes-mode", mode, "--timeout", "2", worker_class=worker_class, workers=3)
    with under_load(server) as failures, server.connect() as client:
        old = server.worker_pids()
        client.send("/block?30")
        wait_for(lambda: server.lines("WORKER TIMEOUT"), "the time-out")
        wait_for(lambda: len(server.worker_pids() - old) == 1, "a successor")
        server.wait_ready()
        with contextlib.suppress(ConnectionError):
            assert client.receive()[0] == 500
    # What the worker had accepted in the same turn of its loop is inside it as well.
    assert len(failures) <= 2


def new_master(server, pidfile: Path) -> psutil.Process:
    """Start another arbiter with USR2 and wait for its workers."""
    server.signal(signal.SIGUSR2)
    path = Path(f"{pidfile}.2")
    wait_for(lambda: path.exists() and path.read_text().strip(), "the new pid file")
    master = psutil.Process(int(path.read_text()))
    wait_for(lambda: len(master.children()) == 2, "the new workers")
    return master


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGTERM, 1), (signal.SIGQUIT, 1), (signal.SIGKILL, 2)]
)
@pytest.mark.ebpf
def test_after_an_upgrade_that_fails_the_kernel_dispatches_to_the_old_workers(
    start, tmp_path, number, times
):
    pidfile = tmp_path / "pid"
    # Other tests use the cores as well: who waits for one is not to look hung.
    server = start("--pid", str(pidfile), "--hermes-hang-threshold", "60")
    old = server.worker_pids()
    with under_load(server) as failures:
        for _ in range(times):
            master = new_master(server, pidfile)
            children = master.children()
            count = len(server.lines("restored after the upgrade"))
            master.send_signal(number)
            wait_for(lambda n=count: len(server.lines("restored after the upgrade")) > n, "a word")
            wait_for(lambda c=children: not any(p.is_running() for p in c), "their end")
            Path(f"{pidfile}.2").unlink(missing_ok=True)
    # QUIT ends requests, in our workers as in gunicorn's.
    assert failures == [] or number == signal.SIGQUIT

    def by_slot() -> list[int]:
        return [row["dispatched"] for row in server.table()["rows"]]

    # What was sent to a worker and moved elsewhere with a listener is written off in seconds.
    wait_for(lambda: {int(server.get("/pid")) for _ in range(40)} == old, "both to get some")
    before = by_slot()
    for _ in range(40):
        server.get("/pid")
    after = by_slot()
    assert sum(after[1:]) - sum(before[1:]) == 41
    assert after[0] == before[0]


BOOTS_WHEN_ALLOWED = """
import os, time
def post_fork(server, worker):
    while os.path.exists("no-boots"):
        time.sleep(0.01)
"""


def test_a_worker_that_is_killed_while_it_boots_costs_nothing(start):
    server = start(conf=BOOTS_WHEN_ALLOWED)
    no_boots = server.folder / "no-boots"
    with under_load(server) as failures:
        for _ in range(3):
            known = server.worker_pids()
            no_boots.touch()
            server.signal(signal.SIGTTIN)
            (young,) = wait_for(lambda k=known: server.worker_pids() - k, "a new worker")
            psutil.Process(young).kill()
            wait_for(lambda y=young: y not in server.worker_pids(), "its end")
            no_boots.unlink()
            server.signal(signal.SIGTTOU)
            server.wait_ready(2)
    assert failures == []


def test_a_worker_that_fails_to_boot_ends_the_server_as_ever(launch):
    conf = "def post_worker_init(worker):\n    raise RuntimeError('no')\n"
    server = launch(conf=conf)
    assert server.wait_ended() != 0
    assert server.lines("Worker failed to boot")


ACTIVATE = """
import os, socket, sys
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("127.0.0.1", int(sys.argv[1])))
sock.listen()
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def activated(port: int) -> list[str]:
    """Return a prefix that opens the socket and hands it over, as systemd does."""
    return [sys.executable, "-c", ACTIVATE, str(port)]


@pytest.mark.ebpf
def test_a_socket_of_systemd_is_dispatched_to(launch):
    port = free_port()
    server = launch(prefix=activated(port), port=port, bind=[]).wait_ready()
    assert server.lines("hermes: kernel dispatch on", str(port))
    with under_load(server) as failures:
        old = server.worker_pids()
        server.signal(signal.SIGHUP)
        wait_for(lambda: not old & server.worker_pids(), "new workers")
        server.wait_ready()
    assert failures == []


@pytest.mark.ebpf
@pytest.mark.root
def test_a_socket_of_another_user_is_served_in_shared_mode(launch):
    port = free_port()
    prefix = [*activated(port), *as_nobody("+bpf")]
    server = launch(prefix=prefix, port=port, bind=[]).wait_ready()
    (warning,) = server.lines("WARNING", "hermes: shared mode on")
    assert "must belong to the user that runs gunicorn" in warning
    silent = server.worker_pids()

    def each_has_answered() -> bool:
        silent.discard(int(server.get("/pid")))
        return not silent

    with under_load(server) as failures:
        # At so light a load either may well take nearly all.
        wait_for(each_has_answered, "an answer of each worker")
    assert failures == []


@pytest.mark.ebpf
def test_a_listener_given_by_number_is_dispatched_to(launch):
    port = free_port()
    conf = f"""
import socket
listener = socket.create_server(("127.0.0.1", {port}))
bind = f"fd://{{listener.fileno()}}"
"""
    server = launch(bind=[], conf=conf, port=port).wait_ready()
    assert server.lines("hermes: kernel dispatch on", str(port))


def test_many_lives_leave_nothing_open(start):
    server = start("--max-requests", "4", workers=3)
    arbiter = psutil.Process(server.process.pid)

    def all_are_ready() -> bool:
        # From outside: each question to a worker would bring its end nearer.
        return [worker["state"] for worker in server.status()["workers"]] == ["ready"] * 3

    def life(reload: bool) -> None:
        old = server.worker_pids()
        if reload:
            server.signal(signal.SIGHUP)
            wait_for(lambda: not old & server.worker_pids(), "new workers")
        else:
            while old & server.worker_pids() == old:
                with contextlib.suppress(OSError, ConnectionError):
                    server.get("/pid")
        wait_for(all_are_ready, "three ready workers")

    wait_for(all_are_ready, "three ready workers")
    life(reload=True)
    before, lives = arbiter.num_fds(), 0
    for turn in range(12):
        known = server.worker_pids()
        life(reload=turn % 6 == 5)
        lives += len(server.worker_pids() - known)
    assert lives > 12
    wait_for(lambda: arbiter.num_fds() <= before, "the arbiter's files to be closed")
    bpf = [os.readlink(fd) for fd in Path(f"/proc/{arbiter.pid}/fd").iterdir()]
    assert sum("bpf" in link for link in bpf) <= 8

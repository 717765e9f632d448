"""Reloads, scaling, upgrades, stops: gunicorn's signals under a light load."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from gunicorn_server import GONE_WITHIN, Client, free_port, under_load, wait_for

HOOKS = [
    "on_starting(server)",
    "when_ready(server)",
    "on_reload(server)",
    "pre_fork(server, worker)",
    "post_fork(server, worker)",
    "child_exit(server, worker)",
    "worker_exit(server, worker)",
    "pre_exec(server)",
    "on_exit(server)",
]
USER_HOOKS = "".join(
    f"def {hook}:\n    print('user hook {hook.partition('(')[0]}', flush=True)\n" for hook in HOOKS
)


def test_hup_replaces_the_workers_and_loses_nothing(start):
    server = start(workers=3)
    for _ in range(2):
        old = server.worker_pids()
        with under_load(server) as failures:
            server.signal(signal.SIGHUP)
            wait_for(lambda: not old & server.worker_pids(), "the old workers' end")  # noqa: B023
            server.wait_ready()
        assert failures == []
        assert len(server.worker_pids()) == 3
    assert not server.lines("hermes: error")


def test_the_users_hooks_are_still_called_also_after_hup(start):
    server = start(conf=USER_HOOKS)
    old = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
    server.wait_ready()
    # Exactly as often as gunicorn calls them.
    assert len(server.lines("user hook pre_fork")) == 4
    assert len(server.lines("user hook post_fork")) == 4
    wait_for(lambda: len(server.lines("user hook child_exit")) == 2, "child_exit")
    assert len(server.lines("user hook when_ready")) == 1
    assert len(server.lines("user hook on_reload")) == 1
    server.signal(signal.SIGTERM)
    assert server.wait_ended() == 0
    assert len(server.lines("user hook child_exit")) == 4
    assert len(server.lines("user hook worker_exit")) == 4
    assert len(server.lines("user hook on_exit")) == 1


@pytest.mark.ebpf
def test_hup_with_another_address(launch):
    ports = [free_port(), free_port()]
    server = launch(bind=[], conf=f"bind = '127.0.0.1:{ports[0]}'\n")
    server.port = ports[0]
    server.wait_ready()
    conf = server.folder / "gunicorn.conf.py"
    conf.write_text(conf.read_text().replace(str(ports[0]), str(ports[1])))
    old = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
    server.port = ports[1]
    server.wait_ready()
    assert server.lines("hermes: kernel dispatch", f":{ports[1]} (")
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.1", ports[0]))


def test_hup_with_other_settings(start):
    server = start()
    conf = server.folder / "gunicorn.conf.py"
    conf.write_text(conf.read_text() + "hermes_hang_threshold = 0.5\nworkers = 2\n")
    old = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.worker_pids(), "the old workers' end")
    server.wait_ready()
    assert int(server.get("/threshold")) == 500_000_000


@pytest.mark.parametrize("other", ["sync", "gevent"])
def test_hup_to_another_worker_class_and_back(start, other):
    server = start(worker_class=None, conf="worker_class = 'hermes'\n")
    conf = server.folder / "gunicorn.conf.py"
    hermes = conf.read_text()
    for name in (other, "hermes", other):
        conf.write_text(hermes.replace("'hermes'", repr(name)))
        old = server.worker_pids()
        with under_load(server) as failures:
            server.signal(signal.SIGHUP)
            wait_for(lambda: not old & server.worker_pids(), "the old workers' end")  # noqa: B023
            server.wait_ready()
        if name == "hermes":
            assert failures == []
    for _ in range(50):
        server.get("/pid")
    assert not server.lines("hermes: error")


def test_ttin_and_ttou(start):
    server = start(workers=2)
    with under_load(server) as failures:
        for wanted, number in [
            (3, signal.SIGTTIN),
            (4, signal.SIGTTIN),
            (3, signal.SIGTTOU),
            (2, signal.SIGTTOU),
            (1, signal.SIGTTOU),
            (2, signal.SIGTTIN),
        ]:
            server.signal(number)
            wait_for(lambda: len(server.worker_pids()) == wanted, f"{wanted} workers")  # noqa: B023
            server.wait_ready(wanted)
    assert failures == []


def test_term_lets_requests_finish_and_refuses_new_ones(start):
    server = start()
    with server.connect() as client:
        client.send("/sleep?1.5")
        wait_for(lambda: sum(r["requests"] for r in server.rows()) > 1, "the request")
        server.signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                server.get("/pid")
            except OSError as error:
                return isinstance(error, ConnectionRefusedError)
            return False

        wait_for(refused, "refusal")
        assert client.receive()[0] == 200
    assert server.wait_ended() == 0
    assert not server.lines("Traceback")


def test_quit_ends_at_once(start):
    server = start()
    server.signal(signal.SIGQUIT)
    assert server.wait_ended() == 0
    assert not server.lines("hermes: error")


def new_master(pidfile: Path) -> psutil.Process:
    """Return the arbiter that USR2 has brought up."""
    file = pidfile.with_name(pidfile.name + ".2")

    def found() -> psutil.Process | None:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            return psutil.Process(int(file.read_text()))
        return None

    process: psutil.Process = wait_for(found, "the new master")
    return process


@pytest.mark.parametrize("mode", ["kernel dispatch", "shared mode"])
@pytest.mark.ebpf
def test_usr2_hands_the_port_over(start, tmp_path, mode):
    pidfile = tmp_path / "pid"
    server = start("--pid", str(pidfile))
    before = len(server.lines(f"hermes: {mode}"))
    conf = server.folder / "gunicorn.conf.py"
    conf.write_text(conf.read_text() + f"hermes_mode = {mode.split()[0]!r}\n")
    old = server.worker_pids()
    with under_load(server) as failures:
        server.signal(signal.SIGUSR2)
        master = new_master(pidfile)
        wait_for(lambda: len(server.lines(f"hermes: {mode}")) > before, "the new dispatch")
        wait_for(lambda: len(master.children()) == 2, "the new workers")
        server.signal(signal.SIGTERM)
        assert server.wait_ended() == 0
        new = {child.pid for child in master.children()}
        wait_for(lambda: int(server.get("/pid")) in new, "an answer of the new workers")
    assert failures == []
    assert not old & {int(server.get("/pid")) for _ in range(20)}
    assert not server.lines("hermes: no kernel dispatch")
    rows = server.table()["rows"]
    assert (sum(row["dispatched"] for row in rows[1:]) >= 20) == (mode == "kernel dispatch")


@pytest.mark.ebpf
def test_usr2_loses_nothing_that_waits_for_a_worker_that_is_gone(start, tmp_path):
    pidfile = tmp_path / "pid"
    server = start("--pid", str(pidfile), workers=1)
    (old,) = (psutil.Process(pid) for pid in server.worker_pids())
    old.suspend()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        for client in clients:
            client.send("/pid")
        server.signal(signal.SIGUSR2)
        master = new_master(pidfile)
        wait_for(lambda: len(server.lines("hermes: kernel dispatch")) == 2, "the new dispatch")
        server.signal(signal.SIGTERM)
        old.kill()
        assert server.wait_ended() == 0
        # Nobody has that worker's listener open any more.
        (new,) = master.children()
        assert {client.receive() for client in clients} == {(200, str(new.pid).encode())}


@pytest.mark.parametrize("when", ["while it boots", "when it serves"])
def test_usr2_can_be_taken_back(start, tmp_path, when):
    pidfile = tmp_path / "pid"
    server = start("--pid", str(pidfile))
    old = server.worker_pids()
    with under_load(server) as failures:
        server.signal(signal.SIGUSR2)
        master = new_master(pidfile)
        wait_for(lambda: len(master.children()) == 2, "the new workers")
        if when == "when it serves":
            new = {child.pid for child in master.children()}
            wait_for(lambda: int(server.get("/pid")) in new, "an answer of the new workers")
        master.terminate()
        wait_for(
            lambda: not master.is_running() or master.status() == psutil.STATUS_ZOMBIE,
            "the new master's end",
            GONE_WITHIN,
        )
        assert server.wait_ready().process.poll() is None
    assert failures == []
    assert {int(server.get("/pid")) for _ in range(20)} <= old
    assert not server.lines("SIGKILL")


def kernel_objects(pid: int) -> set[tuple[str, str]]:
    """Return kind and id of the programs and maps that a process has open."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return {found for text in texts for found in re.findall(r"(prog|map)_id:\s+(\d+)", text)}


def exists(kind: str, number: str) -> bool:
    """Say whether the kernel has it still."""
    show = subprocess.run(["bpftool", kind, "show", "id", number], capture_output=True, check=False)
    return show.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.ebpf
@pytest.mark.bpftool
def test_an_arbiter_that_is_gone_leaves_nothing_behind(start, number):
    server = start()
    workers, objects = server.worker_pids(), kernel_objects(server.process.pid)
    assert {kind for kind, _ in objects} == {"prog", "map"}
    assert all(exists(*each) for each in objects)
    server.signal(number)
    server.process.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, workers)), "the workers' end")
    wait_for(lambda: not any(exists(*each) for each in objects), "the end of what they used")
    again = start(bind=[f"127.0.0.1:{server.port}"], port=server.port)
    assert again.lines("hermes: kernel dispatch")

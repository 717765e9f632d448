"""What can be seen and done from outside: hermesctl, the statistics, the monitor's process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from gunicorn_server import GUNICORN, HAS_CONTROL_SOCKET, as_nobody, free_port, listens, wait_for
from prometheus_client.parser import text_string_to_metric_families

from hermes_gunicorn.monitor import control
from hermes_gunicorn.monitor.channel import NAMES

HERMESCTL = GUNICORN.with_name("hermesctl")


def ctl(server, *arguments: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run hermesctl for this server."""
    chosen = ["--server", str(server.process.pid)] if server else []
    return subprocess.run(
        [*(prefix or []), str(HERMESCTL), arguments[0], *chosen, *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def status(server) -> dict[str, Any]:
    """Return what hermesctl says about the server."""
    run = ctl(server, "status", "--json")
    assert run.returncode in (0, 1), run.stderr
    (found,) = json.loads(run.stdout)
    return found


def socket_name(server) -> bytes:
    """Return the name of the server's control socket."""
    (name,) = [each.name for each in control.servers() if each.pid == server.process.pid]
    return name


def monitors(server) -> list[psutil.Process]:
    """Return the monitor's processes: those of the server's session that are none of gunicorn's."""
    return [
        process
        for process in psutil.process_iter(["name"])
        if process.info["name"] == "hermes-monitor" and os.getsid(process.pid) == server.process.pid
    ]


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.ebpf), "shared"])
def server(request, start):
    """A server, in both modes."""
    return start("--hermes-mode", request.param, "--keep-alive", "30", workers=3)


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.ebpf), "shared"])
def same_server(request, share):
    """The same for tests that leave it as it was."""
    return share("--hermes-mode", request.param, "--keep-alive", "30", workers=3)


def test_a_monitor_is_there_when_asked_for_and_gone_with_the_arbiter(server):
    assert monitors(server) == []
    seen = status(server)
    assert {worker["pid"] for worker in seen["workers"]} == server.worker_pids()
    assert seen["healthy"]
    (process,) = monitors(server)
    server.process.kill()
    wait_for(lambda: not process.is_running(), "the monitor's end")


def test_a_killed_monitor_harms_nobody_and_the_next_question_starts_another(server):
    status(server)
    (process,) = monitors(server)
    process.kill()
    process.wait()
    assert int(server.get("/pid")) in server.worker_pids()
    assert status(server)["healthy"]
    assert monitors(server) != [process]


def test_a_hang_is_seen_while_it_lasts_and_told_afterwards(server):
    def hangs() -> list[float]:
        lines = ctl(server, "events", "--json").stdout.splitlines()
        return [each["seconds"] for each in map(json.loads, lines) if each["kind"] == "hang"]

    began = time.monotonic()
    with server.connect() as client:
        client.send("/hold?end")
        wait_for(lambda: server.held("end"), "the block")
        wait_for(lambda: not server.status()["healthy"], "a word about it")
        run = ctl(server, "status")
        assert run.returncode == 1
        assert "1 of 3 workers hangs" in run.stdout
        assert "hung" in ctl(server, "top", "--once").stdout
        assert "hung: busy for" in ctl(server, "explain").stdout
        (so_far,) = hangs()
        assert so_far > 0
        server.release("end")
        client.receive()
        lasted = time.monotonic() - began
    wait_for(lambda: server.status()["healthy"], "health")
    assert ctl(server, "status").returncode == 0
    (seconds,) = hangs()
    assert so_far <= seconds <= lasted


def test_a_table_full_of_nonsense_can_be_looked_at(server):
    status(server)  # the monitor sees what happens from here on
    for command in ("status", "top", "explain", "events"):
        for _ in range(20):
            server.get("/scramble")  # each time, as the arbiter restores what it decided
        run = ctl(server, command)
        assert run.returncode in (0, 1), run.stderr
        assert run.stdout


@pytest.mark.root
def test_another_user_is_told_nothing(same_server):
    server = same_server
    other = as_nobody(uid=65533)  # some other test's server may belong to nobody
    run = ctl(None, "status", prefix=other)
    assert run.returncode == 2
    assert "belong to other users" in run.stderr
    # Nor by asking the socket itself.
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(5);"
        f"s.connect({socket_name(server)!r});"
        's.sendall(b\'{"do": "status"}\\n\'); print(s.recv(9))'
    )
    status(server)  # starts the monitor
    run = subprocess.run(
        [*other, sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout == "b''\n" or "ConnectionReset" in run.stderr or "BrokenPipe" in run.stderr


@pytest.mark.root
def test_others_cannot_keep_the_owner_from_asking(same_server):
    server = same_server
    code = (
        "import socket, time; held = []\n"
        "for _ in range(40):\n"
        "    s = socket.socket(socket.AF_UNIX); s.setblocking(False)\n"
        f"    s.connect_ex({socket_name(server)!r}); held.append(s)\n"
        "print(flush=True); time.sleep(60)"
    )
    command = [*as_nobody(), sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        assert status(server)["healthy"]
        other.kill()


def test_nobody_can_answer_for_a_server():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{NAMES}{os.getppid()}/0123")
        sock.listen()
        run = subprocess.run(
            [str(HERMESCTL), "status", "--server", str(os.getppid())],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr == f"there is no server with pid {os.getppid()}\n"


@pytest.mark.ebpf
@pytest.mark.root
def test_the_servers_own_user_may_ask(launch):
    server = launch(prefix=as_nobody("+bpf")).wait_ready()
    run = ctl(server, "status", prefix=as_nobody())
    assert run.returncode == 0, run.stderr


def test_settings_of_a_running_server(server):
    assert ctl(server, "set", "threshold", "0.5").returncode == 0
    assert ctl(server, "set", "policy", "cascade").returncode == 0
    assert int(server.get("/threshold")) == 500_000_000
    seen = status(server)
    assert (seen["policy"], seen["threshold"]) == ("cascade", 0.5)
    for what, value in (("threshold", "-1"), ("threshold", "x"), ("policy", "best")):
        run = ctl(server, "set", what, "--", value)
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 1
        assert value in run.stderr


def test_a_drained_worker_gets_nothing_new_but_keeps_what_it_has(server):
    server.tune(0)  # on a busy machine all others may look hung, and then it helps
    (first, *_) = status(server)["workers"]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(12)]
        kept = [client for client in clients if int(client.get("/pid")) == first["pid"]]
        assert kept
        assert ctl(server, "drain", str(first["slot"])).returncode == 0
        assert first["pid"] not in {int(server.get("/pid")) for _ in range(60)}
        assert all(int(client.get("/pid")) == first["pid"] for client in kept)
    assert "drained" in ctl(server, "explain").stdout
    assert ctl(server, "undrain", str(first["slot"])).returncode == 0
    wait_for(lambda: int(server.get("/pid")) == first["pid"], "its turn")
    assert ctl(server, "drain", "99").returncode == 2


@pytest.mark.timing
@pytest.mark.parametrize("worker_class", ["hermes", "hermes_sync"])
def test_a_drained_worker_rests(start, worker_class):
    server = start(worker_class=worker_class, workers=2)
    (first, *_) = status(server)["workers"]
    assert ctl(server, "drain", str(first["slot"])).returncode == 0

    def wanted_a_core() -> float:
        """Return for how many seconds it had one or waited for one."""
        tasks = Path(f"/proc/{first['pid']}/task").glob("*/schedstat")
        return sum(sum(map(int, task.read_text().split()[:2])) for task in tasks) / 1e9

    before, began = wanted_a_core(), time.monotonic()
    time.sleep(1)
    # All the time, if it span, however many others want the cores.
    assert wanted_a_core() - before < (time.monotonic() - began) / 4


def test_explain_agrees_with_what_happens(start):
    server = start("--keep-alive", "30", workers=3)
    assert ctl(server, "explain").stdout.count("would be chosen") == 3
    with server.connect() as client:
        pid = int(client.get("/pid"))
        lines = ctl(server, "explain").stdout.splitlines()
    (slot,) = [w["slot"] for w in status(server)["workers"] if w["pid"] == pid]
    (line,) = [line for line in lines if f"slot {slot}:" in line]
    assert "chosen" not in line
    assert "1 connections" in line


@pytest.mark.netns
def test_without_a_server_there_is_a_clear_word():
    run = subprocess.run(
        ["unshare", "-n", str(HERMESCTL), "status"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("no server found")


# The statistics.


def fetch(where: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Ask the statistics; return status, content type and body."""
    request = urllib.request.Request(f"http://{where}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, "", ""


@pytest.fixture
def stats(start) -> Any:
    """A server with statistics, and where they are."""
    port = free_port()
    where = f"127.0.0.1:{port}"
    server = start("--hermes-stats", where, workers=2)
    wait_for(lambda: listens(port), "the statistics")
    return server, where


def test_the_statistics_answer_while_all_workers_hang(stats):
    server, where = stats
    blockers = []
    for number in range(2):  # one after the other, each to a worker that does not block
        blockers.append(server.connect())
        blockers[-1].send("/hold?end")
        wait_for(lambda n=number: len(server.held("end")) > n, f"block {number}")
    wait_for(lambda: "all 2 workers hang" in fetch(where, "/stats.json")[2], "a word about it")
    metrics = {
        (sample.name, sample.labels.get("slot")): sample.value
        for family in text_string_to_metric_families(fetch(where, "/metrics")[2])
        for sample in family.samples
    }
    assert metrics["hermes_worker_hung", "1"] == metrics["hermes_worker_hung", "2"] == 1
    assert metrics["hermes_worker_requests", "1"] == 1
    server.release("end")
    for blocker in blockers:
        assert blocker.receive()[0] == 200
        blocker.close()


def test_the_statistics_are_read_only_and_well_formed(stats):
    _, where = stats
    assert fetch(where, "/")[:2] == (200, "text/html; charset=utf-8")
    assert json.loads(fetch(where, "/stats.json")[2])["healthy"]
    kind = fetch(where, "/metrics", Accept="application/openmetrics-text; version=1.0.0")[1]
    assert kind.startswith("application/openmetrics-text")
    assert fetch(where, "/metrics")[1].startswith("text/plain")
    assert fetch(where, "/nothing")[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert fetch(where, "/stats.json", method)[0] == 405


def test_slow_and_malformed_clients_are_survived(stats):
    server, where = stats
    host, _, port = where.rpartition(":")
    with contextlib.ExitStack() as stack:
        for said in (b"", b"GET", b"\0" * 5000, b"GET / HTTP/9.9\r\n\r\n", b"X" * 70000):
            client = stack.enter_context(socket.create_connection((host, int(port)), 5))
            with contextlib.suppress(OSError):
                client.sendall(said)
        assert fetch(where, "/stats.json")[0] == 200
    # More of the slow ones than are served at once: others wait, for some seconds.
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        assert fetch(where, "/stats.json")[0] == 200
    assert int(server.get("/pid")) in server.worker_pids()


def test_statistics_that_cannot_be_served_do_not_stop_a_server(start):
    server = start("--hermes-stats", "unix:/nowhere/else")
    wait_for(lambda: server.lines("no statistics on unix:/nowhere/else"), "a word")
    assert int(server.get("/pid")) in server.worker_pids()


def test_a_reload_moves_the_statistics(start, tmp_path):
    path, port = tmp_path / "stats", free_port()
    conf = f"hermes_stats = 'unix:{path}'\n"
    server = start(conf=conf)

    def over_unix() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /stats.json HTTP/1.0\r\n\r\n")
            return sock.makefile("rb").read()

    wait_for(path.exists, "the socket")
    assert b'"healthy": true' in over_unix()
    file = server.folder / "gunicorn.conf.py"
    file.write_text(file.read_text().replace(conf, f"hermes_stats = '{port}'\n"))
    old = server.worker_pids()
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.worker_pids(), "new workers")
    wait_for(lambda: listens(port), "the new address")


# gunicorn's own channels.


@pytest.mark.ebpf
def test_statsd_gets_ours_beside_gunicorns_own(start):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        sink.settimeout(60)
        heard: list[str] = []

        def hears(metric: str) -> bool:
            heard.append(sink.recv(4096).decode())
            return any(line.startswith(metric) for line in heard)

        to = f"127.0.0.1:{sink.getsockname()[1]}"
        server = start("--statsd-host", to, "--statsd-prefix", "shop", workers=2)
        wait_for(lambda: hears("shop.hermes.workers.hung:0|g"), "a gauge")
        with server.connect() as client:
            client.send("/hold?end")
            wait_for(lambda: hears("shop.hermes.workers.hung:1|g"), "the hang")
            wait_for(lambda: hears("shop.hermes.requests:1|g"), "its request")
            server.release("end")
            assert client.receive()[0] == 200
        heard.clear()
        wait_for(lambda: hears("shop.hermes.workers.hung:0|g"), "its end")
        server.get("/pid")
        wait_for(lambda: hears("shop.hermes.connections.dispatched:"), "a counter")
        wait_for(lambda: hears("shop.gunicorn.requests:1|c"), "gunicorn's own")


@pytest.mark.skipif(not HAS_CONTROL_SOCKET, reason="this gunicorn has no gunicornc")
def test_gunicornc_still_tells_the_truth(start):
    server = start(workers=3, control=True)

    def show(what: str) -> dict[str, Any]:
        run = subprocess.run(
            [GUNICORN.with_name("gunicornc"), "-s", server.control, "-c", f"show {what}", "-j"],
            capture_output=True,
            check=True,
            timeout=30,
        )
        answer: dict[str, Any] = json.loads(run.stdout)
        return answer

    assert {worker["pid"] for worker in show("workers")["workers"]} == server.worker_pids()
    (listener,) = show("listeners")["listeners"]
    assert listener["address"] == f"http://127.0.0.1:{server.port}"
    stats = show("stats")
    assert (stats["pid"], stats["workers_current"]) == (server.process.pid, 3)


def test_questions_do_not_disturb_a_server_under_load(same_server):
    server = same_server
    stop = threading.Event()
    failures: list[str] = []

    def load() -> None:
        while not stop.is_set():
            try:
                server.get("/pid")
            except (OSError, AssertionError) as error:
                failures.append(repr(error))

    thread = threading.Thread(target=load)
    thread.start()
    for _ in range(5):
        assert status(server)["workers"]
    stop.set()
    thread.join()
    assert failures == []


# The doctor.


def doctor(*prefix: str) -> str:
    """Return what the doctor says."""
    run = subprocess.run(
        [*prefix, str(HERMESCTL), "doctor"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.ebpf
def test_the_doctor_tries_the_real_thing():
    said = doctor()
    assert "ok  kernel dispatch: tried, works" in said
    assert "hermes_mode = auto chooses: kernel" in said


@pytest.mark.ebpf
@pytest.mark.root
def test_the_doctor_says_what_a_user_without_privilege_needs():
    said = doctor(*as_nobody())
    assert "no  kernel dispatch: no permission to use eBPF" in said
    assert "hermes_mode = auto chooses: shared" in said
    assert "AmbientCapabilities=CAP_BPF" in said
    assert "auto chooses: kernel" in doctor(*as_nobody("+bpf"))


def test_why_a_unix_socket_is_shared_is_told(start):
    (bind,) = status(start(unix=True))["binds"]
    assert bind["mode"] == "shared"
    assert "TCP only" in bind["reason"]
    assert "Unix sockets: always in shared mode" in doctor()


@pytest.mark.ebpf
@pytest.mark.netns
@pytest.mark.bcc
def test_the_doctor_sees_that_bcc_is_absent():
    bcc = Path("/usr/lib/python3/dist-packages/bcc")
    assert bcc.is_dir(), "python3-bpfcc is to be installed for the tests"
    hide = f'mount -t tmpfs none {bcc} && exec "$@"'
    said = doctor("unshare", "--mount", "sh", "-c", hide, "sh")
    assert "--  loader bcc:" in said
    assert "auto chooses: kernel" in said

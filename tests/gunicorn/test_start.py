"""How the server is named, configured and started, and what it says."""

from __future__ import annotations

import os
import subprocess

import pytest
from gunicorn_server import (
    GUNICORN,
    Client,
    as_nobody,
    free_port,
    under_load,
    unprivileged,
    wait_for,
)

NO_HOOK = {"HERMES_GUNICORN_HOOK": "0"}
FORMS = ["hermes", "hermes_gunicorn.HermesWorker", "egg:hermes-gunicorn#hermes"]


def one_line_error(server, *words: str) -> str:
    """Wait for the server to refuse to start and return its one line of error."""
    assert server.wait_ended() == 1, server.log
    errors = server.lines("Error: ")
    assert len(errors) == 1, server.log
    assert all(word in errors[0] for word in words), errors[0]
    assert not server.lines("Booting worker")
    assert not server.lines("Traceback")
    return errors[0]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("place", ["flag", "file"])
@pytest.mark.ebpf
def test_each_form_of_the_name(start, name, place):
    if place == "flag":
        server = start(worker_class=name)
    else:
        server = start(worker_class=None, conf=f"worker_class = {name!r}\n")
    (line,) = server.lines("hermes: kernel dispatch")
    assert "INFO" in line
    for word in (f"127.0.0.1:{server.port}", "loader object", "policy least_loaded", "2 workers"):
        assert word in line
    assert "255 slots" in line


@pytest.mark.parametrize("name", FORMS[1:])
@pytest.mark.ebpf
def test_two_forms_need_no_hook(start, name):
    server = start(worker_class=name, environ=NO_HOOK)
    assert server.lines("hermes: kernel dispatch")


@pytest.mark.ebpf
def test_without_the_hook_an_import_in_the_file_does(start):
    conf = "import hermes_gunicorn\nworker_class = 'hermes'\nhermes_hang_threshold = 0.125\n"
    server = start(worker_class=None, conf=conf, environ=NO_HOOK)
    assert server.lines("hermes: kernel dispatch", "hang threshold 0.125 s")


def test_a_bad_value_is_found_without_the_hook_as_well(launch):
    conf = "import hermes_gunicorn\nworker_class = 'hermes'\nhermes_hang_threshold = -1\n"
    server = launch(worker_class=None, conf=conf, environ=NO_HOOK)
    one_line_error(server, "hermes_hang_threshold must be 0 (off) or 0.001 to 3600 seconds")


@pytest.mark.ebpf
@pytest.mark.bcc
def test_flags_win_over_the_file(start):
    conf = "hermes_hang_threshold = 0.5\nhermes_loader = 'bcc'\n"
    server = start("--hermes-hang-threshold", "0.25", conf=conf)
    assert server.lines("hermes: kernel dispatch", "loader bcc", "hang threshold 0.25 s")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("loader", "llvm", "must be one of auto, object, bcc"),
        ("hang_threshold", "soon", "must be 0 (off) or 0.001 to 3600 seconds"),
        ("hang_threshold", "-1", "must be 0 (off) or 0.001 to 3600 seconds"),
        ("stats", "localhost", "must be a port, host:port or unix:/path"),
        ("stats", ":80", "must be a port, host:port or unix:/path"),
    ],
)
@pytest.mark.parametrize("place", ["flag", "file"])
def test_a_bad_value_is_one_clear_line(launch, name, value, says, place):
    if place == "flag":
        server = launch(f"--hermes-{name.replace('_', '-')}={value}")
    else:
        server = launch(conf=f"hermes_{name} = {value!r}\n")
    one_line_error(server, f"hermes_{name}", says, repr(value))


def test_reuse_port_is_refused(launch):
    one_line_error(launch("--reuse-port"), "reuse_port", "remove")


def test_the_settings_are_shown(tmp_path):
    def output(*arguments: str) -> str:
        return subprocess.run(
            [GUNICORN, *arguments, "os:getcwd"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout

    shown = output("--print-config", "-k", "hermes", "--hermes-strict")
    assert "hermes_strict" in shown
    assert "hermes_loader" in shown
    assert "hermes_hang_threshold" in shown
    text = output("--help")
    for flag in ("--hermes-loader", "--hermes-strict", "--hermes-hang-threshold"):
        assert flag in text


@pytest.mark.ebpf
def test_all_tcp_addresses_are_dispatched_to(launch):
    ports = [free_port(), free_port("::1"), free_port()]
    addresses = [f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}", f"127.0.0.1:{ports[2]}"]
    server = launch("--hermes-strict", bind=addresses)
    server.port = ports[0]
    server.wait_ready()
    (line,) = server.lines("hermes: kernel dispatch on")
    assert all(f"http://{address}" in line for address in addresses)
    before = sum(row["dispatched"] for row in server.table()["rows"])
    for host, port in zip(("127.0.0.1", "::1", "127.0.0.1"), ports, strict=True):
        for _ in range(10):
            with Client((host, port)) as client:
                client.get("/pid")
    assert sum(row["dispatched"] for row in server.table()["rows"]) - before == 31


@pytest.mark.ebpf
def test_a_unix_socket_is_served_in_shared_mode(launch, tmp_path):
    path = tmp_path / "sock"
    port = free_port()
    server = launch(bind=[f"127.0.0.1:{port}", f"unix:{path}"])
    server.port = port
    server.wait_ready()
    # Nothing is wrong with it, so it is no warning.
    assert server.lines("INFO", f"hermes: shared mode on unix:{path} (policy least_loaded")
    assert not server.lines("WARNING", "hermes:")
    assert server.lines("INFO", f"hermes: kernel dispatch on http://127.0.0.1:{port} (")
    for _ in range(10):
        with Client(str(path)) as client:
            client.get("/pid")
        server.get("/pid")


def test_an_abstract_unix_socket_is_served(launch, tmp_path):
    name = f"\\0{tmp_path.name}-{os.getpid()}"
    conf = f"""
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind("{name}")
bind = f"fd://{{listener.fileno()}}"
"""
    server = launch(bind=[], conf=conf)
    server.unix = "\0" + name[2:]
    server.wait_ready()
    answered = set()
    with under_load(server) as failures:
        for _ in range(100):
            answered.add(int(server.get("/pid")))
        assert answered <= server.worker_pids()
        wait_for(lambda: answered.add(int(server.get("/pid"))) or len(answered) == 2, "both")
    assert not failures


def test_shared_mode_on_demand(start):
    server = start("--hermes-mode", "shared")
    assert server.lines("INFO", "hermes: shared mode on http://", "hermes_mode is shared")
    assert not server.lines("WARNING", "hermes:")
    assert not server.lines("kernel dispatch on")
    assert all(row["dispatched"] == 0 for row in server.table()["rows"])


@pytest.mark.ebpf
def test_kernel_mode_warns_where_it_is_not_to_be_had(launch, tmp_path):
    server = launch("--hermes-mode", "kernel", unix=True)
    server.wait_ready()
    (warning,) = server.lines("WARNING", "hermes: shared mode on unix:")
    assert "bind a TCP address" in warning


def test_strict_refuses_a_unix_socket_and_leaves_nothing(launch, tmp_path):
    path, pidfile = tmp_path / "sock", tmp_path / "pid"
    server = launch("--hermes-strict", "--pid", str(pidfile), bind=[f"unix:{path}"])
    one_line_error(server, "no kernel dispatch on unix:", "hermes_strict")
    assert not path.exists()
    assert not pidfile.exists()


def test_without_privilege_it_starts_and_says_what_would_help(start):
    server = start(prefix=unprivileged())
    (warning,) = server.lines("WARNING", "hermes:")
    assert "no permission to use eBPF" in warning
    assert "CAP_BPF" in warning
    assert not server.lines("Traceback")
    assert {server.get("/pid") for _ in range(10)}


def test_strict_refuses_to_start_without_privilege(launch):
    one_line_error(launch("--hermes-strict", prefix=unprivileged()), "CAP_BPF", "hermes_strict")


@pytest.mark.ebpf
@pytest.mark.root
def test_cap_bpf_is_all_it_takes(start, loader):
    server = start("--hermes-strict", *loader, prefix=as_nobody("+bpf"))
    assert server.lines("hermes: kernel dispatch")


@pytest.mark.ebpf
@pytest.mark.root
def test_workers_may_run_as_another_user(start):
    # Imported by the arbiter: the interpreter may lie where nobody can read it.
    conf = "import hashlib, random, json\n"
    server = start("--user", "65534", "--group", "65534", conf=conf)
    assert server.lines("hermes: kernel dispatch")
    assert {os.stat(f"/proc/{int(server.get('/pid'))}").st_uid} == {65534}


def test_a_second_server_on_the_port_is_refused(start, launch):
    first = start()
    second = launch(bind=[f"127.0.0.1:{first.port}"])
    assert second.wait_ended() == 1
    assert second.lines("Connection in use")
    first.get("/pid")

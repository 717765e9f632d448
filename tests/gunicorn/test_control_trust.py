"""hermesctl among people who wish it ill, and servers that share a network namespace.

Each server has a network namespace of its own, and so have its control sockets.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gunicorn_server import GUNICORN, Server, as_nobody, wait_for

HERMESCTL = str(GUNICORN.with_name("hermesctl"))
ATTACKER = as_nobody(uid=65531)
ATTACK = """
import os, socket, sys, time

def serve(name, answer):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("\\0hermes-gunicorn/" + (name or str(os.getpid())))
    sock.listen()
    while True:
        try:
            connection, _ = sock.accept()
            if connection.recv(1 << 16):
                answer(connection)
            connection.close()
        except OSError:
            pass

def say(text):
    return lambda connection: connection.sendall(text)

def endless(connection):
    while True:
        connection.sendall(b'"' + bytes(1 << 20).replace(b"\\0", b" "))

def drip(connection):
    while True:
        connection.sendall(b" ")
        time.sleep(0.5)

def silence(connection):
    time.sleep(600)
"""


def inside(server: Server) -> list[str]:
    """Return the command prefix for the server's network namespace."""
    return ["nsenter", "-t", str(server.process.pid), "-n"]


def ctl(
    server: Server, *arguments: str, prefix: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run hermesctl in the server's network namespace, with a bound on its memory."""
    limit = ["prlimit", "--as=2000000000"]
    return subprocess.run(
        [*inside(server), *(prefix or []), *limit, HERMESCTL, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def server(launch: Any) -> Server:
    """A server of root's."""
    server: Server = launch("--name", "shop", prefix=["unshare", "-n"], unix=True, workers=1)
    return server.wait_ready()


@pytest.fixture
def attack() -> Iterator[Callable[..., None]]:
    """Have another user's processes listen as if they were servers: one for each answer."""
    running: list[subprocess.Popen[bytes]] = []

    def start(server: Server, *answers: str, name: str = "") -> None:
        code = [ATTACK, "answers = [" + ", ".join(answers) + "]"]
        code += ["for number, answer in enumerate(answers, 1):"]
        code += ["    if number == len(answers) or not os.fork():"]
        code += ["        print('.', end='', flush=True)"]
        code += [f"        serve({name!r}, answer)"]
        command = [*inside(server), *ATTACKER, sys.executable, "-c", "\n".join(code)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        running.append(process)
        assert process.stdout is not None
        for _ in answers:
            assert process.stdout.read(1) == b"."
        wait_for(lambda: sockets(server) > len(answers), "the attackers' sockets")

    yield start
    for process in running:
        os.killpg(process.pid, signal.SIGKILL)
        with process:
            process.wait()


def sockets(server: Server) -> int:
    """Count the sockets that are called like a server's."""
    listed = Path(f"/proc/{server.process.pid}/net/unix").read_text()
    return len({line for line in listed.splitlines() if "@hermes-gunicorn/" in line})


def own(server: Server, run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what was told of the server itself."""
    assert "Traceback" not in run.stderr
    (found,) = [each for each in json.loads(run.stdout) if each["arbiter"] == server.process.pid]
    return dict(found)


DEEP = """say(b'{"ok":' + b"[" * 200000 + b"\\n")"""
MALFORMED = {
    "nothing": 'say(b"")',
    "a part": """say(b'{"ok": {"arbiter"')""",
    "no object": 'say(b"[1]\\n")',
    "no answer": 'say(b"{}\\n")',
    "no status": """say(b'{"ok": {}}\\n')""",
    "a number": """say(b'{"ok": 5}\\n')""",
    "no text": """say(b'{"error": {"x": 1}}\\n')""",
    "deep": DEEP,
    "bytes": 'say(bytes(range(256)) + b"\\n")',
    "digits": """say(b'{"ok": ' + b"9" * 9999 + b"}\\n")""",
}


def test_malformed_answers_are_told_of_and_hide_no_server(server, attack):
    attack(server, *MALFORMED.values())
    run = ctl(server, "status", "--json")
    assert own(server, run)["healthy"]
    assert run.stderr.count("(user 65531)") == len(MALFORMED), run.stderr
    assert run.returncode == 2
    assert ctl(server, "status", "--server", str(server.process.pid)).returncode == 0


NO_STATUS = {
    "workers": [{"slot": 1}],
    "binds": "all",
    "threshold": "soon",
    "at": float("inf"),
    "theta": float("nan"),
    "problems": [1],
    "name": None,
    "rows": -1,
}


def test_a_status_that_is_none_hides_no_server(server, attack):
    told = own(server, ctl(server, "status", "--json"))
    answers = [
        json.dumps({"ok": told | {key: value}}).encode() + b"\n" for key, value in NO_STATUS.items()
    ]
    attack(server, *(f"say({answer!r})" for answer in answers))
    for command in (["status"], ["top", "--once"]):
        run = ctl(server, *command)
        assert "shop" in run.stdout, run.stderr
        for key in NO_STATUS:
            assert f"(user 65531): malformed answer ({key}" in run.stderr


def test_who_never_ends_holds_nothing_up(server, attack):
    attack(server, "drip", "silence", "endless")
    run = ctl(server, "status", "--json")
    assert own(server, run)["healthy"]
    assert run.stderr.count("does not answer") == 3, run.stderr


def test_nothing_that_others_say_reaches_the_terminal_but_text(server, attack):
    told = own(server, ctl(server, "status", "--json"))
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\ud800[red]:smile:"
    worker = told["workers"][0] | {"state": nasty}
    bind = told["binds"][0] | {"address": "http://[fd00::5]:80", "mode": nasty}
    told |= {"name": nasty, "problems": [nasty], "healthy": False, "policy": nasty}
    told |= {"workers": [worker], "binds": [bind]}
    status = json.dumps({"ok": told}).encode() + b"\n"
    refusal = json.dumps({"error": nasty}).encode() + b"\n"
    attack(server, f"say({status!r})", f"say({refusal!r})")
    for command in (["status"], ["top", "--once"]):
        run = ctl(server, *command)
        assert "shop" in run.stdout, run.stderr
        assert "of user 65531" in run.stdout
        assert "[red]:smile:" in run.stdout
        assert "[red]:smile:" in run.stderr
        said = run.stdout + run.stderr
        assert [char for char in said if not (char.isprintable() or char == "\n")] == []
    assert "http://[fd00::5]:80" in ctl(server, "top", "--once").stdout


def test_nobody_is_signalled_because_somebody_names_him(server, attack):
    code = (
        "import signal; signal.signal(signal.SIGURG, lambda *_: print('urged', flush=True))\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as victim,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(victim.terminate)
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        attack(server, "silence", name=str(victim.pid))
        assert own(server, ctl(server, "status", "--json"))["healthy"]
        run = ctl(server, "status", "--server", str(victim.pid))
        victim.terminate()
        assert victim.stdout.read() == b""
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"there is no server with pid {victim.pid}\n"


def test_a_name_cannot_be_taken_in_advance(launch, attack):
    """With the process number alone it could: a server in a container is number 1."""
    holder = launch(prefix=["unshare", "-n"], unix=True, workers=1).wait_ready()
    attack(holder, "say(b'{}')", name="1")
    contained = in_a_container(launch, holder)
    status = own_of(holder, arbiter_of(contained))
    assert status["healthy"]


def in_a_container(launch: Any, holder: Server, *arguments: str) -> Server:
    """Start a server with a pid namespace of its own in another's network namespace."""
    pids = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    server: Server = launch(*arguments, prefix=[*inside(holder), *pids], unix=True, workers=1)
    return server.wait_ready()


def arbiter_of(contained: Server) -> int:
    """Return the number that its arbiter, number 1 in there, has out here."""
    (arbiter,) = psutil.Process(contained.process.pid).children()
    return int(arbiter.pid)


def own_of(holder: Server, pid: int) -> dict[str, Any]:
    """Return what hermesctl, out here, says of the server with that number."""
    run = ctl(holder, "status", "--json", "--server", str(pid))
    assert run.returncode == 0, run.stderr
    (status,) = json.loads(run.stdout)
    return dict(status)


def test_two_servers_may_both_be_process_one(launch):
    holder = launch(prefix=["unshare", "-n"], unix=True, workers=1).wait_ready()
    servers = {name: in_a_container(launch, holder, "--name", name) for name in ("one", "two")}
    arbiters = {name: arbiter_of(server) for name, server in servers.items()}
    # From outside, by the numbers that they have there.
    told = json.loads(ctl(holder, "status", "--json").stdout)
    assert [each["arbiter"] for each in told] == sorted([holder.process.pid, *arbiters.values()])
    for name, pid in arbiters.items():
        assert own_of(holder, pid)["name"] == name
        # In the container each is number 1, and the only one.
        enter = ["nsenter", "-t", str(pid), "-n", "-p", "-m"]
        for chosen in ([], ["--server", "1"]):
            run = subprocess.run(
                [*enter, HERMESCTL, "status", "--json", *chosen],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            (status,) = json.loads(run.stdout)
            assert (status["name"], status["arbiter"]) == (name, 1)
    for server in servers.values():
        assert not server.lines("no control socket")


# Refuses AF_UNIX, as systemd's RestrictAddressFamilies= does, and goes on.
WITHOUT_UNIX = """
import ctypes, os, struct, sys
number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
def step(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = (step(0x20, 0, 0, 0) + step(0x15, 0, 3, number) + step(0x20, 0, 0, 16)
    + step(0x15, 0, 1, 1) + step(0x06, 0, 0, 0x50000 | 97) + step(0x06, 0, 0, 0x7FFF0000))
held = ctypes.create_string_buffer(program)
class Program(ctypes.Structure): _fields_ = [("count", ctypes.c_ushort), ("at", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(6, ctypes.addressof(held))), 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="numbers differ")
def test_a_server_without_a_control_socket_says_so_and_serves(start):
    server = start(prefix=[sys.executable, "-c", WITHOUT_UNIX])
    (line,) = server.lines("no control socket")
    assert "WARNING" in line
    assert "RestrictAddressFamilies" in line
    assert int(server.get("/pid")) in server.worker_pids()

"""What the kernel refuses is explained by its cause, with the remedy for that."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from hermes_gunicorn.kernel import bpf

ERRNO, KILL_PROCESS, KILL_THREAD = 0x50000, 0x80000000, 0
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
BPF = bpf._SYSCALL_NUMBER[platform.machine()]
SOCKET = {"x86_64": 41}.get(platform.machine(), 198)

# What a server does, and what the doctor says, after something was done to the process.
ATTEMPT = """
import ctypes, errno, json, logging, os, resource, socket, struct, sys
from gunicorn.config import Config
from gunicorn.sock import TCPSocket
from hermes_gunicorn.cli import doctor
from hermes_gunicorn.kernel import refusals
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.table import KernelTable
from hermes_gunicorn.core.errors import Unsupported

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)

def listener(fd=None):
    sock = socket.socket(fileno=fd) if fd is not None else socket.socket()
    if fd is None:
        sock.bind(("127.0.0.1", 0))
    return TCPSocket(None, Config(), logging.getLogger(), fd=sock.detach())

def attempt(shared=None, kernel=None):
    try:
        KernelDispatcher(shared or listener(), kernel or KernelTable("object", 256))
    except Unsupported as error:
        return {"reason": error.reason, "remedy": error.remedy}
    return {"reason": "", "remedy": ""}

def ask_doctor():
    report = doctor.examine()
    (check,) = [each for each in report.checks if each.name == "kernel dispatch"]
    return {"reason": check.found, "remedy": check.remedy, "lines": report.lines}

def filter_call(number, action):
    instructions = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, action), (6, 0, 0, 0x7FFF0000))
    code = b"".join(struct.pack("HBBI", *each) for each in instructions)
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.prctl(22, 2, ctypes.addressof(program), 0, 0) == 0

"""
PRINT = "\nprint(json.dumps([attempt(), ask_doctor()]))"


def only(*capabilities: str, prefix: tuple[str, ...] = ("setpriv",)) -> list[str]:
    """Return the prefix that takes a program's other capabilities away."""
    wanted = ",".join(["-all", "+dac_read_search", *capabilities])
    return [*prefix, f"--inh-caps={wanted}", f"--ambient-caps={wanted}"]


def nobody(*capabilities: str) -> list[str]:
    """Return the prefix that makes a program run as user nobody."""
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    return only(*capabilities, prefix=user)


def run(script: str, *prefix: str) -> list[dict[str, str]]:
    """Run it after ``ATTEMPT`` and return what it prints."""
    ran = subprocess.run(
        [*prefix, sys.executable, "-c", ATTEMPT + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer: list[dict[str, str]] = json.loads(ran.stdout)
    return answer


@pytest.mark.parametrize(
    ("script", "prefix", "reason", "remedy", "line"),
    [
        (f"filter_call({BPF}, {ERRNO | EPERM})", [], "seccomp", "allow bpf(2)", "CAP_BPF"),
        (f"filter_call({BPF}, {ERRNO | EPERM})", nobody(), "seccomp", "CAP_BPF", "CAP_BPF"),
        (f"filter_call({BPF}, {ERRNO | ENOSYS})", [], "seccomp", "allow bpf(2)", "CAP_BPF"),
        (f"filter_call({BPF}, {KILL_PROCESS})", [], "seccomp", "SystemCallFilter=bpf", ""),
        (f"filter_call({BPF}, {KILL_THREAD})", [], "seccomp", "SystemCallFilter=bpf", ""),
        # A filter that has nothing to do with it.
        (f"filter_call(9999, {ERRNO | EPERM})", nobody(), "no permission", "CAP_BPF", "CAP_BPF"),
        ("", nobody(), "no permission to use eBPF (", "run it with CAP_BPF", "CAP_BPF"),
        ("", ["unshare", "--user", "--map-root-user"], "user namespace", "hostUsers: true", ""),
    ],
    ids=["EPERM", "EPERM, nobody", "ENOSYS", "killed", "thread", "other", "nobody", "namespace"],
)
def test_no_permission(script, prefix, reason, remedy, line):
    """In the log as with the doctor, who adds a line for a unit only where that helps."""
    log, doctor = run(script + PRINT, *prefix)
    assert reason in log["reason"]
    assert remedy in log["remedy"]
    assert "5.5" not in log["remedy"]
    assert (doctor["reason"], doctor["remedy"]) == (log["reason"], log["remedy"])
    assert any(line in text for _, text in doctor["lines"]) if line else not doctor["lines"]


FD_9 = "\nprint(json.dumps([attempt(listener(9))]))"
OPEN = "import os, socket, sys; sock = socket.socket(); sock.{set};"
OPEN += "sock.bind(('127.0.0.1', {port}));"
OPEN += "os.dup2(sock.fileno(), 9); os.execvp(sys.argv[1], sys.argv[1:])"
LIMIT = "resource.setrlimit(resource.RLIMIT_NOFILE, (%s, 4096))"
ONE = "shared, kernel = listener(), KernelTable('object', 256)\n"
TWO = "\nprint(json.dumps([attempt(shared, kernel)]))"
RESERVED = """
try:
    KernelDispatcher(shared, kernel).reserve(7, files=8)
except OSError as error:
    why = refusals.explain(error, shared.sock)
print(json.dumps([{"reason": why.reason, "remedy": why.remedy}]))
"""
IP = "import subprocess; ip = lambda *words: subprocess.run(['ip', *words], check=True)\n"


def opened(port: int, *then: str, set: str = "fileno()") -> list[str]:
    """Return the prefix that hands a listener on as fd 9."""
    return [sys.executable, "-c", OPEN.format(port=port, set=set), *then]


@pytest.mark.parametrize(
    ("script", "prefix", "reason", "remedy"),
    [
        pytest.param(
            ONE + "resource.setrlimit(resource.RLIMIT_NOFILE, (8, 4096))" + TWO,
            [],
            "as many files open as it may",
            "LimitNOFILE=",
            id="EMFILE",
        ),
        pytest.param(
            ONE + RESERVED,
            [],
            "files that gunicorn may still open are left to it",
            "LimitNOFILE=",
            id="files that are left",
        ),
        pytest.param(
            "",
            ["unshare", "--net", *nobody("+bpf", "+net_bind_service"), *opened(80, *only("+bpf"))],
            "no permission to bind a second listener to port 80",
            "CAP_NET_BIND_SERVICE",
            id="port 80",
        ),
        pytest.param(
            "",
            opened(0, *nobody("+bpf")),
            "it is owned by uid 0, gunicorn runs as uid 65534",
            "as the listener's user",
            id="owner",
        ),
        pytest.param(
            "",
            ["unshare", "--net", *opened(80, *nobody("+bpf"))],
            "it is owned by uid 0",  # a capability alone would not help
            "as the listener's user",
            id="owner of port 80",
        ),
        pytest.param(
            IP + "ip('addr', 'add', '192.0.2.9/32', 'dev', 'lo'); ip('link', 'set', 'lo', 'up')\n"
            "sock = socket.socket(); sock.bind(('192.0.2.9', 0))\n"
            "ip('addr', 'del', '192.0.2.9/32', 'dev', 'lo')\n"
            "print(json.dumps([attempt(listener(sock.detach()))]))",
            ["unshare", "--net"],
            "no interface has the address any more",
            "IP_FREEBIND",
            id="EADDRNOTAVAIL",
        ),
        pytest.param(
            ONE + "assert libc.unshare(0x40000000) == 0" + TWO,
            [],
            "another network namespace",
            "JoinsNamespaceOf=",
            id="network namespace",
        ),
        pytest.param(
            ONE + f"filter_call({SOCKET}, {ERRNO | EAFNOSUPPORT})" + TWO,
            [],
            "may not open a socket of the listener's family",
            "RestrictAddressFamilies=",
            id="EAFNOSUPPORT",
        ),
        pytest.param(
            "",
            [*nobody("+bpf", "+net_admin"), *opened(0, *only("+bpf"), set="setsockopt(0, 19, 1)")],
            "IP_TRANSPARENT",
            "CAP_NET_ADMIN",
            id="transparent",
        ),
    ],
)
def test_a_listener_that_no_other_can_stand_beside(script, prefix, reason, remedy):
    (log,) = run(script or FD_9, *prefix)
    assert reason in log["reason"]
    assert remedy in log["remedy"]
    assert "5.5" not in log["remedy"]


VERIFY = """
from hermes_gunicorn.kernel import refusals
from hermes_gunicorn.core.errors import BpfError
from hermes_gunicorn.kernel import bpf
from hermes_gunicorn.kernel.program import Program

def load(*code):
    program = Program("broken", b"".join(map(bytes.fromhex, code)), [], b"GPL", "test")
    try:
        bpf.load_program(program, {})
    except BpfError as error:
        why = refusals.explain(error)
        return {"reason": why.reason, "remedy": why.remedy}
    return {"reason": "", "remedy": ""}

# r1 is the context: *(u64 *)(r10 - 8) = r1; *(u32 *)(r10 - 8) = 0; return 1
spilled = load("7b1af8ff00000000", "620af8ff00000000", "b700000001000000", "9500000000000000")
nothing = load("9500000000000000")  # returns what was never set
print(json.dumps([spilled, nothing]))
"""


def test_the_verifier_asks_for_cap_perfmon_beside_cap_bpf():
    """What it says to Debian 12's kernel about our program, about one that this kernel refuses."""
    spilled, _ = run(VERIFY, *nobody("+bpf"))
    assert "attempt to corrupt spilled pointer on stack" in spilled["reason"]
    assert "CAP_PERFMON" in spilled["reason"]
    assert "AmbientCapabilities=CAP_BPF CAP_PERFMON" in spilled["remedy"]
    spilled, nothing = run(VERIFY, *nobody("+bpf", "+perfmon"))
    assert not spilled["reason"]
    assert "the verifier of this kernel refuses the program" in nothing["reason"]
    assert "R0 !read_ok" in nothing["reason"]
    assert "PERFMON" not in nothing["remedy"]

"""A server under a seccomp filter that ends who calls bpf(2), as systemd's does."""

from __future__ import annotations

import sys

import pytest
from gunicorn_server import free_port

from hermes_gunicorn.kernel import bpf

FILTERED = f"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
number = {bpf._SYSCALL_NUMBER!r}[os.uname().machine]
code = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x80000000), (6, 0, 0, 0x7FFF0000))
buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.addressof(program), 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
PREFIX = [sys.executable, "-c", FILTERED]


@pytest.mark.parametrize("name", ["sync", "hermes_sync"])
@pytest.mark.parametrize("patched", [False, True], ids=["", "monkey-patched"])
def test_it_serves_as_the_stock_class_does(start, name, patched):
    conf = "from gevent import monkey; monkey.patch_all()\n" if patched else ""
    server = start(worker_class=name, prefix=PREFIX, conf=conf)
    assert server.get("/pid")
    if name != "sync":
        (line,) = server.lines("WARNING", "hermes: shared mode on")
        assert "a seccomp filter ends every process that calls bpf(2)" in line
        assert "SystemCallFilter=bpf" in line


def test_strict_says_why(launch):
    server = launch("--hermes-strict", worker_class="hermes_sync", prefix=PREFIX, port=free_port())
    assert server.wait_ended() == 1
    assert server.lines("Error: ", "seccomp", "hermes_strict")

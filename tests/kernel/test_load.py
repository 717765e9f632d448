"""Loading the program, and what the arbiter's side holds and gives back."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_bind import Bind, MakeBind

from hermes_gunicorn.core.errors import BpfError
from hermes_gunicorn.core.layout import ALLOWED, BIND, CONTROL, DRAINING, GROUP, READY, WORKER
from hermes_gunicorn.kernel import bpf
from hermes_gunicorn.kernel import loader as loaders
from hermes_gunicorn.kernel.program import Program
from hermes_gunicorn.kernel.table import KernelTable

VERIFIER_BUDGET = 100_000  # instructions; the kernel's limit is a million


def open_fds() -> int:
    """Count this process's file descriptors."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "layout", [CONTROL, GROUP, WORKER, BIND, ALLOWED], ids=lambda layout: layout.name
)
@pytest.mark.bpftool
def test_the_python_layout_is_that_of_the_objects_btf(layout):
    path = loaders.bpf_directory() / "hermes.bpf.o"
    dump = subprocess.run(
        ["bpftool", "btf", "dump", "file", path, "-j"],
        capture_output=True,
        check=True,
        timeout=30,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )
    types = json.loads(dump.stdout)["types"]
    (struct,) = [t for t in types if t["kind"] == "STRUCT" and t["name"] == layout.name]
    assert struct["size"] == layout.size
    assert {m["name"]: m["bits_offset"] // 64 for m in struct["members"]} == {
        name: layout.index(name) for name, _ in layout.fields
    }


@pytest.mark.parametrize("attach_type", [40, 0], ids=["migrate", "select"])
def test_the_verifier_passes_it_with_and_without_migration(kernel: KernelTable, attach_type: int):
    maps = kernel.bind_maps()
    fds = {name: map.fd for name, map in (kernel.maps() | maps).items()}
    code = kernel.program.relocated(fds)
    fd = bpf._load(kernel.program, code, attach_type)
    try:
        assert bpf.program_stats(fd).verified_instructions < VERIFIER_BUDGET
    finally:
        os.close(fd)
        for map in maps.values():
            map.close()


@pytest.mark.ebpf
def test_a_program_the_verifier_refuses_is_refused_with_its_words():
    program = Program("broken", bytes.fromhex("9500000000000000"), [], b"GPL", "test")
    with pytest.raises(BpfError, match=r"R0 !read_ok|processed") as caught:
        bpf.load_program(program, {})
    assert "R0 !read_ok" in caught.value.log
    assert "\n" not in str(caught.value)


def test_what_waits_on_a_listener_that_closes_goes_to_the_other_workers(bind: Bind):
    for slot in (2, 3):
        bind.table.set_state(slot, DRAINING)
    bind.connect(20)
    for slot in (2, 3):
        bind.table.set_state(slot, READY)
    bind.table.set_state(1, DRAINING)
    assert bind.dispatcher.waiting(1) == 20
    bind.listeners.pop(1).close()
    assert bind.accepted(20).keys() == {2, 3}
    assert bind.dispatcher.migrates  # Linux 5.14 and later


def test_a_second_server_on_the_port_is_refused(bind: Bind):
    with socket.socket() as other, pytest.raises(OSError, match="in use") as caught:
        other.bind(bind.address)
    assert caught.value.errno == errno.EADDRINUSE


def test_closing_gunicorns_listener_frees_the_port(bind: Bind):
    bind.shared.close()
    with socket.socket() as other:
        other.bind(bind.address)
        other.listen()


def test_what_waits_on_a_slot_stays_for_its_next_owner(bind: Bind):
    for slot in (2, 3):
        bind.dispatcher.close_slot(slot)
        bind.table.release(slot)
    bind.connect(3)
    bind.dispatcher.close_slot(1)
    assert bind.dispatcher.waiting(1) == 3
    again = bind.dispatcher.open_slot(1)
    assert again is bind.listeners[1]
    assert bind.accepted(3) == {1: 3}


def test_nothing_is_left_open(kernel: KernelTable, make_bind: MakeBind):
    make_bind(3).close()
    before = open_fds()
    for _ in range(20):
        make_bind(3).close()
    assert open_fds() == before


NOBODY = """
import os
from hermes_gunicorn.kernel.table import KernelTable
os.setgroups([]); os.setgid(65534); os.setuid(65534)
KernelTable("object", 256)
"""


ONLY_CAP_BPF = """
import ctypes, os, pickle, sys
from hermes_gunicorn.kernel.table import KernelTable
from hermes_gunicorn.kernel import bpf
program = pickle.load(sys.stdin.buffer)
PR_SET_KEEPCAPS, CAP_DAC_READ_SEARCH, CAP_BPF = 8, 2, 39
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
low, high = 1 << CAP_DAC_READ_SEARCH, 1 << (CAP_BPF - 32)
data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
assert libc.capset(header, data) == 0
kernel = KernelTable("object", 256)
print(bpf.load_program(program, kernel.maps() | kernel.bind_maps())[1])
"""


@pytest.mark.ebpf
@pytest.mark.root
def test_cap_bpf_alone_satisfies_the_verifier(loader: str):
    """Without CAP_PERFMON it is stricter: no speculation, no computed addresses."""
    program, _ = loaders.load(loader)
    run = subprocess.run(
        [sys.executable, "-c", ONLY_CAP_BPF],
        input=pickle.dumps(program),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.strip() == b"True", run.stderr.decode()[-2000:]


@pytest.mark.ebpf
@pytest.mark.root
def test_without_privilege_the_reason_and_the_remedy_are_named():
    run = subprocess.run(
        [sys.executable, "-c", NOBODY], capture_output=True, text=True, timeout=30, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "Unsupported: no permission to use eBPF" in last
    assert "run it with CAP_BPF" in last


def test_the_object_names_no_folder_of_where_it_was_built():
    text = (loaders.bpf_directory() / "hermes.bpf.o").read_bytes()
    assert str(Path.home()).encode() not in text
    assert os.getcwd().encode() not in text

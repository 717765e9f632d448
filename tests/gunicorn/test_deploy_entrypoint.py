"""The container's entrypoint: CAP_BPF for the arbiter alone, or shared mode without it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

ENTRYPOINT = Path(__file__).parents[2] / "deploy" / "entrypoint.sh"
DOCKER = "-all,+setuid,+setgid,+setpcap"


def capabilities(pid: int) -> dict[str, int]:
    """Return a process's sets of capabilities."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = dict(line.split(":", 1) for line in lines if line.startswith("Cap"))
    return {name: int(word, 16) for name, word in words.items()}


@pytest.mark.parametrize(
    ("given", "mode", "kept"), [("+bpf", "kernel", 1 << 39), ("-bpf", "shared", 0)]
)
def test_the_entrypoint_keeps_bpf_for_the_arbiter_if_there_is_one(
    start, tmp_path, given, mode, kept
):
    # Nobody may look where this checkout lies, so the test's root keeps reading any file.
    script = tmp_path / "entrypoint.sh"
    script.write_text(ENTRYPOINT.read_text().replace("kept=-all", "kept=-all,+dac_read_search"))
    script.chmod(0o755)
    container = ["setpriv", f"--bounding-set={DOCKER},+dac_read_search,{given}"]
    server = start(prefix=[*container, str(script)], workers=1)
    assert server.lines(f"hermes: {mode} ")
    reading = 1 << 2
    arbiter = server.process.pid
    assert psutil.Process(arbiter).uids().effective == 65534
    assert capabilities(arbiter)["CapBnd"] == kept | reading
    assert capabilities(arbiter)["CapPrm"] == capabilities(arbiter)["CapAmb"] == kept | reading
    (worker,) = server.worker_pids()
    child = int(server.get("/child?subprocess"))
    for pid in (worker, child):
        assert capabilities(pid)["CapPrm"] == capabilities(pid)["CapAmb"] == reading


def test_the_entrypoint_is_executable():
    assert os.access(ENTRYPOINT, os.X_OK)

"""Many worker lives and reloads: what the arbiter and the kernel still hold afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import psutil

WORKERS = 8
SETTLED_WITHIN = 60.0  # seconds
KINDS = ("bpf-map", "bpf-prog", "socket", "other")
MODES = {
    "kernel": ["-k", "hermes", "--hermes-strict"],
    "shared": ["-k", "hermes", "--hermes-mode", "shared"],
}


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + SETTLED_WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the server does not settle")
        time.sleep(0.01)


def held(arbiter: psutil.Process) -> dict[str, float]:
    """Count what the arbiter has open, by kind, and its memory in MiB."""
    links = []
    for fd in Path(f"/proc/{arbiter.pid}/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    counts = Counter(next((kind for kind in KINDS if kind in link), "other") for link in links)
    return {
        **{kind: counts[kind] for kind in KINDS},
        "mappings": len(arbiter.memory_maps(grouped=False)),
        "MiB": round(arbiter.memory_full_info().uss / 2**20, 1),
    }


def run(mode: str, lives: int, reloads: int) -> dict[str, Any]:
    """Put a server through so many lives, between two looks at what it holds."""
    with harness.serving(mode, WORKERS, MODES[mode]) as server:
        arbiter = server.arbiter

        def pids() -> set[int]:
            return {child.pid for child in arbiter.children()}

        def replaced(old: set[int]) -> bool:
            return len(pids() - old) == len(pids()) == WORKERS

        def reload() -> None:
            old = pids()
            arbiter.send_signal(signal.SIGHUP)
            wait_for(lambda: replaced(old))

        def kill() -> None:
            old = pids()
            for pid in old:
                psutil.Process(pid).kill()
            wait_for(lambda: replaced(old))

        reload()  # the first one opens what all others use
        before, lived = held(arbiter), 0
        for turn in range(1, reloads + 1):
            while lived < lives * turn // reloads:
                kill()
                lived += WORKERS
            reload()
        after = held(arbiter)
        objects = harness.kernel_objects(arbiter.pid)
    wait_for(lambda: not any(harness.bpftool(*each) for each in objects))
    return {"mode": mode, "lives": lived, "reloads": reloads, "before": before, "after": after}


def table(result: dict[str, Any]) -> str:
    """Make the Markdown from the result."""
    names = [*KINDS, "mappings", "MiB"]
    rows = [
        [run["mode"], when, *(f"{run[key][name]:g}" for name in names)]
        for run in result["runs"]
        for when, key in (("before", "before"), ("after", "after"))
    ]
    first = result["runs"][0]
    return (
        "# Worker lives\n\n"
        f"`python bench/lives.py`. {harness.describe(result)}\n\n"
        f"What the arbiter of {WORKERS} workers has open and its private memory, before and"
        f" after {first['lives']} workers were killed and {first['reloads']} reloads replaced all"
        " of them. Of each run the programs and maps were gone from the kernel after the"
        " server's end.\n\n" + harness.markdown_table(["mode", "", *names], rows)
    )


def main() -> None:
    """Run and write the result; fail if something stays open."""
    parser = harness.parser(__doc__.splitlines()[0], "lives")
    parser.add_argument("--lives", type=int, default=500)
    parser.add_argument("--reloads", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.lives, arguments.reloads = 8, 1
    runs = [run(mode, arguments.lives, arguments.reloads) for mode in MODES]
    result = {"machine": harness.machine(), "runs": runs}
    harness.write(arguments.output, result, table(result))
    for each in runs:
        if any(each["after"][kind] > each["before"][kind] for kind in KINDS):
            raise SystemExit("something stays open")


if __name__ == "__main__":
    main()

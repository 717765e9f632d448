"""What the kernel program costs for each connection, by the kernel's own statistics.

Both policies at several sizes, beside an empty program, interleaved; and what stage 1 of
the cascade costs the worker that runs it. The table is filled with ready workers in poll
and connections are opened one after the other, so its lines are as warm in the cache as
on a machine that does little else.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import statistics
import struct
import time
from pathlib import Path
from typing import Any

import harness
import plots
from gunicorn.config import Config
from gunicorn.sock import TCPSocket

from hermes_gunicorn.core.cascade import Scheduler
from hermes_gunicorn.core.layout import POLICIES, READY
from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.kernel import bpf
from hermes_gunicorn.kernel.dispatcher import KernelDispatcher
from hermes_gunicorn.kernel.program import Program
from hermes_gunicorn.kernel.table import KernelTable

SLOTS = (2, 8, 64, 256, 1024)
WORKERS = (8, 64, 256)
EMPTY = Program(  # return SK_PASS
    "empty", bytes.fromhex("b700000001000000 9500000000000000"), [], b"GPL", "bench"
)
BURST = 20


def hash_alone(slots: int) -> Program:
    """Select a listener by the packet's hash and nothing else: what any program costs."""

    def instruction(code: int, to: int, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
        return struct.pack("=BBhi", code, to | source << 4, offset, value)

    code = [
        instruction(0x61, 2, 1, 32),  # r2 = ctx->hash
        instruction(0x27, 2, value=slots),  # r2 = r2 * slots >> 32
        instruction(0x77, 2, value=32),
        instruction(0x63, 10, 2, -4),  # on the stack
        instruction(0x18, 2),  # r2 = the socket array
        bytes(8),
        instruction(0xBF, 3, 10),  # r3 = where the index is
        instruction(0x07, 3, value=-4),
        instruction(0xB7, 4),
        instruction(0x85, 0, value=82),  # bpf_sk_select_reuseport
        instruction(0xB7, 0, value=1),  # return SK_PASS
        instruction(0x95, 0),
    ]
    return Program("hash_alone", b"".join(code), [(4, "hermes_listeners")], b"GPL", "bench")


class Bed:
    """A bind address with a program on it and slots that look like idle workers."""

    def __init__(self, slots: int, program: Program | None = None) -> None:
        self.kernel = KernelTable("object", max(slots, 2))
        if program is not None:
            self.kernel.program = program
        config = Config()
        config.set("backlog", 1024)
        self.shared = TCPSocket(("127.0.0.1", 0), config, logging.getLogger())
        self.dispatcher = KernelDispatcher(self.shared, self.kernel)
        table = self.table = self.kernel.table
        table.slots = slots
        table.hang_threshold_ns = 10_000_000
        listeners = {self.shared.fileno(): (0, self.shared)}
        for slot in range(1, slots):
            listener = self.dispatcher.open_slot(slot)
            listeners[listener.fileno()] = slot, listener
            table.claim(slot)
            table.set_state(slot, READY)
        self.publishers = {slot: Publisher(table, slot) for slot in range(slots)}
        self._listeners = listeners
        self._poll = select.epoll()
        for fd in listeners:
            self._poll.register(fd, select.EPOLLIN)
        Scheduler(table).run(time.monotonic_ns())

    def connect(self, count: int) -> None:
        """Open connections, take them as their workers would, close them."""
        clients = [socket.create_connection(self.shared.getsockname()) for _ in range(count)]
        taken = 0
        while taken < count:
            for fd, _ in self._poll.poll():
                slot, listener = self._listeners[fd]
                listener.accept()[0].close()
                if slot:
                    self.publishers[slot].opened(True)
                    self.publishers[slot].ended()
                    self.publishers[slot].closed()
                taken += 1
        for client in clients:
            client.close()

    def nanoseconds(self, connections: int) -> float:
        """Return the program's mean run time."""
        before = bpf.program_stats(self.dispatcher.program_fd)
        for _ in range(connections // BURST):
            self.connect(BURST)
        after = bpf.program_stats(self.dispatcher.program_fd)
        return (after.run_time_ns - before.run_time_ns) / (after.runs - before.runs)

    def close(self) -> None:
        """Give all back."""
        self._poll.close()
        self.shared.close()
        self.kernel.close()


def stage_1(workers: int, runs: int) -> float:
    """Return what a run of stage 1 costs, in microseconds."""
    table = Table(*map(bytearray, Table.sizes(workers + 1)))
    table.slots = workers + 1
    table.hang_threshold_ns, table.theta = 10_000_000, 0.5
    for slot in range(1, workers + 1):
        table.claim(slot)
        table.set_state(slot, READY)
    scheduler = Scheduler(table)
    start = time.perf_counter_ns()
    for _ in range(runs):
        scheduler.run(time.monotonic_ns())
    return (time.perf_counter_ns() - start) / runs / 1000


def measure(rounds: int, connections: int) -> dict[str, Any]:
    """Run all cells in each round."""
    samples: dict[str, list[float]] = {}
    for number in range(rounds):
        for slots in (0, *SLOTS):
            programs = (None, hash_alone(slots)) if slots else (EMPTY,)
            for program in programs:
                bed = Bed(slots or 2, program)
                for index, name in enumerate([program.name] if program else POLICIES):
                    bed.table.policy = index
                    bed.nanoseconds(BURST * 5)  # warm up
                    cell = samples.setdefault(f"{name} {slots}", [])
                    cell.append(bed.nanoseconds(connections))
                if program is None:
                    stats = bpf.program_stats(bed.dispatcher.program_fd)
                bed.close()
        for workers in WORKERS:
            samples.setdefault(f"stage 1 {workers}", []).append(stage_1(workers, 200))
        print(f"round {number + 1} of {rounds}", flush=True)
    return {
        "samples": samples,
        "verified_instructions": stats.verified_instructions,
        "instructions": len(KernelTable("object", 2).program.instructions) // 8,
    }


def report(result: dict[str, Any]) -> str:
    """Lay out the tables."""
    samples = result["samples"]

    def cell(name: str, unit: str = "") -> str:
        low, middle, high = statistics.quantiles(samples[name], n=4)
        return f"{middle:,.0f}{unit} ({low:,.0f} - {high:,.0f})"

    columns = (*POLICIES, "hash_alone")
    rows = [[f"{slots}", *(cell(f"{name} {slots}") for name in columns)] for slots in SLOTS]
    return (
        "# The kernel program\n\n"
        f"`python bench/program.py`. {harness.describe(result)}\n\n"
        "Nanoseconds for each connection, with the 25 and 75 % quantiles of"
        f" {len(samples['empty 0'])} rounds, by the kernel's own statistics"
        f". An empty program costs {cell('empty 0')} here; that is"
        " included. Up to 64 slots are one group, of more least_loaded searches two groups."
        " `hash_alone` selects one of the listeners by hash and does nothing else. It grows"
        " with the slots as well, because all listeners are used in turn and their sockets,"
        " and our rows, have left the CPU's cache when they are needed again.\n\n"
        + harness.markdown_table(["slots", *columns], rows)
        + "\n![cost by slots](program.svg)\n\n"
        f"The program has {result['instructions']:,} instructions; the verifier walked"
        f" {result['verified_instructions']:,}, of a million allowed.\n\n"
        "Stage 1 of the cascade, for each run, in the worker that runs it; one run in 5 ms for"
        " all workers together, and none with least_loaded:\n\n"
        + harness.markdown_table(
            ["workers", "microseconds"],
            [[f"{workers}", cell(f"stage 1 {workers}")] for workers in WORKERS],
        )
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw cost over slots."""
    figure, axes = plots.figure(6.4, 3.6)
    samples = result["samples"]
    for policy in (*POLICIES, "hash_alone"):
        quantiles = [statistics.quantiles(samples[f"{policy} {n}"], n=4) for n in SLOTS]
        axes.plot(SLOTS, [q[1] for q in quantiles], marker="o", label=policy)
        axes.fill_between(SLOTS, [q[0] for q in quantiles], [q[2] for q in quantiles], alpha=0.2)
    axes.axhline(statistics.median(samples["empty 0"]), ls=":", color="gray", label="empty program")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SLOTS, [str(n) for n in SLOTS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots")
    axes.set_ylabel("ns for each connection")
    axes.legend(frameon=False)
    plots.save(figure, path)


def main() -> None:
    """Run and write the result."""
    arguments = harness.parser(__doc__, "program").parse_args()
    statistics_fd = bpf.enable_stats()
    result = measure(2, 200) if arguments.smoke else measure(15, 4000)
    os.close(statistics_fd)
    result = {"machine": harness.machine(), **result}
    harness.write(arguments.output, result, report(result))
    plot(result, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()

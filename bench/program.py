"""What the kernel program costs for each connection, by the kernel's own statistics.

Both policies at several sizes, beside an empty program, interleaved; and what stage 1 of
the cascade costs the worker that runs it. The table is filled with ready workers in poll
and connections are opened one after the other, so its lines are as warm in the cache as
on a machine that does little else.
"""

from __future__ import annotations

import logging
import select
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import plots
from gunicorn.config import Config
from gunicorn.sock import TCPSocket

from hermes_gunicorn.dispatch.kernel import KernelDispatcher, KernelTable
from hermes_gunicorn.loader import syscall
from hermes_gunicorn.loader.program import Program
from hermes_gunicorn.scheduler import Scheduler
from hermes_gunicorn.table import POLICIES, READY, Publisher, Table

SLOTS = (2, 8, 64, 256, 1024)
WORKERS = (8, 64, 256)
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
EMPTY = Program(  # return SK_PASS
    "empty", bytes.fromhex("b700000001000000 9500000000000000"), [], b"GPL", "bench"
)
BURST = 20


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
        before = syscall.program_stats(self.dispatcher.program_fd)
        for _ in range(connections // BURST):
            self.connect(BURST)
        after = syscall.program_stats(self.dispatcher.program_fd)
        return (after.run_time_ns - before.run_time_ns) / (after.runs - before.runs)

    def close(self) -> None:
        """Give all back."""
        self._poll.close()
        self.shared.close()
        self.kernel.close()


def stage_1(workers: int, runs: int) -> float:
    """Return what a run of stage 1 costs, in microseconds."""
    table = Table.anonymous(workers + 1)
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
    verified: dict[str, int] = {}
    for number in range(rounds):
        for slots in (0, *SLOTS):
            bed = Bed(slots or 2, None if slots else EMPTY)
            for index, policy in enumerate(POLICIES if slots else ("empty",)):
                bed.table.policy = index
                bed.nanoseconds(BURST * 5)  # warm up
                name = f"{policy} {slots}"
                samples.setdefault(name, []).append(bed.nanoseconds(connections))
            stats = syscall.program_stats(bed.dispatcher.program_fd)
            verified["program" if slots else "empty"] = stats.verified_instructions
            bed.close()
        for workers in WORKERS:
            samples.setdefault(f"stage 1 {workers}", []).append(stage_1(workers, 200))
        print(f"round {number + 1} of {rounds}", flush=True)
    return {
        "samples": samples,
        "verified_instructions": verified["program"],
        "instructions": len(KernelTable("object", 2).program.instructions) // 8,
    }


def report(result: dict[str, Any]) -> str:
    """Lay out the tables."""
    samples = result["samples"]

    def cell(name: str, unit: str = "") -> str:
        low, middle, high = statistics.quantiles(samples[name], n=4)
        return f"{middle:,.0f}{unit} ({low:,.0f} - {high:,.0f})"

    rows = [[f"{slots}", *(cell(f"{policy} {slots}") for policy in POLICIES)] for slots in SLOTS]
    return (
        "# The kernel program\n\n"
        f"`python bench/program.py`. {harness.describe(result)}\n\n"
        "Nanoseconds for each connection, with the 25 and 75 % quantiles of"
        f" {len(samples['empty 0'])} rounds, by the kernel's own statistics"
        f" (`kernel.bpf_stats_enabled`). An empty program costs {cell('empty 0')} here; that is"
        " included. Up to 64 slots are one group, more are searched two groups at a time.\n\n"
        + harness.markdown_table(["slots", *POLICIES], rows)
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
    for policy in POLICIES:
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
    before = STATISTICS.read_text()
    STATISTICS.write_text("1")
    try:
        result = measure(2, 200) if arguments.smoke else measure(15, 4000)
    finally:
        STATISTICS.write_text(before)
    result = {"machine": harness.machine(), **result}
    harness.write(arguments.output, result, report(result))
    plot(result, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()

"""The policies on paper: the same arrivals, dispatched by the model in a simulation.

Compares what `hermes_gunicorn/core/policy.py` decides with a hash over all listeners (what
`--reuse-port` does), with the better of two random workers, and with one queue that all
share. Workers serve one request at a time, as sync workers do. Also draws the picture
in docs/policies.md.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import plots

from hermes_gunicorn.core import policy
from hermes_gunicorn.core.cascade import INTERVAL_NS
from hermes_gunicorn.core.layout import (
    ALL_SLOTS,
    CASCADE,
    LEAST_LOADED,
    READY,
    SHARED_SLOT,
    WEIGHT,
    Row,
)

MS = 1_000_000  # nanoseconds
THRESHOLD_NS = 10 * MS
THETA = 0.5


@dataclass
class Job:
    """A connection with one request; times in nanoseconds."""

    arrival: int
    service: int
    start: int = 0
    worker: int = 0


@dataclass
class Worker:
    """Serves its own queue, first come first served."""

    slot: int
    queue: deque[Job] = field(default_factory=deque)
    job: Job | None = None
    connections: int = 0

    def hangs(self, now: int) -> bool:
        """Tell whether it is busy for too long."""
        return policy.is_hung(self.job.start if self.job else 0, now, THRESHOLD_NS)

    def row(self) -> Row:
        """Return what it publishes."""
        serving = self.job is not None
        return Row(
            slot=self.slot,
            state=READY,
            busy_since_ns=self.job.start if self.job else 0,
            requests=int(serving),
            connections=int(serving),
            weight=WEIGHT,
            settled=0,
            accepted=0,
            capacity=1,
            dispatched=len(self.queue),
            last_dispatch_ns=0,
            generation=1,
            frozen_since_ns=0,
            rescued=0,
            rescued_at_ns=0,
            pid=0,
            drained=0,
        )


class Rows(Sequence[Row]):
    """The rows of workers, made when they are looked at: of 1,024 that is 128."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [worker.row() for worker in self._workers[index]]
        return self._workers[index].row()


class Simulation:
    """A server whose connections are dispatched by a rule."""

    def __init__(self, workers: int, rule: str, seed: int = 0) -> None:
        self.workers = [Worker(slot) for slot in range(workers + 1)]
        self.chance = random.Random(seed)
        self.choose: Callable[[int], int] = getattr(self, rule)
        self._selected = ALL_SLOTS
        self._scheduled = 0
        self._ways = policy.ways(self._view(0))  # nobody ever leaves

    def run(self, jobs: list[Job]) -> list[Job]:
        """Serve jobs, given by arrival."""
        ends: list[tuple[int, int]] = []
        shared = self.workers[SHARED_SLOT].queue
        for job in [*jobs, None]:
            while ends and (job is None or ends[0][0] <= job.arrival):
                now, slot = heapq.heappop(ends)
                worker = self.workers[slot]
                worker.job = None
                if now - self._scheduled >= INTERVAL_NS:
                    self._schedule(now)
                if worker.queue or shared:
                    self._begin(worker, (worker.queue or shared).popleft(), now, ends)
            if job is None:
                continue
            worker = self.workers[self.choose(job.arrival)]
            if worker.slot == SHARED_SLOT:
                idle = [w for w in self.workers[1:] if w.job is None and not w.queue]
                worker = self.chance.choice(idle) if idle else worker
            if worker.slot != SHARED_SLOT and worker.job is None:
                self._begin(worker, job, job.arrival, ends)
            else:
                worker.queue.append(job)
        return jobs

    def _begin(self, worker: Worker, job: Job, now: int, ends: list[tuple[int, int]]) -> None:
        job.start, job.worker, worker.job = now, worker.slot, job
        heapq.heappush(ends, (now + job.service, worker.slot))

    def _schedule(self, now: int) -> None:
        rows = [worker.row() for worker in self.workers]
        live = [worker.slot for worker in self.workers[1:] if not worker.hangs(now)]
        events = [row.requests + row.queued for row in rows]
        self._selected = policy.select(live, [row.connections for row in rows], events, THETA)
        self._scheduled = now

    def hash(self, now: int) -> int:
        """``--reuse-port``: any worker, whatever it does."""
        return self.chance.randrange(1, len(self.workers))

    def shared(self, now: int) -> int:
        """Stock gunicorn, at its best: one queue."""
        return SHARED_SLOT

    def two_choices(self, now: int) -> int:
        """The better of two random workers that do not hang."""
        live = [w for w in self.workers[1:] if not w.hangs(now)]
        if not live:
            return SHARED_SLOT
        two = self.chance.sample(live, min(2, len(live)))
        return min((worker.row() for worker in two), key=policy.rank).slot

    def least_loaded(self, now: int) -> int:
        """Ours."""
        return self._model(LEAST_LOADED, now)

    def cascade(self, now: int) -> int:
        """The paper's."""
        return self._model(CASCADE, now)

    def _model(self, chosen: int, now: int) -> int:
        way = self.chance.choice(self._ways)
        return self.chance.choice(sorted(policy.outcome(self._view(chosen), way, now)))

    def _view(self, chosen: int) -> policy.View:
        return policy.View(
            rows=Rows(self.workers),
            eligible=ALL_SLOTS - 1 & (1 << len(self.workers)) - 1,
            selected=self._selected,
            allowed=ALL_SLOTS,
            policy=chosen,
            threshold_ns=THRESHOLD_NS,
        )


RULES = ("hash", "two_choices", "cascade", "least_loaded", "shared")


def arrivals(
    count: int, per_second: float, service: Callable[[random.Random], int], seed: int
) -> list[Job]:
    """Draw Poisson arrivals."""
    chance, now, jobs = random.Random(seed), 0, []
    for _ in range(count):
        now += round(chance.expovariate(per_second) * 1e9)
        jobs.append(Job(now, service(chance)))
    return jobs


def blocking(chance: random.Random) -> int:
    """One request in a hundred blocks for a second."""
    return 1000 * MS if chance.random() < 0.01 else 2 * MS


CASES: dict[str, tuple[int, float, Callable[[random.Random], int]]] = {
    "20 ms each, 75 % busy": (8, 300, lambda chance: 20 * MS),
    "exponential, 5 ms, 75 % busy": (8, 1200, lambda c: round(c.expovariate(1 / 5) * MS)),
    "1 % block for 1 s": (8, 200, blocking),
    "the same, 64 workers": (64, 1600, blocking),
}


def milliseconds(jobs: list[Job], quantile: float) -> float:
    """Return a quantile of how long connections waited."""
    waits = sorted(job.start - job.arrival for job in jobs)
    return waits[int(quantile * (len(waits) - 1))] / MS


def measure(count: int, seeds: int) -> dict[str, Any]:
    """Run all rules over all cases."""
    waits: dict[str, dict[str, list[float]]] = {}
    for case, (workers, per_second, service) in CASES.items():
        for rule in RULES:
            waits.setdefault(case, {})[rule] = [
                milliseconds(
                    Simulation(workers, rule, seed).run(arrivals(count, per_second, service, seed)),
                    0.99,
                )
                for seed in range(seeds)
            ]
            print(f"{case}, {rule}", flush=True)
    return {"p99_wait_ms": waits, "connections": count}


def report(result: dict[str, Any]) -> str:
    """Lay out the table."""
    rows = [
        [case, *(f"{statistics.median(waits[rule]):,.1f}" for rule in RULES)]
        for case, waits in result["p99_wait_ms"].items()
    ]
    return (
        "# The policies in a simulation\n\n"
        "`python bench/policies.py`: the model of `hermes_gunicorn/core/policy.py` in a"
        " discrete-event simulation of workers that serve one request at a time, Poisson"
        f" arrivals, {result['connections']:,} connections, median of"
        f" {len(next(iter(result['p99_wait_ms'].values()))['hash'])} seeds. 99 % of connections"
        " wait no longer than, in milliseconds:\n\n"
        + harness.markdown_table(["", *(rule.replace("_", " ") for rule in RULES)], rows)
        + "\n*hash* is what `--reuse-port` does, *shared* one queue for all, the ideal that"
        " stock gunicorn's shared socket comes near. There is no rescue in the simulation:"
        " what was sent to a worker waits for it.\n"
    )


def picture(path: Path) -> None:
    """Draw what three rules do to the same arrivals."""
    workers, until = 6, 400 * MS
    jobs = [
        job
        for job in arrivals(400, 300, lambda chance: round(chance.uniform(4, 16) * MS), 3)
        if job.arrival < until
    ]
    jobs[12].service = 250 * MS
    panels = ("hash", "cascade", "least_loaded")
    titles = ("hash (--reuse-port)", "cascade", "least_loaded")
    figure, axes = plots.figure(7.2, 6.0, nrows=3, sharex=True)
    for axis, rule, title in zip(axes, panels, titles, strict=True):
        served = Simulation(workers, rule).run([Job(j.arrival, j.service) for j in jobs])
        for job in served:
            hang = job.service > 100 * MS
            axis.barh(
                job.worker,
                job.service / MS,
                left=job.start / MS,
                height=0.8,
                color="#c44e52" if hang else "#4c72b0",
                edgecolor="white",
                linewidth=0.3,
            )
            # A wait is a thin line from the arrival to the start.
            axis.plot(
                [job.arrival / MS, job.start / MS],
                [job.worker - 0.45] * 2,
                color="#dd8452",
                linewidth=1,
                zorder=3,
            )
        longest = max(job.start - job.arrival for job in served) / MS
        axis.set_title(f"{title}: longest wait {longest:.0f} ms", loc="left", fontsize=9)
        axis.set_yticks(range(1, workers + 1))
        axis.set_ylabel("worker")
        axis.set_xlim(0, until / MS)
        axis.grid(visible=False)
    axes[-1].set_xlabel("ms")
    plots.save(figure, path)


def main() -> None:
    """Run and write the result."""
    parser = harness.parser(__doc__, "policies")
    parser.add_argument("--picture", type=Path, help="draw the picture of the docs there")
    arguments = parser.parse_args()
    result = measure(300, 1) if arguments.smoke else measure(20_000, 5)
    harness.write(arguments.output, result, report(result))
    if arguments.picture:
        picture(arguments.picture)


if __name__ == "__main__":
    main()

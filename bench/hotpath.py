"""What publishing costs a worker: per store, per turn of the loop, per request."""

from __future__ import annotations

import statistics
import time
import timeit

import gevent
import harness
from gevent import get_hub

from hermes_gunicorn.core.row import Publisher
from hermes_gunicorn.core.table import Table

# How often a request on a connection of its own does each of them.
PER_REQUEST = {"opened": 1, "ended": 1, "closed": 1}
CALLS = 200_000
TURNS = 20_000


def nanoseconds(function: object, repeats: int) -> list[float]:
    """Time a call, several times."""
    return [t / CALLS * 1e9 for t in timeit.repeat(function, number=CALLS, repeat=repeats)]


def turn() -> float:
    """Return the CPU time of a turn of the loop with one timer, in nanoseconds."""
    start = time.process_time_ns()
    for _ in range(TURNS):
        gevent.sleep(1e-9)
    return (time.process_time_ns() - start) / TURNS


def main() -> None:
    """Run and write the result."""
    arguments = harness.parser(__doc__, "hotpath").parse_args()
    repeats = 3 if arguments.smoke else 15
    table = Table(*map(bytearray, Table.sizes(2)))
    table.slots = 2
    pen = Publisher(table, 1)
    pen.connections = pen.requests = 1 << 40  # counting down from here stays positive
    calls = {
        "woke": pen.woke,
        "polls": pen.polls,
        "opened": lambda: pen.opened(True),
        "closed": pen.closed,
        "began": pen.began,
        "ended": pen.ended,
    }
    samples: dict[str, list[float]] = {
        name: nanoseconds(call, repeats) for name, call in calls.items()
    }

    loop = get_hub().loop
    watchers = loop.prepare(ref=False, priority=-2), loop.check(ref=False, priority=2)
    samples["turn"], samples["turn, published"] = [], []
    for _ in range(repeats):
        samples["turn"].append(turn())
        for watcher, call in zip(watchers, (pen.polls, pen.woke), strict=True):
            watcher.start(call)
        samples["turn, published"].append(turn())
        for watcher in watchers:
            watcher.stop()

    medians = {name: statistics.median(values) for name, values in samples.items()}
    request = sum(medians[name] * times for name, times in PER_REQUEST.items())
    edge = medians["turn, published"] - medians["turn"]
    result = {"machine": harness.machine(), "samples": samples}
    rows = [[name, f"{value:,.0f}"] for name, value in medians.items()]
    rows += [
        ["both edges of poll, per turn of the loop", f"{edge:,.0f}"],
        [f"a request on a new connection ({', '.join(PER_REQUEST)})", f"{request:,.0f}"],
    ]
    harness.write(
        arguments.output,
        result,
        "# The hot path\n\n"
        f"`python bench/hotpath.py`. {harness.describe(result)}\n\n"
        f"Nanoseconds, medians of {repeats}. The methods are those of `Publisher`; each is one to"
        " four stores into the table, without a system call or a lock.\n\n"
        + harness.markdown_table(["", "ns"], rows),
    )


if __name__ == "__main__":
    main()

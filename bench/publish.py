"""Put the results together: docs/benchmarks.md and its plots, from results/.

The words are in benchmarks.md beside this; what stands there as ``$name`` is replaced by the
table that ``name.py`` has made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import balance
import cells
import harness
import overhead
import plots
import scale
import utilisation
from contest import present
from rivals import OURS

DOCS = harness.HERE.parent / "docs"
PAGE, PLOTS = DOCS / "benchmarks.md", DOCS / "benchmarks"
RESULTS = harness.HERE / "results"
OUR_COLOUR, OTHER_COLOUR = "#2b6cb0", "#a0a4ab"

Result = dict[str, Any]


def bars(
    path: Path, names: Sequence[str], values: Sequence[float], label: str, form: str, log: float = 0
) -> None:
    """Draw a horizontal bar for each rival, ours in a colour of their own, best first.

    Args:
        path: of the SVG.
        names: of the rivals.
        values: theirs.
        label: of the axis.
        form: how a value is written at its bar's end.
        log: where a logarithmic axis begins; 0 is a linear one.
    """
    order = sorted(range(len(names)), key=values.__getitem__, reverse=True)
    figure, axes = plots.figure(6.4, 0.6 + 0.21 * len(names))
    axes.barh(
        [names[i] for i in order],
        [max(values[i], log) for i in order],
        color=[OUR_COLOUR if names[i] in OURS else OTHER_COLOUR for i in order],
    )
    for y, i in enumerate(order):
        axes.annotate(
            format(values[i], form),
            (max(values[i], log), y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=log)
    axes.margins(x=0.12, y=0.01)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    plots.save(figure, path)


def plot_cells(result: Result, path: Path) -> None:
    """Draw how many cells each rival loses."""
    board, rivals = cells.board(result), present(result)
    lost = [sum(bool(cells.marks(cell, rival)) for cell in board.values()) for rival in rivals]
    bars(path, rivals, lost, f"cells lost, of {len(board)}", ".0f")


def plot_probes(result: Result, path: Path) -> None:
    """Draw which share of probes is slow."""
    rivals, shares = present(result), []
    for rival in rivals:
        runs = [s for s in result["samples"] if s["rival"] == rival]
        slow, probes = (sum(run[what] for run in runs) for what in ("slow", "probes"))
        shares.append(100 * slow / probes)
    bars(path, rivals, shares, "% of probes over 200 ms", ".2f")


def plot_utilisation(result: Result, path: Path) -> None:
    """Draw up to which rate each rival answers in time."""
    safe = utilisation.safe_rates(result)
    bars(path, list(safe), list(safe.values()), "requests/s within the limit on p99", ".0f")


def plot_balance(result: Result, path: Path) -> None:
    """Draw the spread of connections and of CPU time over the number of workers."""
    titles = list(balance.VALUES)[:2]
    figure, both = plots.figure(7.2, 3.4, ncols=2)
    counts = sorted({int(s["group"]) for s in result["samples"]})
    for axes, title in zip(both, titles, strict=True):  # type: ignore[call-overload]
        for rival in present(result):
            values = [
                statistics.median(
                    balance.VALUES[title](s)
                    for s in result["samples"]
                    if (s["rival"], s["group"]) == (rival, str(count))
                )
                for count in counts
            ]
            ours = rival in OURS
            axes.plot(
                counts,
                values,
                marker="o",
                markersize=3,
                label=rival,
                lw=1.8 if ours else 0.9,
                ls="-" if ours else "--",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("workers")
        axes.set_title(title, fontsize=8)
    both[1].legend(frameon=False, fontsize=6)  # type: ignore[index]
    plots.save(figure, path)


def plot_overhead(result: Result, path: Path) -> None:
    """Draw what the parts take of a request."""
    figure, axes = plots.figure(6.4, 2.6)
    names = [f"{one['policy']}, {one['load']}" for one in result["samples"]][::-1]
    left = [0.0] * len(names)
    for part in overhead.PARTS:
        values = [100 * max(one[part], 0) / one["cpu_us"] for one in result["samples"]][::-1]
        axes.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("% of the server's CPU time for a request")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize=8)
    plots.save(figure, path)


def plot_scale(result: Result, path: Path) -> None:
    """Draw p99 over the number of simulated workers."""
    figure, axes = plots.figure(6.4, 3.2)
    for rule in scale.RULES:
        runs = {
            s["workers"]: s["p99_ms"]
            for s in result["samples"]
            if s["rule"] == rule and s["load"] == "heavy"
        }
        axes.plot(list(runs), [statistics.median(each) for each in runs.values()], "o-", label=rule)
    axes.set_xscale("log", base=2)
    axes.set_xticks(scale.WORKERS, [str(n) for n in scale.WORKERS])
    axes.set_xlabel("workers, busy for 75 % of the time")
    axes.set_ylabel("p99, ms")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    plots.save(figure, path)


PICTURES: dict[str, Callable[[Result, Path], None]] = {
    "cells": plot_cells,
    "probes": plot_probes,
    "utilisation": plot_utilisation,
    "balance": plot_balance,
    "overhead": plot_overhead,
    "scale": plot_scale,
}


def page() -> str:
    """Return the text of docs/benchmarks.md."""
    text = "<!-- made by bench/publish.py from bench/benchmarks.md and bench/results -->\n"
    return text + Template((harness.HERE / "benchmarks.md").read_text()).substitute(_Tables())


class _Tables(dict[str, str]):
    """The Markdown that a benchmark has left, without its title, to stand in a section."""

    def __missing__(self, name: str) -> str:
        name = name.replace("_", "-") if not (RESULTS / f"{name}.md").exists() else name
        text = (RESULTS / f"{name}.md").read_text().partition("\n")[2].strip()
        text = text.replace("\n## ", "\n### ")
        text = text.replace(f"]({name}.svg)", f"](../bench/results/{name}.svg)")
        if name in PICTURES:
            return f"![{name}](benchmarks/{name}.svg)\n\n{text}"
        return text


def main() -> None:
    """Write it all, or see whether that is necessary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            raise SystemExit("docs/benchmarks.md is not what bench/publish.py makes; run it")
        return
    for name, draw in PICTURES.items():
        source = RESULTS / f"{name}.json"
        if source.exists():
            PLOTS.mkdir(exist_ok=True)
            draw(json.loads(source.read_text()), PLOTS / f"{name}.svg")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()

"""An experiment that all rivals go through in rounds, interleaved, that can be interrupted.

What has been measured is kept line by line beside the result until the run is complete; the
next call goes on from there. With more rounds than a result has it adds to that.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import tqdm
from rivals import PACKAGES, RIVALS, label

__all__ = ["Contest", "Run", "by_group", "present"]

Sample = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One rival's turn.

    Attributes:
        group: which of the contest's parts.
        seed: the same for all rivals of a round.
        seconds: how long each measurement takes.
    """

    rival: str
    group: str
    seed: int
    seconds: float


@dataclass
class Contest:
    """What to measure, and on whom.

    Attributes:
        name: of the result's files.
        title: one line.
        measure: returns what came of a turn.
        report: makes the Markdown from the result.
        groups: parts of the contest; within each the rivals take turns.
        rivals: who takes part.
        smoke: those that a smoke run tries, and its one group.
    """

    name: str
    title: str
    measure: Callable[[Run], Sample]
    report: Callable[[Sample], str]
    groups: Sequence[str] = ("",)
    rivals: Sequence[str] = tuple(RIVALS)
    smoke: tuple[Sequence[str], str] = (("hermes", "gevent"), "")
    rounds: int = 3
    seconds: float = 5.0

    def main(self) -> None:
        """Run it from the command line and write the result."""
        parser = harness.parser(self.title, self.name)
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--seconds", type=float, default=self.seconds)
        parser.add_argument("--rivals", nargs="+", choices=self.rivals, default=self.rivals)
        if len(self.groups) > 1:
            parser.add_argument("--groups", nargs="+", choices=self.groups)
        parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
        given = parser.parse_args()
        groups: Sequence[str] = getattr(given, "groups", None) or self.groups
        if given.smoke:
            given.rounds, given.seconds, given.fresh = 1, 0.3, True
            given.rivals, groups = self.smoke[0], [self.smoke[1]]
        runs = list(_turns(given.rivals, groups, given.rounds, given.seconds))
        part = given.output.with_suffix(".part")
        if given.fresh:
            part.unlink(missing_ok=True)
        known = [] if given.fresh else _known(given.output, given.seconds)
        samples = self._measured(runs, part, known)
        result = {
            "machine": harness.machine() | {"rivals": {name: version(name) for name in PACKAGES}},
            "rounds": 1 + max(sample["seed"] for sample in samples),
            "seconds": given.seconds,
            "samples": samples,
        }
        harness.write(given.output, result, self.report(result))
        part.unlink()

    def _measured(self, runs: list[Run], part: Path, samples: list[Sample]) -> list[Sample]:
        part.parent.mkdir(parents=True, exist_ok=True)
        lines = part.read_text().splitlines() if part.exists() else []
        samples = samples + [json.loads(line) for line in lines]
        known = {(each["rival"], each["group"], each["seed"]) for each in samples}
        todo = [run for run in runs if (run.rival, run.group, run.seed) not in known]
        with part.open("a") as file:
            for run in tqdm.tqdm(todo, initial=len(samples), total=len(runs), unit="turn"):
                sample = {"rival": run.rival, "group": run.group, "seed": run.seed}
                samples.append(sample | self.measure(run))
                print(json.dumps(samples[-1]), file=file, flush=True)
        return samples


def _known(output: Path, seconds: float) -> list[Sample]:
    """Return the samples of a result whose turns were as long."""
    result: Sample = json.loads(output.read_text()) if output.exists() else {}
    samples: list[Sample] = result["samples"] if result.get("seconds") == seconds else []
    return samples


def _turns(
    rivals: Sequence[str], groups: Sequence[str], rounds: int, seconds: float
) -> Iterator[Run]:
    for seed in range(rounds):
        for group in groups:
            # In an order of its own each time: a neighbour's noise hits somebody else.
            order = random.Random(f"{seed} {group}").sample(list(rivals), len(rivals))
            for rival in order:
                yield Run(rival, group, seed, seconds)


def present(result: Sample) -> list[str]:
    """Return the rivals of a result in their usual order."""
    names = {sample["rival"] for sample in result["samples"]}
    return [name for name in RIVALS if name in names]


def by_group(result: Sample, groups: Sequence[str], value: Callable[[Sample], float]) -> str:
    """Lay out the medians of a value: a row for each rival, a column for each group."""
    rows = []
    for rival in present(result):
        row = [label(rival)]
        for group in groups:
            runs = [
                value(sample)
                for sample in result["samples"]
                if (sample["rival"], sample["group"]) == (rival, group)
            ]
            row.append(f"{statistics.median(runs):.2f}" if runs else "")
        rows.append(row)
    return harness.markdown_table(["", *groups], rows)

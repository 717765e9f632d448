"""Every comparison in the decision matters: flip one on either side, and a test fails.

Each mutant is a copy of the package and its tests with one operator changed, and a run
of the tests that state the decision.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from copies import ROOT, WITHIN, run_tests

MODEL = Path("hermes_gunicorn/core/policy.py")
PROGRAM = Path("bpf/hermes.bpf.c")
TESTS = (
    "tests/unit/test_policy.py",
    "tests/model/test_agreement.py",
    "tests/kernel/test_dispatch.py",
)
FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
EVERY = 6  # mutant that is tried unless the run is thorough

# The decision in the program: all functions from the first to the last of these.
FIRST, LAST = "hang_limit(", "hermes_dispatch("

# Mutants that decide the same. The line they are in, the operator, and why.
EQUIVALENT = {
    ("for (__u32 i = 0; i < HERMES_SLOTS_PER_GROUP; i++) {", "<"): "a shift by 64 ends the loop",
    ("__u64 limit = threshold && threshold < now ? now - threshold : 1;", "<"): (
        "at equality, one nanosecond, it decides between a limit of 0 and of 1"
    ),
    ("for (__u32 i = 0; i < HERMES_MAX_GROUPS; i++) {", "<"): "a probe more than there are groups",
    ("for (slot = 1; slot < HERMES_SLOTS_PER_GROUP; slot++) {", "<"): "one slot more to try",
    ("if (other.lowest < best.lowest)", "<"): "equal rank, and the hash drew both groups",
    ("if (search.localities > 1) {", ">"): "one locality group is all groups",
    (
        "return search->localities <= 1 || group % search->localities == search->own;",
        "<=",
    ): "one locality group is all groups",
}


@dataclass(frozen=True)
class Mutant:
    """One operator, changed."""

    path: Path
    line: int
    start: int
    old: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}:{self.start}:{self.old}"

    def text(self) -> str:
        """Return the file's text with the change."""
        lines = (ROOT / self.path).read_text().splitlines(keepends=True)
        line = lines[self.line - 1]
        end = self.start + len(self.old)
        assert line[self.start : end] == self.old
        lines[self.line - 1] = line[: self.start] + FLIPPED[self.old] + line[end:]
        return "".join(lines)


def in_the_model() -> Iterator[Mutant]:
    """Find the comparisons in core/policy.py."""
    text = (ROOT / MODEL).read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Compare):
            continue
        operands = [node.left, *node.comparators]
        for left, right in itertools.pairwise(operands):
            between = lines[left.end_lineno - 1][left.end_col_offset : right.col_offset]
            found = re.search(r"[<>]=?|[=!]=", between)
            if found:
                start = left.end_col_offset + found.start()
                yield Mutant(MODEL, left.end_lineno, start, found[0])


def in_the_program() -> Iterator[Mutant]:
    """Find the comparisons in hermes.bpf.c."""
    text = re.sub(
        r"/\*.*?\*/", lambda m: re.sub(r"\S", " ", m[0]), (ROOT / PROGRAM).read_text(), flags=re.S
    )
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if FIRST in line)
    end = next(i for i, line in enumerate(lines) if LAST in line and "int" in line)
    for number in range(begin, end):
        for found in re.finditer(r"(?<![<>=!-])([<>]=?|[=!]=)(?![<>=])", lines[number]):
            if not lines[number].lstrip().startswith("#"):
                yield Mutant(PROGRAM, number + 1, found.start(), found[0])


def mutants() -> list[Mutant]:
    """Return all but the equivalent ones."""
    found = [*in_the_model(), *in_the_program()]
    result = []
    for mutant in found:
        line = (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1].strip()
        if (line, mutant.old) not in EQUIVALENT and "UNROLL" not in line:
            result.append(mutant)
    return result


def run(copy: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests that state the decision against a copy of the project."""
    return run_tests(copy, "-k", "not bcc", *TESTS)


def test_the_copy_itself_passes(copy: Path):
    done = run(copy)
    assert done.returncode == 0, done.stdout[-2000:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try all mutants in a thorough run, else some from all over the decision."""
    if "mutant" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("thorough") else EVERY
        metafunc.parametrize("mutant", mutants()[::step], ids=str)


def test_a_flipped_comparison_makes_a_test_fail(copy: Path, mutant: Mutant):
    (copy / mutant.path).write_text(mutant.text())
    if mutant.path == PROGRAM:
        subprocess.run(["make", "-s", "-C", copy / "bpf"], check=True, timeout=WITHIN)
    done = run(copy)
    assert done.returncode == 1, done.stdout[-2000:]

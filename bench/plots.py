"""How the project's plots look. Needs matplotlib (``pip install .[bench]``)."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("svg")
# Text as text, and nothing that differs from run to run, so that a diff is a change.
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "hermes",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def figure(width: float, height: float, **arguments: object) -> tuple[Figure, Axes]:
    """Make a figure of that many inches with one set of axes, or as ``subplots`` takes it."""
    result = Figure(figsize=(width, height), layout="constrained")
    return result, result.subplots(**arguments)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG with a white ground, for dark pages too."""
    figure.savefig(path, facecolor="white", metadata={"Date": None})

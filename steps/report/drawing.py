"""What the figures share: one colour and marker a cell, and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steps.report.cells import gather
from steps.report.schema import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# one colour per cell in table order; colour-blind safe (Okabe-Ito, then Tol), markers tell the cells apart as well
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#117733",
    "#777777",
)
_MARKERS = "osD^vP*Xph"
LINES = ("-", "--", ":", "-.")


def style(results: Results) -> dict[str, tuple[str, str]]:
    """Return cell name -> (colour, marker)."""
    names = [c.name for c in gather(results)]
    return {n: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, n in enumerate(names)}


def plain_axes(title: str, x: str, y: str, size: tuple[float, float] = (7.0, 4.4)) -> tuple[Figure, Axes]:
    """Return a figure of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    dress(axes, title, x, y)
    return figure, axes


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Label a panel."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

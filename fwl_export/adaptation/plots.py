"""The plot of a comparison: perplexity against position, and gain by class of tokens."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.adaptation.analysis import Class, perplexity_by_position
from fwl_export.adaptation.compare import OFF, ON, RMS, SGD, STANDARD, Comparison
from fwl_export.adaptation.report import number
from fwl_export.errors import MissingDependencyError
from fwl_export.printable import one_line

NAME = "adaptation"

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = {STANDARD: "#555555", OFF: "#E69F00", ON: "#0072B2", SGD: "#009E73", RMS: "#CC79A7"}

# Smallest number of tokens per point of a curve, and largest number of points.
POINT_TOKENS, POINTS = 500, 30

# Height of a label beside a curve, relative to the height of the plot.
_LABEL_HEIGHT = 0.17
_TEXTS_NAMED = 4
# The ratio of perplexities above which the scale becomes logarithmic.
_LOG_ABOVE = 10


def import_figure() -> type[Any]:
    """Return matplotlib's class Figure.

    Raises:
      MissingDependencyError: matplotlib is not installed.
    """
    # Where there is no home folder it says that it made a temporary one; nobody needs to act on it.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed; pip install 'fwl-export[plots]', or "
            "leave out --output"
        ) from None
    return Figure


def write_plots(found: Comparison, folder: Path) -> None:
    """Write adaptation.png, 1000 pixels wide, and adaptation.svg into a folder."""
    figure = import_figure()(figsize=(10, 8), dpi=100)
    grid = figure.add_gridspec(
        2, 2, left=0.075, right=0.965, bottom=0.11, top=0.95, hspace=0.32, wspace=0.2
    )
    upper = grid[0, :].subgridspec(1, 2, width_ratios=(3.4, 1))
    _plot_position(figure.add_subplot(upper[0]), found)
    left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    _plot_classes(left, found.frequency, "Gain by frequency in the validation text")
    _plot_classes(right, found.repetition, "Gain by what was read before")
    left.set_ylabel("loss saved, nats per token", fontsize=11)
    left.set_xlabel("occurrences per 10 000 tokens; share of the text", fontsize=11)
    right.set_xlabel("share of the text", fontsize=11)
    figure.savefig(folder / f"{NAME}.png")
    figure.savefig(folder / f"{NAME}.svg", metadata={"Date": None})


def _plot_position(axes: Any, found: Comparison) -> None:
    size = len(found.texts.stream) - 1
    bins = max(2, min(POINTS, size // POINT_TOKENS))
    labels, ends, colors = [], [], []
    for key, method in found.methods.items():
        position, values = perplexity_by_position(method.losses, bins)
        style = "--" if key == OFF else "-"
        axes.plot(position / 1000, values, style, color=COLORS[key], linewidth=2)
        if np.isfinite(values).any():
            labels.append(f"{method.name}: {number(method.perplexity)}")
            ends.append(float(values[np.isfinite(values)][-1]))
            colors.append(COLORS[key])
    axes.set_xlim(0, size / 1000)
    low, high = _range(found, bins)
    if high > _LOG_ABOVE * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.set_xlabel("tokens read (thousands)", fontsize=11)
    axes.set_ylabel("perplexity", fontsize=11)
    _plain_axes(axes)
    _mark_texts(axes, found)
    label_curves(axes, labels, ends, colors, _LABEL_HEIGHT, 30)


def _range(found: Comparison, bins: int) -> tuple[float, float]:
    values = [perplexity_by_position(m.losses, bins)[1] for m in found.methods.values()]
    finite = np.concatenate(values)[np.isfinite(np.concatenate(values))]
    return (float(finite.min()), float(finite.max())) if finite.size else (1.0, 1.0)


def _mark_texts(axes: Any, found: Comparison) -> None:
    """Mark where the texts begin, and name them above the curves if there are only a few."""
    names, starts = found.texts.names, found.texts.starts
    ends = [*starts[1:], len(found.texts.stream)]
    for name, start, end in zip(names, starts, ends, strict=True):
        if start:
            axes.axvline(start / 1000, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
        if len(names) <= _TEXTS_NAMED:
            axes.text(
                (start + end) / 2000,
                1.03,
                one_line(name),
                parse_math=False,  # a file's name may have dollar signs
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=11,
            )


def _plot_classes(axes: Any, classes: Sequence[Class], title: str) -> None:
    methods = [key for key in COLORS if any(key in part.gains for part in classes)]
    width = 0.8 / max(len(methods), 1)
    for number_, key in enumerate(methods):
        place = np.arange(len(classes)) + (number_ - (len(methods) - 1) / 2) * width
        gains = np.array([part.gains.get(key, (math.nan, math.nan)) for part in classes])
        axes.bar(place, gains[:, 0], 0.92 * width, color=COLORS[key])
        axes.errorbar(place, gains[:, 0], gains[:, 1], fmt="none", ecolor="#222222", elinewidth=1)
    names = [f"{textwrap.fill(part.name, 12)}\n{_share(part, classes)}" for part in classes]
    axes.set_xticks(np.arange(len(classes)), names, fontsize=10)
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_title(title, fontsize=11)
    _plain_axes(axes)


def _share(part: Class, classes: Sequence[Class]) -> str:
    return f"{part.tokens / max(sum(c.tokens for c in classes), 1):.0%}"


def _plain_axes(axes: Any) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_curves(
    axes: Any,
    labels: Sequence[str],
    ends: Sequence[float],
    colors: Sequence[str],
    height: float,
    columns: int,
) -> None:
    """Write each curve's name to the right of the axes, near the curve's end, without overlaps.

    Args:
      axes: The matplotlib axes.
      labels: Names of the curves.
      ends: Last value of each curve.
      colors: Colors of the labels.
      height: Height of a label, relative to the height of the axes.
      columns: Largest number of characters in a line of a label.
    """
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    pixels = axes.transData.transform([(0, ends[i]) for i in order])
    wanted = axes.transAxes.inverted().transform(pixels)[:, 1]
    placed = spread_apart(wanted, height)
    placed -= max(0.0, placed[-1] - 1 + height / 2)
    placed += max(0.0, height / 2 - placed[0])
    for i, place in zip(order, placed, strict=True):
        axes.text(
            1.02,
            place,
            textwrap.fill(labels[i], columns),
            transform=axes.transAxes,
            color=colors[i],
            fontsize=11,
            va="center",
            linespacing=1.05,
        )


def spread_apart(
    heights: npt.NDArray[np.float64], least: float, passes: int = 200
) -> npt.NDArray[np.float64]:
    """Move heights apart until neighbors differ by at least `least`, and as little as possible.

    Args:
      heights: The heights, ascending, [N].
      least: Smallest allowed distance of neighbors.
      passes: Number of passes over all neighbors.
    """
    placed = heights.astype(np.float64).copy()
    for _ in range(passes):
        for i in range(len(placed) - 1):
            missing = least - (placed[i + 1] - placed[i])
            if missing > 0:
                placed[i] -= missing / 2
                placed[i + 1] += missing / 2
    return placed

"""Statistics, table and plot of evaluate_demo.py."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.adaptation.plots import label_curves

# The claim is about this many tokens; a shorter stream can neither support nor refute it.
ENOUGH_TOKENS = 40_000
END_TOKENS = 10_000

# Share of the plot's height that a label of three lines needs.
LABEL_HEIGHT = 0.16

# Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = {"a": "#555555", "c": "#0072B2", "c0": "#CC79A7", "c'": "#D55E00", "d": "#009E73"}


def growth(difference: npt.NDArray[Any], bin_tokens: int) -> dict[str, Any]:
    """Return whether a difference between losses grows along the stream.

    Args:
      difference: [N] differences in nats per token.
      bin_tokens: Tokens per point of the fitted line.

    Returns:
      The slope per 10 000 tokens of a least-squares line through the means of the bins and its
      standard error, with bins taken as independent; the same without the first 10 000 tokens,
      in which the model first has to learn. `grows` is whether either slope is more than two
      standard errors above 0, `end_gap` the mean of the last 10 000 tokens minus that of the
      first.
    """
    whole = fit_line(difference, bin_tokens)
    later = fit_line(difference[END_TOKENS:], bin_tokens)
    end = min(END_TOKENS, len(difference) // 2)
    fits = [fit for fit in (whole, later) if fit["standard_error"] is not None]
    return {
        "tokens": len(difference),
        "enough_tokens": len(difference) >= ENOUGH_TOKENS,
        "whole_stream": whole,
        "after_first_10k": later,
        # "not <=" is true for NaN too, the loss of a model that diverged.
        "grows": any(not f["slope_per_10k"] <= 2 * f["standard_error"] for f in fits),
        "end_gap": float(difference[-end:].mean() - difference[:end].mean()),
        "end_gap_tokens": end,
    }


def fit_line(values: npt.NDArray[Any], bin_tokens: int) -> dict[str, Any]:
    """Fit a line to the means of whole bins. With fewer than three bins the results are None."""
    bins = len(values) // bin_tokens
    if bins < 3:
        return {"bins": bins, "slope_per_10k": None, "standard_error": None}
    means = values[: bins * bin_tokens].astype(np.float64).reshape(bins, -1).mean(1)
    position = (np.arange(bins) + 0.5) * bin_tokens / 10_000
    centered = position - position.mean()
    spread = (centered**2).sum()
    slope = (centered * means).sum() / spread
    residual = means - means.mean() - slope * centered
    error = math.sqrt((residual**2).sum() / (bins - 2) / spread)
    return {"bins": bins, "slope_per_10k": float(slope), "standard_error": error}


def mean_difference(bins: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Return the mean of a paired difference, in nats, and its standard error over bins."""
    several = len(bins) > 1
    error = float(bins.std(ddof=1) / math.sqrt(len(bins))) if several else None
    return {"nats": float(bins.mean()) if len(bins) else None, "standard_error": error}


def row_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the rows in the table and the plot."""
    reset = results["tuning"]["reset"]["chosen"]
    dynamic = results["tuning"]["dynamic"]
    return {
        "a": "plain",
        "b": "FWL, adaptation off",
        "c": f"FWL, adapting, anchor every {results['tuning']['anchor']['interval']}",
        "c0": "FWL, adapting, no anchor",
        "c'": f"FWL, no decay, {f'reset every {reset}' if reset else 'never reset'}",
        "d": f"plain, dynamic evaluation every {dynamic['segment']}",
    }


def results_markdown(results: Mapping[str, Any]) -> str:
    """Return the table and notes on how to read it, in lines of at most 90 columns."""
    sections = (_table(results), _notes(results), _tuning_tables(results))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _table(results: Mapping[str, Any]) -> list[str]:
    plays = list(results["tokens"]["test"])
    names = row_names(results)
    lines = [
        f"| | perplexity | {' | '.join(plays)} | time | FLOPs | decode |",
        "|---" * (6 + len(plays) - 1) + "|",
    ]
    for row, result in results["rows"].items():
        # The paper's form costs the same as (c0).
        cost = "c0" if row == "c'" else row
        chunk = results["cost"]["chunk"]["rows"][cost]
        decode = results["cost"]["decode"]["rows"].get(cost)
        cells = [
            f"({row}) {names[row]}",
            _number(result["perplexity"]),
            *(_number(result["plays"][play]) for play in plays),
            f"{chunk['time_ratio']:.2f}",
            f"{chunk['flops_ratio']:.2f}",
            f"{decode['time_ratio']:.2f}" if decode else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(results: Mapping[str, Any]) -> list[str]:
    tokens, machine, cost = results["tokens"], results["machine"], results["cost"]
    chunk, decode = cost["chunk"], cost["decode"]
    base, anchor = chunk["rows"]["a"], results["tuning"]["anchor"]
    paragraphs = [
        f"Perplexity per token over {tokens['predicted']} tokens, read as one stream with nothing "
        f"reset between the plays; {results['parameters'] / 1e6:.2f} M parameters. (c) has the "
        f"trained step sizes x {anchor['step_factor']:g} and horizon x "
        f"{anchor['horizon_factor']:g}: {_number(results['fwl']['horizon'])} tokens.",
        f"Time and FLOPs (of matrix products) are relative to (a), in calls of "
        f"{base['tokens_per_call']} tokens ((d): of its segment), medians over {chunk['blocks']} "
        f"paired blocks of {chunk['block_tokens']} tokens; decode: time in calls of 1 token, "
        f"{decode['blocks']} blocks of {decode['block_tokens']}. (c') costs what (c0) does. (a) "
        f"takes {base['milliseconds_per_token']:.3f} ms per token, "
        f"{decode['rows']['a']['milliseconds_per_token']:.2f} ms in decode. {machine['cpu']}, "
        f"{machine['threads']} thread, torch {machine['torch']}.",
    ]
    wrapped = [textwrap.fill(paragraph, 90) for paragraph in paragraphs]
    return [*wrapped, "", *_position_notes(results["position"])]


def _position_notes(position: Mapping[str, Any]) -> list[str]:
    found = position["growth_c_against_a"]
    enough = "" if found["enough_tokens"] else f" (under {ENOUGH_TOKENS} tokens: no proof)"
    lines = [
        f"Does the loss of (c) less that of (a) grow? {'yes' if found['grows'] else 'no'}{enough}"
    ]
    for label, fit in (
        ("whole stream", found["whole_stream"]),
        ("after the first 10 000 tokens", found["after_first_10k"]),
    ):
        if fit["slope_per_10k"] is not None:
            lines.append(
                f"- {label}: {fit['slope_per_10k']:+.4f} ± {fit['standard_error']:.4f} nats per "
                "10 000 tokens"
            )
    ends = found["end_gap_tokens"]
    lines.append(f"- last {ends} tokens against first {ends}: {found['end_gap']:+.4f} nats")
    lines += ["", "Log perplexities compared, ± standard error over bins:", ""]
    lines += [
        f"- ({pair.replace(' - ', ') − (')}): {difference['nats']:+.4f} ± "
        f"{difference['standard_error']:.4f}"
        for pair, difference in position["log_perplexity_difference"].items()
        if difference["standard_error"] is not None
    ]
    return lines


def _tuning_tables(results: Mapping[str, Any]) -> list[str]:
    anchor, reset, dynamic = (results["tuning"][row] for row in ("anchor", "reset", "dynamic"))
    lines = [
        f"Tuned on {results['tokens']['validation']} validation tokens. Chosen: reset "
        f"{reset['chosen'] or 'never'}; segment {dynamic['segment']},",
        f"learning rate {dynamic['learning_rate']:g}"
        + ("" if dynamic["learning_rate_is_interior"] else " (at the edge of the grid)")
        + (", the smallest segment tried." if dynamic["segment_is_smallest_tried"] else "."),
        "",
        f"| steps x | horizon x | perplexity, anchor every {anchor['interval']} |",
        "|---|---|---|",
    ]
    lines += [
        f"| {trial['step_factor']:g} | {trial['horizon_factor']:g} "
        f"| {_number(trial['perplexity'])} |"
        for trial in anchor["trials"]
    ]
    lines += [
        "",
        "| reset every | perplexity |",
        "|---|---|",
    ]
    lines += [
        f"| {trial['reset_every'] or 'never'} | {_number(trial['perplexity'])} |"
        for trial in reset["trials"]
    ]
    lines += ["", "| segment | learning rate | tokens | perplexity |", "|---|---|---|---|"]
    lines += [
        f"| {trial['segment']} | {trial['learning_rate']:g} | {trial['tokens']} "
        f"| {_number(trial['perplexity'])} |"
        for trial in dynamic["trials"]
    ]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def plot_perplexity(results: Mapping[str, Any], folder: Path) -> None:
    """Plot perplexity against position: perplexity.png, 800 pixels wide, and perplexity.svg."""
    from matplotlib.figure import Figure

    position = results["position"]
    figure = Figure(figsize=(8, 4.5), dpi=100)
    axes = figure.add_axes((0.085, 0.13, 0.665, 0.76))
    ends = {}
    for row, color in COLORS.items():
        losses = np.array(position["mean_loss"][row], dtype=np.float64)
        points = (np.arange(len(losses)) + 0.5) * position["bin_tokens"] / 1000
        axes.plot(points, np.exp(losses), color=color, linewidth=2)
        if np.isfinite(losses).any():
            ends[row] = math.exp(losses[np.isfinite(losses)][-1])
    axes.set_xlim(0, results["tokens"]["predicted"] / 1000)
    axes.set_xlabel("tokens read (thousands)", fontsize=11)
    axes.set_ylabel(f"perplexity, {position['bin_tokens']} tokens per point", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _mark_plays(axes, results["tokens"]["test"])
    names = row_names(results)
    labels = [f"{names[row]}: {_number(results['rows'][row]['perplexity'])}" for row in ends]
    colors = [COLORS[row] for row in ends]
    label_curves(axes, labels, list(ends.values()), colors, LABEL_HEIGHT, 20)
    figure.savefig(folder / "perplexity.png")
    figure.savefig(folder / "perplexity.svg", metadata={"Date": None})


def _mark_plays(axes: Any, plays: Mapping[str, int]) -> None:
    start = 0.0
    for name, tokens in plays.items():
        end = start + tokens / 1000
        title = name.replace("_", " ").title()
        above = axes.get_xaxis_transform()
        axes.text((start + end) / 2, 1.03, title, transform=above, ha="center", fontsize=11)
        if start:
            axes.axvline(start, color="#999999", linewidth=1, linestyle=(0, (4, 3)))
        start = end

"""The tables of a comparison, for a terminal and for a Markdown document."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from fwl_export.adaptation.analysis import Class
from fwl_export.adaptation.compare import Comparison
from fwl_export.adaptation.cost import PARTS
from fwl_export.printable import markdown as as_markdown
from fwl_export.printable import one_line

Table = tuple[list[str], list[list[str]]]


def number(value: float) -> str:
    """Return a perplexity as readable text."""
    if not math.isfinite(value):
        return "infinite"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.2e}"


def method_table(found: Comparison) -> Table:
    """Return the perplexity and the cost of every method, relative to standard inference."""
    base = next(iter(found.methods.values()))
    header = ["", "perplexity", "change", "time", "time, T = 1", "FLOPs", "memory"]
    rows = []
    for method in found.methods.values():
        change = method.perplexity / base.perplexity - 1
        rows.append(
            [
                method.name,
                number(method.perplexity),
                "" if method is base else f"{change:+.1%}" if math.isfinite(change) else "infinite",
                f"{method.time_ratio[1]:.2f}",
                "–" if method.decode_ratio is None else f"{method.decode_ratio:.2f}",
                f"{method.flops_ratio:.2f}",
                f"{method.memory_ratio:.2f}",
            ]
        )
    return header, rows


def part_table(parts: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the floating-point operations per token by part of the model, in millions.

    Args:
      parts: Operations per token by part, by method; ratios are relative to the first method.
    """
    header = ["million FLOPs per token", *parts]
    rows = []
    for part in PARTS:
        if any(part in found for found in parts.values()):
            cells = [found.get(part) for found in parts.values()]
            rows.append([part, *("" if c is None else f"{c / 1e6:.2f}" for c in cells)])
    totals = [sum(found.values()) for found in parts.values()]
    rows.append(["total", *(f"{total / 1e6:.2f}" for total in totals)])
    rows.append(["relative", *(f"{total / totals[0]:.2f}" for total in totals)])
    return header, rows


def class_table(title: str, classes: Sequence[Class], methods: Sequence[str]) -> Table:
    """Return the gain over standard inference by class of tokens, in nats.

    Args:
      title: Heading of the first column.
      classes: The classes, one per row.
      methods: The methods, one per column.
    """
    rows = []
    for part in classes:
        loss = "" if part.loss is None else f"{part.loss:.2f}"
        gains = [part.gains.get(method) for method in methods]
        cells = ["" if gain is None else f"{gain[0]:+.3f} ± {gain[1]:.3f}" for gain in gains]
        rows.append([part.name, str(part.tokens), loss, *cells])
    return [title, "tokens", "loss", *methods], rows


def tables(found: Comparison) -> list[Table]:
    """Return all tables of a comparison."""
    others = list(found.methods)[1:]
    parts = {key: method.flops_by_part for key, method in found.methods.items()}
    return [
        method_table(found),
        part_table(parts),
        class_table("gain by frequency", found.frequency, others),
        class_table("gain by repetition", found.repetition, others),
    ]


def notes(found: Comparison) -> list[str]:
    """Return the explanations that the tables need, one per paragraph."""
    base = next(iter(found.methods.values()))
    machine = found.machine
    texts = (
        f"{len(found.texts.names)} texts"
        if len(found.texts.names) > 3
        else ", ".join(map(one_line, found.texts.names))
    )
    lines = [
        f"{texts}: {len(found.texts.stream) - 1} tokens predicted, read as one stream. Dynamic "
        f"evaluation was tuned on {one_line(found.texts.validation_name)} "
        f"({len(found.texts.validation)} tokens).",
        f"Cost is relative to standard inference ({base.milliseconds_per_token:.3f} ms per token, "
        f"{base.peak_bytes / 1e6:.1f} MB), in calls of {base.tokens_per_call} tokens; dynamic "
        f"evaluation reads a segment per call. Time: median of {found.blocks[0]} paired, "
        f"interleaved blocks of {found.blocks[1]} tokens. FLOPs: matrix products, counted. Memory: "
        "peak of weights, state and intermediate results.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used, "
        f"load {machine['load']}, torch {machine['torch']}.",
    ]
    for rule, tuned in found.tuning.items():
        edge = "" if tuned["learning_rate_is_interior"] else " (at the edge of the grid)"
        smallest = ", the smallest tried" if tuned["segment_is_smallest_tried"] else ""
        lines.append(
            f"{rule}: segment {tuned['segment']}{smallest}, learning rate "
            f"{tuned['learning_rate']:g}{edge}, decay {tuned['decay']:g}; "
            f"{len(tuned['trials'])} trials."
        )
    return lines


CLASS_NOTES = (
    "Gain: how much lower the loss is than in standard inference, in nats per token ± standard "
    "error. Frequency: occurrences per 10 000 tokens of the validation text. Repetition: whether "
    "the token, or the pair of it and the token before it, was read before in this stream."
)


def to_markdown(found: Comparison) -> str:
    """Return all tables and notes in Markdown; lines outside of tables have at most 90 columns."""
    parts = [markdown(table) for table in tables(found)]
    parts[1:1] = [textwrap.fill(as_markdown(note), 90) for note in notes(found)]
    return "\n\n".join([*parts, textwrap.fill(CLASS_NOTES, 90)]) + "\n"


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

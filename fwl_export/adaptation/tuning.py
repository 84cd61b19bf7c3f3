"""Choose segment length and learning rate of dynamic evaluation on a validation text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fwl_export.adaptation.readers import Reader, iterate_losses, perplexity

# Ratio of neighboring learning rates in the coarse and in the fine grid.
COARSE, FINE = 10**0.5, 10**0.25


@dataclass(frozen=True)
class Choice:
    """The best setting of dynamic evaluation.

    Attributes:
      segment: Number of tokens per gradient step.
      learning_rate: Learning rate of a gradient step.
      interior: Whether the next smaller and the next larger rate are both worse.
    """

    segment: int
    learning_rate: float
    interior: bool


def choose(
    coarse: Callable[[int, float], float],
    fine: Callable[[int, float], float],
    segments: Sequence[int],
    first_rate: float,
) -> Choice:
    """Choose a segment length and a learning rate.

    For every segment length, find the best rate in a coarse grid; then, for the best length, the
    best rate in a finer grid.

    Args:
      coarse: Returns the perplexity at a segment length and a rate, for the coarse grid.
      fine: Returns the same for the fine grid, for example on more text.
      segments: Segment lengths to try, in tokens.
      first_rate: Rate at which the first grid begins.
    """
    best: dict[int, tuple[float, float]] = {}
    rate = first_rate
    for segment in segments:
        tried: dict[float, float] = {}

        def trial(rate: float, segment: int = segment, tried: dict[float, float] = tried) -> float:
            tried[rate] = coarse(segment, rate)
            return tried[rate]

        rate, _ = minimize_on_grid(trial, rate, COARSE)
        best[segment] = (min(tried.values()), rate)
    segment = min(best, key=lambda s: best[s][0])
    rate, interior = minimize_on_grid(partial(fine, segment), best[segment][1], FINE)
    return Choice(segment, rate, interior)


def stream_perplexity(
    reader: Reader,
    tokens: Tensor,
    segment: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Return the perplexity of a stream; infinity if the reader diverges, which ends it early.

    Args:
      reader: The reader, at the beginning of a stream.
      tokens: Token ids of the stream, [N] int64.
      segment: Number of tokens per call.
      advance: Called with the number of tokens read since the last time.
    """
    give_up = 1.5 * math.log(reader.model.config.vocab_size)
    total, count = 0.0, 0
    for losses in iterate_losses(reader, tokens, segment):
        total, count = total + float(losses.sum(dtype=np.float64)), count + len(losses)
        advance(len(losses))
        # "not <" instead of ">=": it is true for NaN too.
        if count >= 4 * segment and not total / count < give_up:
            return math.inf
    return perplexity(np.array(total / count))


def minimize_on_grid(
    cost: Callable[[float], float], start: float, factor: float, max_moves: int = 6
) -> tuple[float, bool]:
    """Return the best point of a geometric grid, and whether both its neighbors are worse.

    The grid begins with start / factor, start and start * factor. As long as the best point is at
    an edge, the grid grows there. Among equal costs, such as infinities, the smallest value wins.

    Args:
      cost: Returns the cost of a value.
      start: The middle of the first grid.
      factor: Ratio of neighboring values.
      max_moves: Number of times that the grid may be evaluated around a new center.
    """
    known: dict[int, float] = {}
    center = 0
    for _ in range(max_moves):
        for index in (center - 1, center, center + 1):
            if index not in known:
                known[index] = cost(_rounded(start * factor**index))
        best = min(sorted(known), key=lambda index: known[index])
        if best == center:
            return _rounded(start * factor**center), True
        center = best
    return _rounded(start * factor**center), False


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")

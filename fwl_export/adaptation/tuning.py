"""Choosing segment length and learning rate of dynamic evaluation on a validation text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fwl_export.adaptation.readers import Reader, iterate_losses, perplexity

# Ratios of the coarse grid of learning rates and of the fine one.
COARSE, FINE = 10**0.5, 10**0.25


@dataclass(frozen=True)
class Choice:
    """What was best.

    Attributes:
      segment: tokens per step.
      learning_rate: of a step.
      interior: whether the next smaller and the next larger rate are worse.
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
    """Choose a segment and a learning rate: for every segment the best rate of a coarse grid,
    then for the best segment the best of a finer one.

    Args:
      coarse: perplexity of a segment and a rate.
      fine: the same for the finer grid, e.g. on more text.
      segments: to try.
      first_rate: where the grid begins.
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
    """Return the perplexity of a stream; infinity for a reader that diverges, given up early."""
    give_up = 1.5 * math.log(reader.model.config.vocab_size)
    total, count = 0.0, 0
    for losses in iterate_losses(reader, tokens, segment):
        total, count = total + float(losses.sum(dtype=np.float64)), count + len(losses)
        advance(len(losses))
        # "not <" is also true of a NaN.
        if count >= 4 * segment and not total / count < give_up:
            return math.inf
    return perplexity(np.array(total / count))


def minimize_on_grid(
    cost: Callable[[float], float], start: float, factor: float, max_moves: int = 6
) -> tuple[float, bool]:
    """Return the best point of a geometric grid, and whether its neighbours are both worse.

    The grid begins with start / factor, start and start * factor, and grows at an edge for as
    long as the best point lies there. Equal costs, e.g. infinities, go to the smaller value.
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

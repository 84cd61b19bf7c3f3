"""Where a way of reading gains: by position, by frequency of the token, by what was read before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fwl_export.adaptation.readers import Losses
from fwl_export.bundle.state import Array

FREQUENCIES = ("never", "under 10", "10 to 100", "over 100")
REPETITIONS = ("new token", "known token, new pair", "known pair")


@dataclass(frozen=True)
class Class:
    """Some of a text's tokens, and what was gained on them.

    Attributes:
      name: of the class.
      tokens: how many.
      loss: mean of the standard, in nats; None where there are no tokens.
      gains: by method, how much lower its loss is; mean in nats, and its standard error.
    """

    name: str
    tokens: int
    loss: float | None
    gains: dict[str, tuple[float, float]]


def frequency_classes(labels: Array, reference: Array, vocabulary: int) -> Array:
    """Return the index in FREQUENCIES of every token: how often it stands in another text.

    Args:
      labels: [N] ids.
      reference: [M] ids of the text that is counted in; the classes are per 10 000 tokens.
      vocabulary: number of ids.
    """
    counts = np.bincount(reference, minlength=vocabulary)
    found: Array = np.digitize(counts / len(reference) * 1e4, [10, 100]) + 1
    return np.where(counts == 0, 0, found)[labels]


def repetition_classes(tokens: Array) -> Array:
    """Return the index in REPETITIONS of every token but the first: [N] ids -> [N - 1].

    A pair is a token with the one before it; known is what was read before in the same text.
    """
    known: set[int] = {int(tokens[0])}
    pairs: set[tuple[int, int]] = set()
    classes = np.zeros(len(tokens) - 1, np.int64)
    for i, pair in enumerate(itertools.pairwise(tokens.tolist())):
        classes[i] = 2 if pair in pairs else int(pair[1] in known)
        pairs.add(pair)
        known.add(pair[1])
    return classes


def gains_by_class(
    names: Sequence[str], classes: Array, standard: Losses, others: Mapping[str, Losses]
) -> list[Class]:
    """Return the gain of other ways of reading over the standard in every class.

    Args:
      names: of the classes.
      classes: [N], an index in names for each token.
      standard: [N] nats.
      others: by method, [N] nats.
    """
    found = []
    for index, name in enumerate(names):
        chosen = classes == index
        tokens = int(chosen.sum())
        gains = {}
        if tokens:
            for method, losses in others.items():
                difference = (standard[chosen] - losses[chosen]).astype(np.float64)
                error = float(difference.std(ddof=1)) / math.sqrt(tokens) if tokens > 1 else 0.0
                gains[method] = (float(difference.mean()), error)
        loss = float(standard[chosen].mean(dtype=np.float64)) if tokens else None
        found.append(Class(name, tokens, loss, gains))
    return found


def perplexity_by_position(losses: Losses, bins: int) -> tuple[Array, Array]:
    """Return positions [bins] in tokens and perplexities [bins] of equal parts of a stream."""
    parts = np.array_split(losses.astype(np.float64), bins)
    ends = np.cumsum([len(part) for part in parts])
    middles: Array = ends - np.array([len(part) for part in parts]) / 2
    with np.errstate(over="ignore"):
        return middles, np.exp([part.mean() for part in parts])

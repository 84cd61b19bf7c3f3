"""Where a way of reading gains: by position, by token frequency, by what was read before."""

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
    """A class of a text's tokens, and the gain on them.

    Attributes:
      name: Name of the class.
      tokens: Number of tokens in the class.
      loss: Mean loss of standard inference, in nats; None if the class has no tokens.
      gains: By method, how much lower its loss is: the mean and its standard error, in nats.
    """

    name: str
    tokens: int
    loss: float | None
    gains: dict[str, tuple[float, float]]


def frequency_classes(labels: Array, reference: Array, vocabulary: int) -> Array:
    """Classify tokens by how often they occur in another text.

    Args:
      labels: Token ids to classify, [N].
      reference: Token ids of the text to count in, [M].
      vocabulary: Number of token ids.

    Returns:
      The index in FREQUENCIES of every token, [N]; the classes are occurrences per 10 000 tokens.
    """
    counts = np.bincount(reference, minlength=vocabulary)
    found: Array = np.digitize(counts / len(reference) * 1e4, [10, 100]) + 1
    return np.where(counts == 0, 0, found)[labels]


def repetition_classes(tokens: Array) -> Array:
    """Classify every token but the first by whether it was read before in the same text.

    A pair is a token together with the token before it.

    Args:
      tokens: Token ids of the text, [N].

    Returns:
      The index in REPETITIONS of every token but the first, [N - 1].
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
    """Return the gain of other methods over standard inference in every class.

    Args:
      names: Names of the classes.
      classes: Class of each token, an index into `names`, [N].
      standard: Losses of standard inference in nats, [N].
      others: Losses of the other methods in nats, [N] each, by method.
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
    """Return the perplexity of equal parts of a stream.

    Args:
      losses: Losses of all tokens in nats, [N].
      bins: Number of parts.

    Returns:
      The middle of each part in tokens, [bins], and its perplexity, [bins].
    """
    parts = np.array_split(losses.astype(np.float64), bins)
    ends = np.cumsum([len(part) for part in parts])
    middles: Array = ends - np.array([len(part) for part in parts]) / 2
    with np.errstate(over="ignore"):
        return middles, np.exp([part.mean() for part in parts])

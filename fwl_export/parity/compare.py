"""How far two results are apart: running statistics, which keep no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.runtimes.sampling import log_softmax

# Bins of the ULP histogram: less than half a ULP, less than 1, 2, 4 ... 2^23, and the rest.
ULP_BINS = 26
_EXPONENT_BIAS = 1023
_BLOCK = 1 << 13  # elements compared at a time: few enough to stay in the cache
_PREDICTIONS = 1 << 18  # logits compared at a time as float64 distributions
_LIKELY = 5  # number of most likely tokens whose overlap is measured


@dataclass(frozen=True)
class Place:
    """One element that was compared.

    Attributes:
      step: Number of the call.
      tokens_read: Tokens the first row had read after that call.
      index: Index of the element: its row, then its index in the row's tensor. For a logit: its
        row, its position in the row's text, and its token id.
      candidate: Value in the candidate.
      reference: Value in the reference.
    """

    step: int
    tokens_read: int
    index: tuple[int, ...]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Error:
    """The distance of a tensor from its reference.

    Attributes:
      max_abs: Largest absolute difference.
      relative_rms: RMS of the difference divided by the RMS of the reference, in the row where this
        is largest. Taken by row, so that large rows do not hide the error of a small one.
      scale: Largest absolute value of the reference.
      worst: Element with the largest difference, or None if nothing was compared.
    """

    max_abs: float
    relative_rms: float
    scale: float
    worst: Place | None


@dataclass(frozen=True)
class Prediction:
    """The distance of predictions from those of the reference.

    Attributes:
      tokens: Number of predictions that were compared.
      kl: Mean KL(reference || candidate) per prediction, in nats.
      kl_max: Largest KL(reference || candidate) of a prediction, in nats.
      top1: Share of predictions in which both have the same most likely token.
      top5: Mean share of the reference's five most likely tokens that are among the
        candidate's five.
      loss: Mean negative log probability of the next token in the candidate, in nats.
      reference_loss: Mean negative log probability of the next token in the reference, in nats.
    """

    tokens: int
    kl: float
    kl_max: float
    top1: float
    top5: float
    loss: float
    reference_loss: float

    @property
    def perplexity(self) -> float:
        """Perplexity of the candidate, exp(loss)."""
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float:
        """Perplexity of the reference, exp(reference_loss)."""
        return _exp(self.reference_loss)

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity: candidate / reference - 1."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.expm1(np.float64(self.loss) - self.reference_loss))


class TensorSum:
    """Accumulates the differences of one tensor, row by row.

    Attributes:
      ulp: Histogram of the differences, see `ulp_histogram`; None for integers or before any `add`.
    """

    def __init__(self, rows: int) -> None:
        self._squares = np.zeros(rows)
        self._reference_squares = np.zeros(rows)
        self._scale = 0.0
        self._max_abs = 0.0
        self._worst: Place | None = None
        self.ulp: npt.NDArray[np.int64] | None = None

    def add(
        self,
        row: int,
        candidate: Array,
        reference: Array,
        step: int = 0,
        tokens_read: int = 0,
        places: Array | None = None,
    ) -> None:
        """Compare some elements of one row.

        Args:
          row: Index of the row.
          candidate: Values of the candidate, of any shape and dtype.
          reference: Values of the reference, of the same shape.
          step: Number of the call.
          tokens_read: Tokens the first row has read.
          places: What the first index stands for in `Place.index`, by index; None: itself.
        """
        found, right = candidate.reshape(-1), reference.reshape(-1)
        for start in range(0, found.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            place = self._add_block(row, found[block], right[block])
            if place is not None:
                index = [int(i) for i in np.unravel_index(start + place, candidate.shape)]
                if places is not None:
                    index[0] = int(places[index[0]])
                values = float(found[start + place]), float(right[start + place])
                self._worst = Place(step, tokens_read, (row, *index), *values)

    def add_equal(self, count: int) -> None:
        """Count elements that are 0 in both, as `add` would."""
        if self.ulp is None:
            self.ulp = np.zeros(ULP_BINS, np.int64)
        self.ulp[0] += count

    def _add_block(self, row: int, candidate: Array, reference: Array) -> int | None:
        """Return the index of the largest difference, or None if an earlier one is as large."""
        expected = reference.astype(np.float64, copy=False)
        difference = candidate.astype(np.float64)
        difference -= expected
        np.abs(difference, out=difference)
        self._squares[row] += float(np.vdot(difference, difference))
        self._reference_squares[row] += float(np.vdot(expected, expected))
        self._scale = max(self._scale, float(expected.max()), -float(expected.min()))
        if candidate.dtype.kind == "f":
            counts = ulp_histogram(difference, expected, candidate.dtype)
            self.ulp = counts if self.ulp is None else self.ulp + counts
        place = int(np.argmax(difference))  # NaN wins if there is one
        largest = _finite_or_inf(float(difference[place]))
        if self._worst is not None and largest <= self._max_abs:
            return None
        self._max_abs = largest
        return place

    def result(self) -> Error:
        """Return the error so far; values that are not finite count as infinitely far."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sqrt(self._squares / self._reference_squares)
        ratios[self._squares == 0] = 0.0  # even if the reference is 0 everywhere
        largest = float(ratios.max())
        return Error(self._max_abs, _finite_or_inf(largest), self._scale, self._worst)


@dataclass
class PredictionSum:
    """Accumulates how predictions differ."""

    _tokens: int = field(default=0, init=False)
    _kl: float = field(default=0.0, init=False)
    _kl_max: float = field(default=0.0, init=False)
    _agreed: int = field(default=0, init=False)
    _shared: float = field(default=0.0, init=False)
    _loss: float = field(default=0.0, init=False)
    _reference_loss: float = field(default=0.0, init=False)

    def add(self, candidate: Array, reference: Array, labels: Array) -> None:
        """Compare some predictions.

        Args:
          candidate: Logits of the candidate, [T, V].
          reference: Logits of the reference, [T, V].
          labels: Token ids that followed in the text, [T].
        """
        size = max(_PREDICTIONS // candidate.shape[-1], 1)
        for start in range(0, len(labels), size):
            block = slice(start, start + size)
            self._add_block(candidate[block], reference[block], labels[block])

    def _add_block(self, candidate: Array, reference: Array, labels: Array) -> None:
        found, expected = log_softmax(candidate), log_softmax(reference)
        ratio = found - expected
        # Equal to the sum of p log(p / q), because both distributions sum to 1. But no terms cancel
        # between tokens, so it stays accurate when the two differ by roundings only.
        divergence = (np.exp(expected) * (np.expm1(ratio) - ratio)).sum(-1)
        token = np.arange(len(labels))
        self._tokens += len(labels)
        self._kl += float(divergence.sum())
        self._kl_max = max(self._kl_max, float(divergence.max()))
        self._agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
        self._shared += _shared_likely(found, expected)
        self._loss -= float(found[token, labels].sum())
        self._reference_loss -= float(expected[token, labels].sum())

    def result(self) -> Prediction:
        """Return the distance so far."""
        count = max(self._tokens, 1)
        return Prediction(
            self._tokens,
            _finite_or_inf(self._kl / count),
            _finite_or_inf(self._kl_max),
            self._agreed / count,
            self._shared / count,
            _finite_or_inf(self._loss / count),
            _finite_or_inf(self._reference_loss / count),
        )


def ulp_histogram(difference: Array, reference: Array, dtype: Any) -> npt.NDArray[np.int64]:
    """Count differences by their size in ULP (units in the last place) of the reference.

    Args:
      difference: Absolute differences, float64, of any shape.
      reference: Values of the reference, float64, of the same shape.
      dtype: Float dtype whose ULP is meant.

    Returns:
      Counts [ULP_BINS]: entry 0 of differences below half a ULP, entry k of those below 2^(k-1)
      ULP that no earlier entry counts, and the last entry of all others and those not finite.
    """
    info = np.finfo(dtype)
    bins = _exponent_bits(difference)
    bins -= np.maximum(_exponent_bits(reference), int(info.minexp) + _EXPONENT_BIAS)
    bins += int(info.nmant) + 2
    np.clip(bins, 0, ULP_BINS - 1, out=bins)
    # The exponent of 0 is not below that of a ULP of the smallest references.
    bins[difference == 0] = 0
    counts: npt.NDArray[np.int64] = np.bincount(bins.reshape(-1), minlength=ULP_BINS)
    return counts


def _exponent_bits(values: Array) -> Array:
    """Return the biased binary exponents of float64 values as a new array."""
    bits: Array = np.ascontiguousarray(values).view(np.int64) >> 52
    bits &= 0x7FF
    return bits


def _shared_likely(found: Array, expected: Array) -> float:
    """Return, summed over predictions, the share of most likely tokens that both have."""
    count = min(_LIKELY, found.shape[-1])
    best, right = (
        np.argpartition(values, -count, axis=-1)[:, -count:] for values in (found, expected)
    )
    return float((best[:, :, None] == right[:, None, :]).sum()) / count


def pooled(parts: Sequence[Prediction]) -> Prediction:
    """Return the statistics of all parts together, weighted by their tokens."""
    tokens = max(sum(part.tokens for part in parts), 1)

    def mean(name: str) -> float:
        return sum(getattr(part, name) * part.tokens for part in parts) / tokens

    largest = max((part.kl_max for part in parts), default=0.0)
    shares = [mean(name) for name in ("top1", "top5", "loss", "reference_loss")]
    return Prediction(tokens, mean("kl"), largest, *shares)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _finite_or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf

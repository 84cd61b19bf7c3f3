"""How far two results lie apart: statistics that are added up and never keep a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.runtimes.sampling import log_softmax

# Of a histogram in ULP: less than half a ULP, less than 1, 2, 4 ... 2^23, and all that is more.
ULP_BINS = 26
_EXPONENT_BIAS = 1023
_BLOCK = 1 << 13  # elements compared at a time: they stay in the cache, and malloc reuses them
_PREDICTIONS = 1 << 18  # logits whose distributions are compared at a time, in float64
_LIKELY = 5  # tokens whose agreement is measured beside that of the likeliest


@dataclass(frozen=True)
class Place:
    """One element that was compared.

    Attributes:
      step: number of the call.
      tokens_read: tokens the first row had read after that call.
      index: of the element: its row, then its place in the tensor; of a logit its row, its
        position in the row's text, and its token.
      candidate: its value there.
      reference: its value there.
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
      max_abs: largest absolute difference.
      relative_rms: root of the mean square of the difference over that of the reference, of the
        row in which it is largest: a row that has just begun is not hidden behind old ones.
      scale: largest absolute value of the reference.
      worst: where `max_abs` is; None where nothing was compared.
    """

    max_abs: float
    relative_rms: float
    scale: float
    worst: Place | None


@dataclass(frozen=True)
class Prediction:
    """The distance of predictions from those of the reference.

    Attributes:
      tokens: predictions compared.
      kl: mean of KL(reference || candidate), in nats.
      kl_max: its largest value.
      top1: share of predictions whose likeliest token is the same.
      top5: of the reference's five likeliest tokens, the share that the candidate has in its five.
      loss: mean negative log probability of the next token, of the candidate, in nats.
      reference_loss: the same of the reference.
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
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float:
        """exp(reference_loss)."""
        return _exp(self.reference_loss)

    @property
    def perplexity_change(self) -> float:
        """How much larger the perplexity is than the reference's, relative to that."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.expm1(np.float64(self.loss) - self.reference_loss))


class TensorSum:
    """Adds up the differences of one tensor, row by row."""

    def __init__(self, rows: int) -> None:
        self._squares = np.zeros(rows)
        self._reference_squares = np.zeros(rows)
        self._scale = 0.0
        self._max_abs = 0.0
        self._worst: Place | None = None
        self.ulp: npt.NDArray[np.int64] | None = None  # histogram; None: whole numbers, or nothing

    def add(
        self,
        row: int,
        candidate: Array,
        reference: Array,
        step: int = 0,
        tokens_read: int = 0,
        offset: int | None = None,
    ) -> None:
        """Compare some elements of one row.

        Args:
          row: which one.
          candidate: any shape and type.
          reference: of the same shape.
          step: number of the call.
          tokens_read: tokens the first row has read.
          offset: added to the first index in `Place.index`; None: there is none.
        """
        found, right = candidate.reshape(-1), reference.reshape(-1)
        for start in range(0, found.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            place = self._add_block(row, found[block], right[block])
            if place is not None:
                index = [int(i) for i in np.unravel_index(start + place, candidate.shape)]
                if offset is not None:
                    index[0] += offset
                values = float(found[start + place]), float(right[start + place])
                self._worst = Place(step, tokens_read, (row, *index), *values)

    def _add_block(self, row: int, candidate: Array, reference: Array) -> int | None:
        """Return the index of the largest difference, if none before was as large."""
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
        place = int(np.argmax(difference))  # of NaN if there is one
        largest = _finite_or_inf(float(difference[place]))
        if self._worst is not None and largest <= self._max_abs:
            return None
        self._max_abs = largest
        return place

    def result(self) -> Error:
        """Return what was added up; a value that is not finite counts as infinitely far."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sqrt(self._squares / self._reference_squares)
        ratios[self._squares == 0] = 0.0  # also where the reference is 0 everywhere
        largest = float(ratios.max())
        return Error(self._max_abs, _finite_or_inf(largest), self._scale, self._worst)


@dataclass
class PredictionSum:
    """Adds up how predictions differ."""

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
          candidate: [T, V] logits.
          reference: [T, V] logits.
          labels: [T] the tokens that followed.
        """
        size = max(_PREDICTIONS // candidate.shape[-1], 1)
        for start in range(0, len(labels), size):
            block = slice(start, start + size)
            self._add_block(candidate[block], reference[block], labels[block])

    def _add_block(self, candidate: Array, reference: Array, labels: Array) -> None:
        found, expected = log_softmax(candidate), log_softmax(reference)
        ratio = found - expected
        # Both sum to 1, so this equals the sum of p log(p / q); but it has no terms that cancel
        # between tokens, and stays exact where the two are equal but for roundings.
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
        """Return what was added up."""
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
    """Count differences by their size in units in the last place of the reference.

    Args:
      difference: float64, 0 or more, any shape.
      reference: float64, of the same shape.
      dtype: float type whose units are meant.

    Returns:
      [ULP_BINS] counts: the first of less than half a unit, entry k of less than 2^(k-1), the
      last of more, or not finite.
    """
    info = np.finfo(dtype)
    bins = _exponent_bits(difference)
    bins -= np.maximum(_exponent_bits(reference), int(info.minexp) + _EXPONENT_BIAS)
    bins += int(info.nmant) + 2
    np.clip(bins, 0, ULP_BINS - 1, out=bins)
    bins[difference == 0] = 0  # whose exponent is not far below a unit of float64's smallest
    counts: npt.NDArray[np.int64] = np.bincount(bins.reshape(-1), minlength=ULP_BINS)
    return counts


def _exponent_bits(values: Array) -> Array:
    """Return the binary exponents of float64 values, plus the bias, in memory of their own."""
    bits: Array = np.ascontiguousarray(values).view(np.int64) >> 52
    bits &= 0x7FF
    return bits


def _shared_likely(found: Array, expected: Array) -> float:
    """Return the sum over rows of the share of the likeliest tokens that two have in common."""
    count = min(_LIKELY, found.shape[-1])
    best, right = (
        np.argpartition(values, -count, axis=-1)[:, -count:] for values in (found, expected)
    )
    return float((best[:, :, None] == right[:, None, :]).sum()) / count


def pooled(parts: Sequence[Prediction]) -> Prediction:
    """Return one prediction over all parts."""
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

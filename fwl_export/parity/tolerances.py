"""How far a runtime may be from float64, and why: the one table of every verdict.

A runtime computes in some precision, so it cannot agree with float64; how far it must be off
depends on the model and on the text. The measure is PyTorch in the same precision, on the same
text in the same calls: what it is off by is what the precision costs. The budget of a tensor is
a factor times that distance, for the largest difference and for the relative root mean square
(RMS) each; both must be kept. The distance is the largest up to the depth in question, or, where
the state is set right before each step and errors cannot grow, of the whole run, because what it
is at one depth of a small tensor is chance.

PyTorch can be right by chance, so a budget never falls below a floor, which counts roundings:
`floor` times what a value of the precision is off by after a sum of some hundred terms, plus
`per_token` float32 roundings for every token that the sums remember. The second part is the
decay: it is a float32 number close to 1 that is applied once per token, so its rounding, 2^-25
at most, adds up over the tokens of the horizon. Floors are relative: to the RMS of the tensor,
and, three times as wide because the largest of many roundings is, to its largest value.

KL divergence, top-1 agreement and perplexity follow from the logits; they are reported for
people and have no budget of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fwl_export.errors import ConfigError
from fwl_export.parity.compare import Error

# Relative error of a sum of some hundred terms. In float32 every addition rounds: about four
# times the machine epsilon was measured. A float16 model sums in float32 and rounds once; its
# float32 sums inherit that.
ROUNDING = {"fp64": 4 * 2.0**-52, "fp32": 4 * 2.0**-23, "fp16": 2.0**-10}
# Under a precision policy: some products in float16, or weights whose rounding the reference has.
ROUNDING |= {"mix16": ROUNDING["fp16"], "int8w": ROUNDING["fp32"]}

_MAX_OVER_RMS = 3  # the largest of thousands of normal deviations is three to four
_DECAY_ROUNDING = 2.0**-25  # of a float32 number between 1/2 and 1


@dataclass(frozen=True)
class Tolerance:
    """How far the tensors of one kind may be from float64.

    Attributes:
      prefix: of the names of the tensors it is for; the first fitting row of the table counts.
      rms_factor: times PyTorch's own relative RMS distance.
      max_factor: times PyTorch's own largest difference; more than `rms_factor`, because the
        largest of many roundings scatters more than their mean.
      floor: times the rounding of a sum that are always allowed.
      per_token: float32 roundings that are always allowed for every token remembered.
      reason: why this size.
      max_abs: takes the place of the whole budget for the largest difference; None: does not.
      relative_rms: the same for the relative RMS.
    """

    prefix: str
    rms_factor: float
    max_factor: float
    floor: float
    per_token: float
    reason: str
    max_abs: float | None = None
    relative_rms: float | None = None


TABLE = (
    Tolerance(
        "position", 0, 0, 0, 0, "whole numbers: a difference is a wrong count, not a rounding"
    ),
    Tolerance("pending.valid", 0, 0, 0, 0, "0 or 1, copied: nothing is rounded"),
    Tolerance(
        "logits",
        5,
        6,
        1,
        1,
        "the same roundings in another order: ONNX Runtime was 0.1 to 2.1 times as far off as "
        "PyTorch; 5 leaves room for small models and other instruction sets",
    ),
    Tolerance(
        "cache.",
        5,
        6,
        1,
        0,
        "one layer after the other, thousands of elements, no drift: 0.3 to 1.9 times as far off "
        "as PyTorch, more only in the first calls of a small model",
    ),
    Tolerance(
        "fast.",
        5,
        6,
        2,
        2,
        "sums over all tokens, in which systematic errors add up, those of the decay above all, "
        "where PyTorch can be lucky; 0.2 to 1.4 times as far off, 3.4 after eight tokens",
    ),
    Tolerance("anchor.", 5, 6, 2, 2, "copies of those sums: no rounding of their own"),
    Tolerance(
        "pending.inv_std",
        5,
        6,
        5,
        0,
        "one number per row: too few to measure by, ONNX Runtime was 6 times as far off as PyTorch "
        "at single calls and over the few of a row that is reset again and again; so the floor "
        "counts: two sums, the first of which is squared, and a difference from the mean",
    ),
    Tolerance(
        "pending.",
        5,
        6,
        1,
        0,
        "of one token per row and call, whose elements share their errors: 0.1 to 2.2 times as "
        "far off as PyTorch",
    ),
)


@dataclass(frozen=True)
class Budget:
    """How far a tensor may be from the reference at one depth.

    Attributes:
      max_abs: largest absolute difference.
      relative_rms: of the difference, in the unit of the reference's RMS.
      floor: relative error that roundings alone explain.
    """

    max_abs: float
    relative_rms: float
    floor: float = 0.0

    def use(self, error: Error) -> float:
        """Return the share of the budget that an error uses; more than 1 is outside."""
        return max(
            _share(error.max_abs, self.max_abs), _share(error.relative_rms, self.relative_rms)
        )


def tolerance_for(name: str, table: Sequence[Tolerance] = TABLE) -> Tolerance:
    """Return the row of the table for a tensor: "logits" or the name of a state tensor."""
    for row in table:
        if name.startswith(row.prefix):
            return row
    raise KeyError(f"no tolerance for '{name}': give it a row in {__name__}.TABLE")


def changed_table(changes: Mapping[str, Any], strict: bool = False) -> tuple[Tolerance, ...]:
    """Return the table with a user's rows in it; the longest prefix that fits a tensor counts.

    Args:
      changes: by prefix of the names of tensors, which keys of a `Tolerance` are other.
      strict: halve every budget of the table, before the changes.

    Raises:
      ConfigError: a prefix fits no row, or a key or value is none of a tolerance.
    """
    table = tuple(_half(row) for row in TABLE) if strict else TABLE
    if not isinstance(changes, Mapping):
        raise ConfigError(f"tolerances are {type(changes).__name__}; expected an object by prefix")
    rows = []
    for prefix, change in changes.items():
        base = next((r for r in table if prefix.startswith(r.prefix)), None)
        if base is None:
            known = ", ".join(row.prefix for row in TABLE)
            raise ConfigError(f"tolerances: no tensor begins with '{prefix}'; expected {known}")
        rows.append(_changed(base, prefix, change))
    return tuple(sorted((*rows, *table), key=lambda row: -len(row.prefix)))


_NUMBERS = ("rms_factor", "max_factor", "floor", "per_token", "max_abs", "relative_rms")


def _changed(base: Tolerance, prefix: str, change: Any) -> Tolerance:
    if not isinstance(change, Mapping) or not change.keys() <= {*_NUMBERS, "reason"}:
        raise ConfigError(
            f"tolerances: '{prefix}' is {change!r}; expected an object with "
            f"{', '.join(_NUMBERS)} or reason"
        )
    for key, value in change.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _NUMBERS and not (number and 0 <= value < math.inf):
            raise ConfigError(f"tolerances: '{prefix}': {key} is {value!r}; expected 0 or more")
    reason = str(change.get("reason", "given by the user"))
    return replace(base, **{**change, "prefix": prefix, "reason": reason})


def _half(row: Tolerance) -> Tolerance:
    halves = {key: getattr(row, key) / 2 for key in _NUMBERS[:4]}
    return replace(row, **halves)


def budgets(
    tolerance: Tolerance,
    own: Sequence[Error],
    tokens_read: Sequence[int],
    precision: str,
    horizon_tokens: float,
) -> list[Budget]:
    """Return the budget of a tensor at every depth.

    Args:
      tolerance: its row of the table.
      own: PyTorch's own distance from float64, in the precision of the candidate.
      tokens_read: tokens read there by the first row.
      precision: "fp16", "fp32" or "fp64".
      horizon_tokens: Tokens over which the fast weights remember (the horizon); 0 if they never
        forget, because their decay is then exactly 1.
    """
    result = []
    max_abs = relative_rms = 0.0
    for error, read in zip(own, tokens_read, strict=True):
        max_abs = max(max_abs, error.max_abs)
        relative_rms = max(relative_rms, error.relative_rms)
        decay = tolerance.per_token * _DECAY_ROUNDING * min(read, horizon_tokens)
        floor = tolerance.floor * ROUNDING[precision] + decay
        result.append(
            Budget(
                max(tolerance.max_factor * max_abs, _MAX_OVER_RMS * floor * error.scale)
                if tolerance.max_abs is None
                else tolerance.max_abs,
                max(tolerance.rms_factor * relative_rms, floor)
                if tolerance.relative_rms is None
                else tolerance.relative_rms,
                floor,
            )
        )
    return result


def _share(value: float, budget: float) -> float:
    if value == 0:
        return 0.0
    return value / budget if budget > 0 else float("inf")

"""What was measured against what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fwl_export.parity.compare import Error, Prediction
from fwl_export.parity.drift import Drift, Failure, Pair
from fwl_export.parity.tolerances import Budget, Tolerance, budgets, tolerance_for


@dataclass(frozen=True)
class Measured:
    """A tensor at one depth.

    Attributes:
      depth: tokens the first row had read.
      error: distance of the candidate from the reference.
      own: distance of PyTorch in the candidate's precision from the reference.
      apart: distance of the candidate from PyTorch in its precision.
      budget: what `error` may be.
    """

    depth: int
    error: Error
    own: Error
    apart: Error
    budget: Budget

    @property
    def use(self) -> float:
        """Share of the budget that is used; more than 1 is outside."""
        return self.budget.use(self.error)


@dataclass(frozen=True)
class TensorVerdict:
    """The logits or one tensor of the state.

    Attributes:
      name: "logits" or the name in the state.
      tolerance: the row of the table that applied.
      depths: one entry per depth.
    """

    name: str
    tolerance: Tolerance
    depths: Sequence[Measured]

    @property
    def worst(self) -> Measured:
        """The depth at which most of the budget is used."""
        return max(self.depths, key=lambda measured: measured.use)

    @property
    def use(self) -> float:
        """Share of the budget that is used at the worst depth."""
        return self.worst.use


class Breach(NamedTuple):
    """Where a candidate is outside its budget for the first time."""

    tensor: str
    measured: Measured


@dataclass(frozen=True)
class CandidateVerdict:
    """All of one runtime.

    Attributes:
      name: of the runtime.
      tensors: logits first, then the state in the model's order.
      predictions: against the reference, one entry per depth.
      own_predictions: the same of PyTorch in the candidate's precision.
      failure: why it could not go on; None if it got to the end.
    """

    name: str
    tensors: Sequence[TensorVerdict]
    predictions: Sequence[Prediction]
    own_predictions: Sequence[Prediction]
    failure: Failure | None

    @property
    def use(self) -> float:
        """Share of the budget that the tensor closest to its limit uses."""
        return max((tensor.use for tensor in self.tensors), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether it got to the end with every tensor within its budget."""
        return self.failure is None and bool(self.tensors) and self.use <= 1

    @property
    def breach(self) -> Breach | None:
        """The furthest tensor at the first depth at which one is outside its budget."""
        outside = [
            Breach(tensor.name, measured)
            for tensor in self.tensors
            for measured in tensor.depths
            if measured.use > 1
        ]
        if not outside:
            return None
        return min(outside, key=lambda b: (b.measured.depth, -b.measured.use))


def judge(
    drift: Drift, candidate: str, own: str, reference: str, precision: str, memory: float
) -> CandidateVerdict:
    """Compare what was measured of a candidate with its budgets.

    Args:
      drift: with the pairs candidate-reference, own-reference and candidate-own.
      candidate: name of the runtime.
      own: name of PyTorch in the candidate's precision.
      reference: name of what counts as right.
      precision: "fp32" or "fp16", of both.
      memory: tokens that the sums remember, see `budgets`.
    """
    errors = drift.pairs[Pair(candidate, reference)]
    of_own = drift.pairs[Pair(own, reference)]
    apart = drift.pairs[Pair(candidate, own)]
    count = min(len(pair.predictions) for pair in (errors, of_own, apart))
    depths = drift.depths[:count]
    tensors = []
    for name in errors.errors if count else ():
        row = tolerance_for(name)
        own_errors = of_own.errors[name][:count]
        allowed = budgets(row, own_errors, depths, precision, memory)
        columns = (depths, errors.errors[name], own_errors, apart.errors[name], allowed)
        measured = [Measured(*entries) for entries in zip(*columns, strict=False)]
        tensors.append(TensorVerdict(name, row, measured))
    failures = (drift.failures.get(name) for name in (reference, own, candidate))
    return CandidateVerdict(
        candidate,
        tensors,
        errors.predictions[:count],
        of_own.predictions[:count],
        next((failure for failure in failures if failure), None),
    )

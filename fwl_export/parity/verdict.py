"""What was measured against what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fwl_export.parity.compare import Error, Prediction
from fwl_export.parity.drift import TEACHER_FORCED, Drift, Failure, RunKey
from fwl_export.parity.tolerances import TABLE, Budget, Tolerance, budgets, tolerance_for

WITHIN, OUTSIDE, COULD_NOT_RUN = "within", "outside", "could not run"


@dataclass(frozen=True)
class Measured:
    """A tensor at one depth.

    Attributes:
      tokens_read: tokens the first row had read.
      error: distance of the candidate from the reference.
      own: distance of PyTorch in the candidate's precision from float64.
      budget: what `error` may be.
    """

    tokens_read: int
    error: Error
    own: Error
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
      dtype: in the candidate.
      tolerance: the row of the table that applied.
      points: one entry per comparison point.
      ulp: histogram of all differences, see `compare.ulp_histogram`; None for whole numbers.
    """

    name: str
    dtype: str
    tolerance: Tolerance
    points: Sequence[Measured]
    ulp: Sequence[int] | None = None

    @property
    def worst(self) -> Measured:
        """The depth at which most of the budget is used."""
        return max(self.points, key=lambda measured: measured.use)

    @property
    def use(self) -> float:
        """Share of the budget that is used at the worst depth."""
        return self.worst.use


@dataclass(frozen=True)
class RunVerdict:
    """One candidate in one case and mode.

    Attributes:
      case: name of it.
      mode: "free" or "forced".
      tensors: logits first, then the state in the model's order; none if nothing was compared.
      predictions: against the reference, one entry per depth.
      own_predictions: the same of PyTorch in the candidate's precision.
      failure: why it could not go on; None if it got to the end.
    """

    case: str
    mode: str
    tensors: Sequence[TensorVerdict]
    predictions: Sequence[Prediction]
    own_predictions: Sequence[Prediction]
    failure: Failure | None

    @property
    def use(self) -> float:
        """Share of the budget that the tensor closest to its limit uses."""
        return max((tensor.use for tensor in self.tensors), default=0.0)

    @property
    def tokens_read(self) -> list[int]:
        """Tokens the first row had read where states were compared."""
        return [measured.tokens_read for measured in self.tensors[0].points] if self.tensors else []

    @property
    def status(self) -> str:
        """`WITHIN`, `OUTSIDE` or `COULD_NOT_RUN`."""
        if self.use > 1 or (self.failure and self.failure.kind == "not finite"):
            return OUTSIDE
        return COULD_NOT_RUN if self.failure or not self.tensors else WITHIN


class Spot(NamedTuple):
    """A tensor of a run at one depth."""

    run: RunVerdict
    tensor: TensorVerdict
    measured: Measured


class Growth(NamedTuple):
    """An error that is larger than in a report of before.

    Attributes:
      candidate, case, mode, tensor: where.
      measure: "max_abs" or "relative_rms", at its largest over the comparison points.
      before, now: its values.
    """

    candidate: str
    case: str
    mode: str
    tensor: str
    measure: str
    before: float
    now: float


@dataclass(frozen=True)
class CandidateVerdict:
    """All of one runtime.

    Attributes:
      name: of the runtime.
      precision: "fp16", "fp32" or "fp64".
      runs: one per case and mode; none if it could not be opened.
      runtime: what ran, in words.
      tokens: after how many it stopped by wish; None: never.
      reason: why it could not be opened; None if it could.
      grown: what grew since the baseline.
    """

    name: str
    precision: str
    runs: Sequence[RunVerdict]
    runtime: str = ""
    tokens: int | None = None
    reason: str | None = None
    grown: Sequence[Growth] = field(default=())

    @property
    def use(self) -> float:
        """Share of the budget that the tensor closest to its limit uses."""
        return max((run.use for run in self.runs), default=0.0)

    @property
    def status(self) -> str:
        """`WITHIN`, `OUTSIDE` or `COULD_NOT_RUN`; what is outside counts for more."""
        found = {run.status for run in self.runs}
        if OUTSIDE in found or self.grown:
            return OUTSIDE
        return WITHIN if found == {WITHIN} and self.reason is None else COULD_NOT_RUN

    @property
    def passed(self) -> bool:
        """Whether it got to the end of every run with every tensor within its budget."""
        return self.status == WITHIN

    @property
    def failure(self) -> Failure | None:
        """The first failure of a run."""
        return next((run.failure for run in self.runs if run.failure), None)

    @property
    def closest(self) -> Spot | None:
        """Where most of a budget is used."""
        spots = [Spot(run, t, t.worst) for run in self.runs for t in run.tensors]
        return max(spots, key=lambda spot: spot.measured.use, default=None)

    @property
    def breach(self) -> Spot | None:
        """In the first run with one, the furthest tensor at the first depth outside its budget."""
        for run in self.runs:
            outside = [
                Spot(run, tensor, measured)
                for tensor in run.tensors
                for measured in tensor.points
                if measured.use > 1
            ]
            if outside:
                return min(outside, key=lambda s: (s.measured.tokens_read, -s.measured.use))
        return None


def judge(
    case: str,
    drift: Drift,
    run: RunKey,
    own_drift: Drift,
    own: str,
    precision: str,
    horizon_tokens: float,
    table: Sequence[Tolerance] = TABLE,
) -> RunVerdict:
    """Compare what was measured of a candidate in one mode with its budgets.

    Args:
      case: name of the calls.
      drift: against the reference.
      run: candidate and mode.
      own_drift: against float64, with PyTorch in the candidate's precision in the same mode.
      own: its name there.
      precision: "fp16", "fp32" or "fp64", of both.
      horizon_tokens: tokens that the sums remember, see `budgets`.
      table: of tolerances.
    """
    found, usual = drift.runs[run], own_drift.runs[RunKey(own, run.mode)]
    count = min(len(found.tokens_read), len(usual.tokens_read))
    tokens_read = found.tokens_read[:count]
    if run.mode == TEACHER_FORCED:  # no error is older than the call
        horizon_tokens = min(horizon_tokens, drift.largest_call)
    tensors = []
    for name in found.errors if count else ():
        row = tolerance_for(name, table)
        own_errors = usual.errors[name][:count]
        measure = _steady(own_errors) if run.mode == TEACHER_FORCED else own_errors
        allowed = budgets(row, measure, tokens_read, precision, horizon_tokens)
        columns = (tokens_read, found.errors[name][:count], own_errors, allowed)
        measured = [Measured(*entries) for entries in zip(*columns, strict=True)]
        ulp = found.ulp.get(name)
        counts = None if ulp is None else [int(n) for n in ulp]
        tensors.append(TensorVerdict(name, found.dtypes[name], row, measured, counts))
    failures = [found.failure, *map(_without_measure, (drift.failure, own_drift.failure))]
    failures.append(_without_measure(usual.failure))
    whole = found.stopped and count == len(found.tokens_read)
    return RunVerdict(
        case,
        run.mode,
        tensors,
        found.predictions[:count],
        usual.predictions[:count],
        None if whole else next((failure for failure in failures if failure), None),
    )


def _steady(errors: Sequence[Error]) -> list[Error]:
    """Return the largest of errors that do not grow, those of single steps, for every depth.

    They are samples of one quantity, and the few of the first points say little about it. Largest
    differences are compared in units of what was largest in the tensor, since sums do grow.
    """
    rms = max((e.relative_rms for e in errors), default=0.0)
    share = max((e.max_abs / e.scale for e in errors if e.scale), default=0.0)
    return [replace(e, max_abs=max(share * e.scale, e.max_abs), relative_rms=rms) for e in errors]


def _without_measure(failure: Failure | None) -> Failure | None:
    """Return the failure of a reference: it says nothing about the candidate."""
    if failure is None:
        return None
    message = f"{failure.message}; without it there is nothing to compare with"
    return Failure(failure.runtime, failure.step, failure.tokens_read, message)

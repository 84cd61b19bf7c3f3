"""Judge what was measured against what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fwl_export.parity.compare import Error, Prediction
from fwl_export.parity.drift import NOT_FINITE, TEACHER_FORCED, Drift, Failure, RunKey
from fwl_export.parity.tolerances import TABLE, Budget, Tolerance, budgets, tolerance_for

WITHIN, OUTSIDE, COULD_NOT_RUN = "within", "outside", "could not run"


@dataclass(frozen=True)
class Measured:
    """A tensor at one comparison point.

    Attributes:
      tokens_read: Tokens the first row had read.
      error: Distance of the candidate from the reference.
      own: Distance of PyTorch in the candidate's precision from float64.
      budget: Largest allowed `error`.
    """

    tokens_read: int
    error: Error
    own: Error
    budget: Budget

    @property
    def use(self) -> float:
        """Error divided by the budget; more than 1 is outside."""
        return self.budget.use(self.error)


@dataclass(frozen=True)
class TensorVerdict:
    """Verdict on one tensor: the logits or a tensor of the state.

    Attributes:
      name: Name of the state tensor, or "logits".
      dtype: Dtype of the tensor in the candidate.
      tolerance: Row of the table that applied.
      points: Measurements, one per comparison point.
      ulp: Histogram of all differences, see `compare.ulp_histogram`; None for integers.
    """

    name: str
    dtype: str
    tolerance: Tolerance
    points: Sequence[Measured]
    ulp: Sequence[int] | None = None

    @property
    def worst(self) -> Measured:
        """The comparison point with the highest use of the budget."""
        return max(self.points, key=lambda measured: measured.use)

    @property
    def use(self) -> float:
        """Error divided by the budget at the worst comparison point."""
        return self.worst.use


@dataclass(frozen=True)
class RunVerdict:
    """Verdict on one candidate in one case and mode.

    Attributes:
      case: Name of the case.
      mode: Mode of the run: "free" (free-running) or "forced" (teacher-forced).
      tensors: Verdicts on the logits, then on the state in the model's order; empty if nothing was
        compared.
      predictions: Distance of the candidate's predictions from the reference's, one per point.
      own_predictions: The same of PyTorch in the candidate's precision.
      failure: Why it failed, or None if it got to the end.
      own_failure: Why PyTorch in the candidate's precision failed, or None if it did not.
    """

    case: str
    mode: str
    tensors: Sequence[TensorVerdict]
    predictions: Sequence[Prediction]
    own_predictions: Sequence[Prediction]
    failure: Failure | None
    own_failure: Failure | None = None

    @property
    def not_finite(self) -> Failure | None:
        """Where a value was NaN or infinite, or None."""
        return self.failure if self.failure and self.failure.is_not_finite else None

    @property
    def use(self) -> float:
        """Largest use of a budget by a tensor; infinite if a value was not finite."""
        if self.not_finite:
            return math.inf
        return max((tensor.use for tensor in self.tensors), default=0.0)

    @property
    def tokens_read(self) -> list[int]:
        """Tokens the first row had read at each comparison point."""
        return [measured.tokens_read for measured in self.tensors[0].points] if self.tensors else []

    @property
    def status(self) -> str:
        """`WITHIN`, `OUTSIDE` or `COULD_NOT_RUN`."""
        wrong = (NOT_FINITE, "not repeatable")
        if self.use > 1 or (self.failure and self.failure.kind in wrong):
            return OUTSIDE
        return COULD_NOT_RUN if self.failure or not self.tensors else WITHIN


class Spot(NamedTuple):
    """A tensor of a run at one comparison point."""

    run: RunVerdict
    tensor: TensorVerdict
    measured: Measured


class Growth(NamedTuple):
    """An error that is larger than in an earlier report.

    Attributes:
      candidate: Name of the candidate.
      case: Name of the case.
      mode: Mode of the run, "free" or "forced".
      tensor: Name of the tensor.
      measure: Measure of the error, "max_abs" or "relative_rms".
      before: Largest value over the comparison points in the earlier report.
      now: Largest value over the comparison points now.
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
    """Verdict on one candidate over all cases and modes.

    Attributes:
      name: Name of the candidate.
      precision: Precision of the candidate: "fp16", "fp32", "fp64", or that of a policy.
      runs: Verdicts, one per case and mode; empty if it could not be opened.
      runtime: Runtime, version and options in words.
      tokens: Tokens after which the user wanted it to stop, or None.
      reason: Why it could not be opened, or None if it could.
      grown: Errors that grew since the baseline.
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
        """Largest use of a budget in a run."""
        return max((run.use for run in self.runs), default=0.0)

    @property
    def status(self) -> str:
        """`WITHIN`, `OUTSIDE` or `COULD_NOT_RUN`; `OUTSIDE` takes precedence."""
        found = {run.status for run in self.runs}
        if OUTSIDE in found or self.grown:
            return OUTSIDE
        return WITHIN if found == {WITHIN} and self.reason is None else COULD_NOT_RUN

    @property
    def passed(self) -> bool:
        """Whether every run got to its end with every tensor within its budget."""
        return self.status == WITHIN

    @property
    def failure(self) -> Failure | None:
        """The first failure of a run, or None."""
        return next((run.failure for run in self.runs if run.failure), None)

    @property
    def not_finite(self) -> RunVerdict | None:
        """The first run in which a value was NaN or infinite, or None."""
        return next((run for run in self.runs if run.not_finite), None)

    @property
    def not_finite_at(self) -> Failure | None:
        """The first place in which a value was NaN or infinite, or None."""
        return self.not_finite.not_finite if self.not_finite else None

    @property
    def leaves_the_range(self) -> bool:
        """Whether what went wrong is that numbers left the range of the candidate's types.

        That is so where PyTorch, which computes the same in the same precision, was not finite in
        every case in which the candidate was not.
        """
        runs = [run for run in self.runs if run.not_finite]
        own = [run.own_failure is not None and run.own_failure.is_not_finite for run in runs]
        return bool(runs) and all(own)

    def with_texts(self, decode: Callable[[int], str]) -> CandidateVerdict:
        """Return the verdict with the texts of the tokens at which runs failed."""
        return replace(self, runs=[_with_text(run, decode) for run in self.runs])

    @property
    def closest(self) -> Spot | None:
        """The tensor and point with the highest use of a budget, or None."""
        spots = [Spot(run, t, t.worst) for run in self.runs for t in run.tensors]
        return max(spots, key=lambda spot: spot.measured.use, default=None)

    @property
    def breach(self) -> Spot | None:
        """The first place outside its budget, or None.

        That is, in the first run that has one, the earliest comparison point with a tensor outside
        its budget, and there the tensor with the highest use.
        """
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


def _with_text(run: RunVerdict, decode: Callable[[int], str]) -> RunVerdict:
    failure = run.failure
    if failure is None or failure.token_id is None:
        return run
    return replace(run, failure=replace(failure, token_text=decode(failure.token_id)))


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
    """Compare the errors of a candidate in one mode with their budgets.

    Args:
      case: Name of the case.
      drift: Measurements against the reference, with those of the candidate.
      run: Name of the candidate, and the mode.
      own_drift: Measurements against float64, with those of PyTorch in the candidate's precision.
      own: Name of that PyTorch session in `own_drift`.
      precision: Precision of both.
      horizon_tokens: Tokens over which the fast weights remember, see `budgets`.
      table: Table of tolerances that applies.
    """
    found, usual = drift.runs[run], own_drift.runs[RunKey(own, run.mode)]
    count = min(len(found.tokens_read), len(usual.tokens_read))
    tokens_read = found.tokens_read[:count]
    if run.mode == TEACHER_FORCED:  # no error is older than one call
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
        usual.failure,
    )


def _steady(errors: Sequence[Error]) -> list[Error]:
    """Return, for each comparison point, the largest error of the whole run.

    For teacher-forced runs: errors of single steps do not grow, so they all sample one quantity,
    and the few at the first points say little about it. Largest differences are taken relative to
    the tensor's largest value, because the fast weights themselves do grow.
    """
    rms = max((e.relative_rms for e in errors), default=0.0)
    share = max((e.max_abs / e.scale for e in errors if e.scale), default=0.0)
    return [replace(e, max_abs=max(share * e.scale, e.max_abs), relative_rms=rms) for e in errors]


def _without_measure(failure: Failure | None) -> Failure | None:
    """Return the failure of a reference as one of the run, which then cannot be judged."""
    if failure is None:
        return None
    message = f"{failure.sentence}; without {failure.runtime} there is nothing to compare with"
    return Failure(failure.runtime, failure.step, failure.tokens_read, message)

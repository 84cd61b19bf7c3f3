"""Made-up verdicts and reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fwl_export.parity.cases import CASES, ModelLimits, choose_cases
from fwl_export.parity.compare import Error, Place, Prediction
from fwl_export.parity.coverage import Coverage
from fwl_export.parity.drift import Failure
from fwl_export.parity.report.data import CaseRun, Report
from fwl_export.parity.tolerances import TABLE, Budget, tolerance_for
from fwl_export.parity.verdict import CandidateVerdict, Measured, RunVerdict, TensorVerdict

# As wide as it may get: every line of its table is there.
_LIMITS = ModelLimits(256, 0, 49152, 256, 383)
_COVERAGE = Coverage(
    _LIMITS,
    ["plugin", "function body"],
    ["2", "default"],
    ["some runtime"],
    ["cases mixed8, far", "what takes more than 100 tokens"],
)
for _case in choose_cases("mixed,long,decode", 576, _LIMITS):
    for _call in _case.calls(np.arange(100), _LIMITS, 0):
        _COVERAGE.add(_call, [99_999] * len(_call.ids))
COVERAGE = _COVERAGE.to_dict()

# Tokens read at the comparison points.
POINTS = (31, 62, 125, 250, 500, 750, 1000, 1250, 1500, 1750, 123456)
BUDGET = Budget(1e-4, 1e-5)


def tensor(name: str, *uses: float) -> TensorVerdict:
    """Return the verdict on a tensor with these uses at its points; the last one repeats."""
    measured = []
    for index, tokens in enumerate(POINTS):
        use = uses[min(index, len(uses) - 1)]
        place = Place(index, tokens, (1, 2), 1.0 + use, 1.0)
        error = Error(use * BUDGET.max_abs, use * BUDGET.relative_rms / 2, 1.0, place)
        own = Error(1e-5, 1e-6, 1.0, place)
        measured.append(Measured(tokens, error, own, BUDGET))
    return TensorVerdict(name, "float32", tolerance_for(name), measured, [1] * 26)


def candidate(*tensors: TensorVerdict, failure: Failure | None = None) -> CandidateVerdict:
    predictions = [Prediction(100, 1e-9, 1e-8, 0.999, 0.998, 4.0, 4.0 + 1e-6)] * len(POINTS)
    runs = [
        RunVerdict("text", mode, tensors, predictions, predictions, failure)
        for mode in ("free", "forced")
    ]
    return CandidateVerdict("some runtime", "fp32", runs)


def report(*candidates: CandidateVerdict) -> Report:
    return Report(
        bundle="bundle",
        model_id="0" * 64,
        precision="fp32",
        max_tokens=256,
        text="the_winters_tale.txt",
        ids=[1, 2, 3],
        tokens=123456,
        seed=12,
        reference="torch:float64",
        strict=False,
        changed_tolerances={},
        table=TABLE,
        horizon_tokens=500.0,
        cases=[CaseRun(replace(case, tokens=1234), 12345, 256) for case in CASES],
        candidates=candidates,
        worst=[None] * len(candidates),
        coverage=COVERAGE,
        baseline=None,
        environment={"versions": {"numpy": "2"}},
        command="fwl-export check bundle",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


GOOD = candidate(tensor("logits", 0.2), tensor("position", 0), tensor("fast.up.bias", 0.1, 0.4))
WRONG = candidate(
    tensor("logits", 0.1, 0.2, 5.0), tensor("fast.up.bias", 0.1, 3.0), tensor("position", 0)
)
MANY = [tensor(f"cache.{i}.a_key_with_a_very_long_name", i / 30) for i in range(24)]
LOST = CandidateVerdict("tensorrt", "fp32", [], reason="no engine " + "x" * 300)
DIED = Failure("some runtime", 3, 31, "out of memory")

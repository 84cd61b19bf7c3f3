"""Verdicts on made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fwl_export.parity.compare import Error
from fwl_export.parity.drift import FREE_RUNNING, MODES, TEACHER_FORCED, Drift, RunDrift, RunKey
from fwl_export.parity.tolerances import Tolerance
from fwl_export.parity.verdict import judge


def error(max_abs: float, relative_rms: float, scale: float) -> Error:
    return Error(max_abs, relative_rms, scale, None)


def test_single_steps_are_measured_by_the_largest_of_the_run() -> None:
    row = Tolerance("x", 4, 5, 0, 0, "for this test")
    own = [error(0.1, 0.01, 1.0), error(0.4, 0.02, 8.0), error(0.2, 0.01, 2.0)]
    errors, dtypes = {"logits": own}, {"logits": "float32"}
    calls = [RunDrift([10, 20, 30], errors, dtypes=dtypes) for _ in range(2)]
    found = {}
    for mode in MODES:
        runs = {RunKey(name, mode): each for name, each in zip("ab", calls, strict=True)}
        drift = Drift(runs, largest_call=1)
        table = [replace(row, prefix="logits")]
        run = judge("text", drift, RunKey("a", mode), drift, "b", "fp32", 0.0, table)
        found[mode] = [m.budget for m in run.tensors[0].points]
    assert [b.relative_rms for b in found[FREE_RUNNING]] == [0.04, 0.08, 0.08]
    assert [b.relative_rms for b in found[TEACHER_FORCED]] == [0.08, 0.08, 0.08]
    # A tenth of the tensor's scale times the factor of 5; a budget never shrinks again.
    assert [b.max_abs for b in found[TEACHER_FORCED]] == pytest.approx([0.5, 4.0, 4.0])

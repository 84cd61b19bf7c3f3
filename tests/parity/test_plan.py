"""What is planned for a large model: runtimes that take turns, cases that end earlier."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.parity import check_bundle
from fwl_export.parity.candidates import Candidate
from fwl_export.parity.cases import AGAIN, FAR, ModelLimits, choose_cases
from fwl_export.parity.check import DEFAULT_CASES
from fwl_export.parity.compare import TensorSum
from fwl_export.parity.drift import _add
from fwl_export.parity.plan import _PROGRAMS, ModelSize, Plan, plan_check, slots_in_use
from fwl_export.parity.verdict import TensorVerdict
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import Session
from tests.bundles import VOCABULARY

TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)
BOTH = "onnxruntime:no-plugin,torch:float32"
LARGE = ModelSize(135_000_000, 98_000_000, 49_152)


def planned(bundle: Path, **options: Any) -> Plan:
    """Return the plan of all cases of a bundle."""
    opened = read_bundle(bundle)
    limits = ModelLimits.of_bundle(opened)
    chosen = choose_cases(DEFAULT_CASES, 576, limits)
    return plan_check(opened, chosen, limits, 0, BOTH, **options)


def _largest(tensor: TensorVerdict) -> float:
    return max(point.error.max_abs for point in tensor.points)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every bundle count as a model of 135 M parameters."""
    monkeypatch.setattr(ModelSize, "of", lambda manifest: LARGE)
    monkeypatch.setattr("fwl_export.parity.plan.available_memory", lambda: int(32e9))


def test_nothing_of_a_small_model_is_left_out(tiny_bundle: Path) -> None:
    plan = planned(tiny_bundle)
    assert (plan.in_turns, plan.sizes, plan.left_out) == (False, {}, [])
    assert plan == replace(planned(tiny_bundle, budget=None, memory=1e12), left_out=[])


@pytest.mark.usefixtures("large")
def test_a_large_model_is_checked_in_turns_and_what_is_left_out_is_named(tiny_bundle: Path) -> None:
    plan = planned(tiny_bundle)
    assert plan.in_turns
    assert plan.turns == 3
    assert plan == planned(tiny_bundle), "the same options give the same plan"
    assert plan.cases[-1].name == AGAIN
    named = " ".join(plan.left_out)
    assert "4.0 GB of memory" in named
    assert "for the time of 110 s" in named
    asked = {c.name: c for c in choose_cases(DEFAULT_CASES, 576, plan.limits)}
    for case in plan.cases:
        if case.tokens < asked[case.name].tokens and case.rows == asked[case.name].rows:
            assert f"{case.name} after {case.tokens} of" in named


@pytest.mark.usefixtures("large")
def test_without_a_budget_nothing_ends_earlier_and_all_free_memory_is_used(
    tiny_bundle: Path,
) -> None:
    plan = planned(tiny_bundle, budget=None)
    asked = choose_cases(DEFAULT_CASES, 576, plan.limits)
    assert {c.name for c in plan.cases} == {c.name for c in asked}
    assert all("for the time" not in note for note in plan.left_out)


@pytest.mark.usefixtures("large")
def test_more_time_and_memory_leave_out_less(tiny_bundle: Path) -> None:
    few, more = (planned(tiny_bundle, budget=seconds).tokens for seconds in (60, 240))
    assert few < more
    small, big = (
        {case.name for case in planned(tiny_bundle, memory=size).cases} for size in (4e9, 12e9)
    )
    assert small < big


def test_in_turns_a_check_finds_what_it_finds_side_by_side(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    together, turns = (
        check_bundle(bundle, TEXT, 60, candidates=BOTH, memory=memory)
        for memory in (None, _PROGRAMS + 6e6)
    )
    assert turns.passed, turns.problems()
    assert {run.case.name for run in turns.cases} >= {"text", "mixed1", AGAIN}
    assert turns.coverage["repeated"] == together.coverage["repeated"]
    assert turns.coverage["threads"] == together.coverage["threads"]
    calls = {run.case.name: run.calls for run in turns.cases}
    assert turns.coverage["calls"] == sum(calls.values()), "calls are counted in one turn only"
    for before, after in zip(together.candidates, turns.candidates, strict=True):
        found = {(run.case, run.mode): run for run in after.runs}
        for run in before.runs:
            if run.case not in ("text", "repeat"):
                continue  # these have the same calls in both checks
            for one, two in zip(run.tensors, found[run.case, run.mode].tensors, strict=True):
                assert _largest(one) == pytest.approx(_largest(two), rel=0.2, abs=1e-9)


def test_in_turns_no_two_candidates_are_in_memory(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0
    opening = Candidate.open

    def counted(self: Candidate, *arguments: Any) -> Session:
        nonlocal most
        session = opening(self, *arguments)
        gc.collect()
        if self.runtime == "onnxruntime":
            alive.append(weakref.ref(session._runner._model))  # type: ignore[attr-defined]
            most = max(most, sum(model() is not None for model in alive))
        return session

    monkeypatch.setattr(Candidate, "open", counted)
    # Without the plugin's library, the first would be the second, and is refused beside it.
    named = ["onnxruntime:no-plugin", *(["onnxruntime"] if find_plugin(ONNXRUNTIME) else [])]
    check_bundle(
        read_bundle(tiny_bundle), TEXT, 20, candidates=",".join(named), memory=_PROGRAMS + 2e6
    )
    assert len(alive) == 2 * len(named), "case 'again' opens each once more, with its own threads"
    assert most == 1


def test_a_slot_that_should_be_empty_counts_as_an_error() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 3, 4))
    found = np.zeros((2, 8, 4), np.float32)
    found[:, :3] = reference
    sums = []
    for wrong in (0.0, 0.5):
        found[1, 6, 2] = wrong
        short, whole = TensorSum(1), TensorSum(1)
        _add(short, 0, found, reference, (4, 9))
        expected = np.zeros((2, 8, 4))
        expected[:, :3] = reference
        whole.add(0, found, expected, 4, 9)
        assert short.result() == whole.result()
        assert short.ulp is not None
        assert np.array_equal(short.ulp, whole.ulp)
        sums.append(short.result().max_abs)
    assert sums[0] < 1e-6
    assert sums[1] == 0.5


def test_slots_in_use_follow_resets_copies_and_moves(tiny_bundle: Path) -> None:
    limits = ModelLimits.of_bundle(read_bundle(tiny_bundle))
    for case in choose_cases("text,mixed,decode", 60, limits):
        calls = list(case.calls(TEXT, limits, 0))
        at = np.zeros(case.rows, np.int64)
        most = 0
        for call in calls:
            at[list(call.reset)] = 0
            for source, target in call.forks:
                at[target] = at[source]
            for row, position in call.moves:
                at[row] = position
            at += call.lengths
            most = max(most, int(at.max()))
        assert slots_in_use(calls, case.rows) == most
    (far,) = choose_cases(FAR, 576, limits)
    assert slots_in_use(far.calls(TEXT, limits, 0), far.rows) > 10_000

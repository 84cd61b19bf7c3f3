"""Whole checks: an unbroken bundle passes with room to spare, and a broken one fails clearly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import fwl_export.parity
from fwl_export.bundle.manifest import CHECKPOINT_FOLDER, MANIFEST_FILE, read_bundle, write_manifest
from fwl_export.errors import BundleError, ReportError
from fwl_export.parity import CASES, Report, check_bundle, plan
from fwl_export.parity.verdict import CandidateVerdict
from fwl_export.runtimes import Session, open_session
from tests.bundles import MAX_TOKENS, TINY, VOCABULARY
from tests.parity import faults
from tests.parity.faults import Fault, broken_bundle

TOKENS = 120
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)

UNBROKEN = "unbroken"
# An unbroken bundle uses at most this share of a budget, and a broken one at least this multiple.
GOOD_USE = 0.6
CLEAR = 10


@dataclass(frozen=True)
class Planted:
    """A fault, and what the check must find.

    Attributes:
      fault: Function that changes the ONNX file.
      tensor: Tensor that must be outside its budget.
      untouched: Prefix of tensors that the fault cannot reach, so they must be within budget.
    """

    fault: Fault
    tensor: str
    untouched: str = "position"


_QKV = (TINY.backbone.width, 3 * TINY.backbone.width)

WEIGHTS = {
    "embedding": Planted(
        faults.weight("embedding.weight", (int(TEXT[3]), 3), added=1e-2), "cache.0.value"
    ),
    "attention": Planted(faults.unnamed_weight(_QKV, (5, 3), 1.01), "logits"),
    "norm of a block": Planted(
        faults.weight("blocks.0.norm_1.weight", (3,), added=1e-2), "cache.0.value"
    ),
    "up_kernel": Planted(
        faults.weight("fast_weights.up_kernel", (2, 3), factor=1.01), "pending.up", "cache."
    ),
    "up_bias": Planted(
        faults.weight("fast_weights.up_bias", (3,), added=1e-2), "pending.up", "cache."
    ),
    "down_kernel": Planted(
        faults.weight("fast_weights.down_kernel", (2, 3), factor=1.01), "pending.normed", "cache."
    ),
    "unembed": Planted(
        faults.weight("fast_weights.unembed", (5, 3), factor=1.01), "logits", "pending.normed"
    ),
    "unembed_bias": Planted(
        faults.weight("fast_weights.unembed_bias", (5,), added=1e-2), "logits", "pending.normed"
    ),
    "horizon": Planted(
        faults.weight("fast_weights.horizon", (), factor=1.01), "fast.up.kernel", "pending."
    ),
}

GRAPH = {
    "sign of the value, up": Planted(faults.negated_value(0), "fast.up.kernel", "pending."),
    "sign of the value, down": Planted(faults.negated_value(1), "fast.down.kernel", "pending."),
    "sign of the step, up": Planted(faults.added_instead(0), "logits", "fast."),
    "sign of the step, down": Planted(faults.added_instead(1), "logits", "fast."),
    "decay ignored, up": Planted(faults.ignored_decay(0), "fast.up.kernel", "pending."),
    "decay ignored, down": Planted(faults.ignored_decay(1), "fast.down.kernel", "pending."),
    "pending hidden of padding": Planted(
        faults.pending_of_padding("pending.hidden"), "pending.hidden", "cache."
    ),
    "pending expected of padding": Planted(
        faults.pending_of_padding("pending.expected"), "pending.expected", "cache."
    ),
    "pending norm of padding": Planted(
        faults.pending_of_padding("pending.inv_std"), "pending.inv_std", "cache."
    ),
    "pending rows rolled": Planted(faults.rolled_rows("pending.up"), "pending.up", "cache."),
    "labels shifted": Planted(faults.shifted_labels(), "fast.norm.bias", "pending."),
    "row leaks, bias": Planted(
        faults.rolled_rows("fast.up.bias", 1e-3), "fast.up.bias", "pending."
    ),
    "row leaks, kernel": Planted(
        faults.rolled_rows("fast.down.kernel", 1e-3), "fast.down.kernel", "pending."
    ),
    "stale cache": Planted(faults.stale("cache.1.value"), "cache.1.value", "cache.0"),
    "stale sum": Planted(faults.stale("fast.norm.scale"), "fast.norm.scale", "pending."),
}

ROUNDED = {
    "sum in half precision": Planted(
        faults.rounded_to_half("fast.up.kernel"), "fast.up.kernel", "pending."
    ),
    "bias in half precision": Planted(
        faults.rounded_to_half("fast.up.bias"), "fast.up.bias", "pending."
    ),
}

# Half precision hides faults that are smaller than its own roundings: a weight that is off by 1 %,
# or a sum that is rounded once more.
FP32 = {**WEIGHTS, **GRAPH, **ROUNDED}
FP16 = GRAPH


def checked(bundle: Path, planted: dict[str, Planted], folder: Path) -> Report:
    """Check a bundle, and a broken copy of it for each fault, side by side."""
    sessions = {UNBROKEN: session(bundle)}
    for number, (name, entry) in enumerate(planted.items()):
        broken = broken_bundle(bundle, folder / str(number), entry.fault)
        sessions[name] = session(broken.folder)
    return check_bundle(read_bundle(bundle), TEXT, TOKENS, candidates=sessions, cases="text")


def session(bundle: Path) -> Session:
    return open_session(bundle, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def fp32(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return checked(tiny_bundle, FP32, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def fp16(tiny_bundle_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return checked(tiny_bundle_fp16, FP16, tmp_path_factory.mktemp("faults"))


ANCHOR = {
    "anchor never moves": Planted(faults.stale("anchor.up.kernel"), "anchor.up.kernel", "cache."),
    "anchor of another row": Planted(
        faults.rolled_rows("anchor.down.kernel"), "anchor.down.kernel", "cache."
    ),
    "a stale sum": Planted(faults.stale("fast.norm.scale"), "anchor.norm.scale", "cache."),
}


@pytest.fixture(scope="module")
def anchored(anchored_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return checked(anchored_bundle, ANCHOR, tmp_path_factory.mktemp("faults"))


def test_an_unbroken_bundle_with_an_anchor_passes(anchored: Report) -> None:
    found = verdict(anchored, UNBROKEN)
    assert found.passed
    assert 0.05 < found.use < GOOD_USE, found.use
    assert "anchor.up.kernel" in [tensor.name for tensor in found.runs[0].tensors]


@pytest.mark.parametrize("name", ANCHOR)
def test_a_fault_of_the_anchor_is_caught(name: str, anchored: Report) -> None:
    assert_caught(verdict(anchored, name), ANCHOR[name])


def verdict(report: Report, name: str) -> CandidateVerdict:
    return next(candidate for candidate in report.candidates if candidate.name == name)


def test_public_names() -> None:
    names = fwl_export.parity.__all__
    assert {"check_bundle", "read_report", "to_text", "to_markdown", "write_junit"} <= set(names)
    assert all(hasattr(fwl_export.parity, name) for name in names)


@pytest.mark.parametrize("old", ["Backend", "parse_backend", "parse_backends"])
def test_old_names_work_and_warn(old: str) -> None:
    new = old.replace("Backend", "Candidate").replace("backend", "candidate")
    with pytest.warns(DeprecationWarning, match=f"{old} is now fwl_export.parity.{new}"):
        assert getattr(fwl_export.parity, old) is getattr(fwl_export.parity, new)
    with pytest.raises(AttributeError, match="has no attribute 'backend'"):
        _ = fwl_export.parity.backend


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_unbroken_bundle_passes_with_room_to_spare(
    precision: str, request: pytest.FixtureRequest
) -> None:
    report: Report = request.getfixturevalue(precision)
    found = verdict(report, UNBROKEN)
    assert found.passed
    assert 0.05 < found.use < GOOD_USE, found.use
    assert [(run.case, run.mode) for run in found.runs] == [("text", "free"), ("text", "forced")]
    names = [tensor.name for tensor in found.runs[1].tensors]
    assert names == ["logits", *(spec.name for spec in session_specs(report, request))]
    for run in found.runs:
        assert run.tokens_read[-1] == TOKENS
        assert len(run.tokens_read) >= 6
    assert report.horizon_tokens == 30
    assert found.precision == precision


def session_specs(report: Report, request: pytest.FixtureRequest) -> list[object]:
    name = "tiny_bundle" if report.precision == "fp32" else "tiny_bundle_fp16"
    return list(read_bundle(request.getfixturevalue(name)).manifest.state)


@pytest.mark.parametrize("name", FP32)
def test_a_fault_in_fp32_is_caught(name: str, fp32: Report) -> None:
    assert_caught(verdict(fp32, name), FP32[name])


@pytest.mark.parametrize("name", FP16)
def test_a_fault_in_fp16_is_caught(name: str, fp16: Report) -> None:
    assert_caught(verdict(fp16, name), FP16[name])


def assert_caught(found: CandidateVerdict, planted: Planted) -> None:
    uses = {tensor.name: tensor.use for tensor in found.runs[0].tensors}
    assert found.status == "outside"
    assert found.failure is None
    assert uses[planted.tensor] > CLEAR, uses
    assert found.breach is not None
    for name, use in uses.items():
        if name.startswith(planted.untouched):
            assert use < 1, (name, use)


def test_a_problem_names_the_tensor_and_the_tokens(fp32: Report) -> None:
    (problem,) = [p for p in fp32.problems() if p.startswith("stale cache ")]
    assert "is outside its budget, first in 'cache.1.value' (case 'text', free-running) " in problem
    assert UNBROKEN not in "".join(fp32.problems())
    assert len(fp32.problems()) == len(FP32)


@pytest.mark.parametrize("state", ["fast.down.bias", "pending.normed"])
def test_nan_is_a_failure_with_the_first_step(
    state: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", faults.not_a_number(state, 30))
    report = check_bundle(broken, TEXT, 60, candidates="onnxruntime", cases="text")
    (found,) = report.candidates
    assert (found.status, report.exit_code) == ("outside", 1)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.tensor) == ("not finite", state)
    assert found.failure.message.startswith(f"state '{state}' is nan in row ")
    # The call in which a row read its token 31; the first row may be some tokens behind.
    assert 31 - MAX_TOKENS < found.failure.tokens_read < 31 + MAX_TOKENS
    assert all(tensor.use < 1 for run in found.runs for tensor in run.tensors)
    assert report.problems()[0].startswith("onnxruntime is not finite up to token ")
    assert "(case 'text', free-running, call " in report.problems()[0]


def test_a_bundle_without_its_checkpoint_cannot_be_checked(own_bundle: Path) -> None:
    manifest = read_bundle(own_bundle).manifest.to_dict()
    manifest["files"] = {
        name: entry
        for name, entry in manifest["files"].items()
        if not name.startswith(CHECKPOINT_FOLDER)
    }
    write_manifest(own_bundle, manifest)
    with pytest.raises(BundleError, match=r"without its checkpoint.*without --no-checkpoint"):
        check_bundle(read_bundle(own_bundle), TEXT, 20)


def test_a_file_that_was_changed_is_refused_before_anything_is_compared(own_bundle: Path) -> None:
    data = own_bundle / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError, match=r"'model.onnx.data' in bundle"):
        check_bundle(read_bundle(own_bundle), TEXT, 20)
    assert (own_bundle / MANIFEST_FILE).is_file()


def test_cases_of_more_rows_than_memory_holds_are_left_out_and_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(tiny_bundle)
    row = sum(spec.bytes_per_row for spec in bundle.manifest.state)
    monkeypatch.setattr(plan, "_models_together", lambda size, candidates: 0.0)
    monkeypatch.setattr(plan, "_together", lambda size, chosen, candidates: 0.0)
    monkeypatch.setattr(plan, "available_memory", lambda: 3 * 32 * row / 0.8 + 1)
    report = check_bundle(bundle, TEXT, 20, candidates="onnxruntime", cases="mixed,far")
    assert [(run.case.name, run.case.rows) for run in report.cases] == [
        ("mixed1", 1),
        ("mixed2", 2),
        ("far", 3),
    ]
    assert report.passed, report.problems()
    assert report.coverage["rows"] == [1, 2, 3]
    left_out = " ".join(report.coverage["left_out"])
    assert "mixed5, mixed8" in left_out
    assert "more than 3 rows, whose states" in left_out


def test_the_same_seed_gives_the_same_numbers_and_a_report_replays(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    first, other = (
        check_bundle(bundle, TEXT, 30, seed, cases="text,mixed").to_dict() for seed in (5, 6)
    )
    settings = first["settings"]
    again = check_bundle(
        bundle,
        np.array(first["text"]["ids"]),
        settings["tokens"],
        settings["seed"],
        settings["candidates"],
        reference=settings["reference"],
        cases=settings["cases"],
    ).to_dict()
    assert first["candidates"] == again["candidates"]
    assert first["candidates"] != other["candidates"]


def test_every_kind_of_runtime_and_case_is_within_budget(tiny_bundle: Path) -> None:
    names = ["onnxruntime:no-plugin", "torch:float32", "onnx-reference@20"]
    report = check_bundle(read_bundle(tiny_bundle), TEXT, 60, candidates=names)
    assert report.passed, report.problems()
    assert [run.case.name for run in report.cases] == [case.name for case in CASES]
    ort, own, slow = report.candidates
    assert own.use == pytest.approx(
        1 / 5
    )  # it is its own yardstick, and the budget is 5 times its error
    assert ort.use > 0
    assert {max(run.tokens_read) for run in slow.runs} < {*range(20, 60)}
    assert {max(run.tokens_read) for run in ort.runs if run.case == "text"} == {60}
    assert "reference evaluator" in slow.runtime


def test_a_wrong_step_shows_when_teacher_forced_and_slow_drift_only_when_free_running(
    fp32: Report,
) -> None:
    def use(name: str, mode: str, tensor: str) -> float:
        (run,) = [run for run in verdict(fp32, name).runs if run.mode == mode]
        return next(t.use for t in run.tensors if t.name == tensor)

    assert use("up_kernel", "forced", "pending.up") > CLEAR
    # The wrong sum affects later logits, unless the state is corrected before every call.
    assert use("stale sum", "free", "logits") > 1 > use("stale sum", "forced", "logits")


def test_another_reference_needs_no_other_budget(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    report = check_bundle(
        bundle, TEXT, 40, candidates="onnxruntime:no-plugin", reference="onnxruntime", cases="text"
    )
    usual = check_bundle(bundle, TEXT, 40, candidates="onnxruntime:no-plugin", cases="text")
    budgets = [
        r.candidates[0].runs[0].tensors[0].worst.budget.relative_rms for r in (report, usual)
    ]
    assert report.passed
    assert min(budgets) > 0
    assert max(budgets) < 2 * min(budgets)


def test_a_candidate_that_cannot_be_opened_is_reported_and_the_others_are_checked(
    tiny_bundle: Path,
) -> None:
    names = "tensorrt:tensorrt,onnxruntime"
    report = check_bundle(read_bundle(tiny_bundle), TEXT, 20, candidates=names, cases="text")
    lost, found = report.candidates
    assert (lost.status, found.status, report.exit_code) == ("could not run", "within", 2)
    assert report.problems()[0].startswith("tensorrt:tensorrt could not run: ")


def test_strict_halves_budgets_and_a_users_limit_takes_their_place(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    usual, strict, given = (
        check_bundle(bundle, TEXT, 40, cases="text", **options)
        for options in ({}, {"strict": True}, {"tolerances": {"logits": {"relative_rms": 1e-12}}})
    )
    assert strict.candidates[0].use == pytest.approx(2 * usual.candidates[0].use)
    assert given.exit_code == 1
    assert "'logits'" in given.problems()[0]


def test_what_grew_since_the_baseline_is_outside(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    before = check_bundle(bundle, TEXT, 40, cases="text").to_dict()
    same = check_bundle(bundle, TEXT, 40, cases="text", baseline=before)
    assert same.passed
    for tensor in before["candidates"][0]["runs"][0]["tensors"]:
        tensor["relative_rms"] = [value / 100 for value in tensor["relative_rms"]]
        tensor["max_abs"] = [value / 100 for value in tensor["max_abs"]]
    grown = check_bundle(bundle, TEXT, 40, cases="text", baseline=before)
    assert grown.exit_code == 1
    assert "has a larger error than in the baseline" in grown.problems()[0]
    assert grown.to_dict()["baseline"]["grown"]
    for found in before["candidates"]:
        found["name"] = "another"
    with pytest.raises(ReportError, match="nothing in common with this check"):
        check_bundle(bundle, TEXT, 40, cases="text", baseline=before)


def test_a_report_has_the_tokens_around_the_worst_place(fp32: Report) -> None:
    data = fp32.to_dict()
    for candidate in data["candidates"]:
        worst = candidate["worst"]
        at = worst["tokens"][worst["at"]]
        assert at["in_call"] or worst["tensor"] != "logits"  # a row may have brought nothing
        assert {token["id"] for token in worst["tokens"]} <= set(data["text"]["ids"])

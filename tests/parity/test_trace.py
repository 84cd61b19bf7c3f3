"""Traces: what was recorded comes back, what passes `check` passes, and what is wrong is found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.bundle.state_file import checksum
from fwl_export.errors import CheckError, ReportError
from fwl_export.parity import check_bundle
from fwl_export.parity.against import check_against, check_origin
from fwl_export.parity.record import record_trace
from fwl_export.parity.trace import Trace, read_trace, sample_places, sampled, write_trace
from fwl_export.runtimes.base import Call
from tests.bundles import ANCHORED, without_checkpoint
from tests.parity import faults
from tests.parity.faults import broken_bundle

CASES = "text,mixed2,repeat"


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, 200)


@pytest.fixture(scope="module")
def path(tiny_bundle: Path, ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the tiny bundle."""
    target = tmp_path_factory.mktemp("trace") / "tiny.trace"
    write_trace(target, record_trace(read_bundle(tiny_bundle), ids, 60, cases=CASES, text="play"))
    return target


def test_what_was_recorded_comes_back(tiny_bundle: Path, ids: np.ndarray, path: Path) -> None:
    trace = record_trace(read_bundle(tiny_bundle), ids, 60, cases=CASES, text="play")
    found = read_trace(path)
    assert replace(found, cases=(), created="") == replace(trace, cases=(), created="")
    for traced, again in zip(trace.cases, found.cases, strict=True):
        assert again.case == traced.case
        assert again.own.errors == traced.own.errors
        assert again.own.predictions == traced.own.predictions
        for call, other in zip(traced.calls, again.calls, strict=True):
            for name in ("ids", "weights", "lengths", "scale", "positions", "wanted"):
                np.testing.assert_array_equal(getattr(call, name), getattr(other, name), name)
            for name in ("step", "reset", "forks", "moves", "tokens_read", "compare_state"):
                assert getattr(call, name) == getattr(other, name), name
        for name in ("picks", "labels", "logits"):
            np.testing.assert_array_equal(getattr(traced, name), getattr(again, name), name)
        for name in traced.samples:
            np.testing.assert_array_equal(traced.norms[name], again.norms[name], name)
            for one, two in zip(traced.samples[name], again.samples[name], strict=True):
                np.testing.assert_array_equal(one, two, name)


def test_a_trace_of_small_tensors_finds_what_check_finds(
    tiny_bundle: Path, ids: np.ndarray, path: Path
) -> None:
    bundle = read_bundle(tiny_bundle)
    report = check_against(bundle, read_trace(path), "onnxruntime:no-plugin", name="tiny.trace")
    assert report.passed, report.problems()
    full = check_bundle(bundle, ids, 60, candidates="onnxruntime:no-plugin", cases=CASES)
    whole = {(run.case, run.mode): run for run in full.candidates[0].runs}
    for run in report.candidates[0].runs:
        same = {tensor.name: tensor for tensor in whole[run.case, run.mode].tensors}
        for tensor in run.tensors:
            for point, other in zip(tensor.points, same[tensor.name].points, strict=True):
                # Errors of what is stored are at most the whole ones, and budgets are the same.
                assert point.budget == other.budget, (run.case, tensor.name)
                assert point.error.max_abs <= other.error.max_abs * (1 + 1e-9)
                assert point.error.relative_rms <= other.error.relative_rms * (1 + 1e-6) + 1e-15


FAULTS = {
    "a weight": faults.weight("up_kernel", (3, 5), added=0.1),
    "a negated value": faults.negated_value(0),
    "no decay": faults.ignored_decay(1),
    "a stale state": faults.stale("pending.hidden"),
    "half a state": faults.rounded_to_half("fast.up.kernel"),
    "rolled rows": faults.rolled_rows("cache.0.key"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(
    fault: faults.Fault, tiny_bundle: Path, path: Path, tmp_path: Path
) -> None:
    bundle = broken_bundle(tiny_bundle, tmp_path / "broken", fault)
    report = check_against(bundle, read_trace(path), "onnxruntime:no-plugin")
    assert report.status == "outside"
    assert "is outside its budget, first in" in report.problems()[0]


def test_a_bundle_without_a_checkpoint_is_checked_without_pytorch(
    path: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    own = without_checkpoint(tiny_bundle, tmp_path / "bare")
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'transformers'): sys.modules[name] = None\n"
        f"sys.argv = ['fwl-export', 'check', {str(own)!r}, '--against', {str(path)!r}]\n"
        "from fwl_export.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "text play, recorded in tiny.trace" in done.stdout
    assert json.loads((own / "reports" / "parity.json").read_text())["status"] == "within"


def test_a_candidate_in_another_precision_and_one_that_ends_early(
    tiny_bundle: Path, path: Path
) -> None:
    names = "onnxruntime@30,torch:float16,onnx-reference@16"
    report = check_against(read_bundle(tiny_bundle), read_trace(path), names)
    assert report.candidates[0].passed, report.problems()
    assert report.candidates[0].runs[0].tokens_read[-1] < 60
    assert report.candidates[1].reason == "the trace has budgets for fp32, not for fp16"
    assert report.exit_code == 2


def test_a_trace_of_another_model_is_refused(
    tiny_bundle: Path, anchored_bundle: Path, path: Path
) -> None:
    manifest, trace = read_bundle(tiny_bundle).manifest, read_trace(path)
    anchored = read_bundle(anchored_bundle).manifest
    for other, message in (
        (anchored, "is of another model: fast_weights.anchor_interval is 0, but 12 in"),
        (replace(manifest, precision="fp16"), "for a bundle in fp32, but this one is in fp16"),
        (replace(manifest, model_id="0" * 64), "of the same sizes with other weights; give the"),
        (replace(manifest, max_tokens=8), "calls of up to 16 tokens, but this bundle takes 8"),
    ):
        with pytest.raises(ReportError, match=re.escape(message)) as error:
            check_origin(other, trace, "a.trace")
        assert str(error.value).startswith("trace 'a.trace' ")
    check_origin(manifest, trace, "a.trace")


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change data and tensors of a trace, and write the checksum that fits."""
    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    data = json.loads(metadata["trace"])
    change(data, tensors)
    metadata["trace"] = json.dumps(data)
    metadata["sha256"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)


def drop_last_id(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["text.ids"] = tensors["text.ids"][:-1].copy()


def large_id(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["text.ids"][0] = 64


def infinite(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["text.norm.logits"][0] = np.inf


def no_end(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    data["cases"][0]["calls"][-1]["compare"] = False


def far_row(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    data["cases"][0]["calls"][0]["reset"] = [3]


def many_rows(data: dict[str, Any], tensors: dict[str, Any]) -> None:
    data["cases"][0]["rows"] = 1 << 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last_id, "is malformed ('ids' is too short); record it again"),
        (large_id, "'ids' has values outside of 0 to 63"),
        (infinite, "'norm.logits' holds NaN or infinite values"),
        (no_end, "case 'text' does not end with a comparison"),
        (far_row, "call 0 names a row that does not exist"),
        (many_rows, "'cases[0].rows' is 1099511627776; expected"),
    ],
)
def test_a_trace_that_contradicts_itself(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    message: str,
    path: Path,
    tmp_path: Path,
) -> None:
    own = Path(shutil.copy(path, tmp_path / "a.trace"))
    changed(own, change)
    with pytest.raises(ReportError, match=re.escape(message)) as error:
        read_trace(own)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_trace(path: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    content = path.read_bytes()
    own = tmp_path / "a.trace"
    for wrong, message in (
        (content[:-1], "is not a trace, or was truncated or changed ("),
        (content[:100], "(its header is incomplete); copy it again"),
        (b"", "(its header is incomplete)"),
        (b"hello, this is a text", "(its header is incomplete)"),
        (
            content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "was changed since it was recorded",
        ),
        (content.replace(b'\\"play\\"', b'\\"pray\\"', 1), "was changed since it was recorded"),
    ):
        own.write_bytes(wrong)
        with pytest.raises(ReportError, match=re.escape(message)):
            read_trace(own)
    weights = tiny_bundle / "checkpoint" / "model.safetensors"
    with pytest.raises(ReportError, match="is not a trace; expected a file that `fwl-export"):
        read_trace(weights)
    with pytest.raises(ReportError, match=r"cannot read trace '.*': No such file"):
        read_trace(tmp_path / "none")
    newer = {"format": "fwl-trace", "version": "2"}
    save_file({"a": np.zeros(1, np.float32)}, own, newer)
    with pytest.raises(ReportError, match="has version 2, but this fwl-export reads 1; record"):
        read_trace(own)


def test_nothing_is_recorded_where_pytorch_fails(
    tiny_bundle: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fwl_export.runtimes.torch import TorchRunner

    run = TorchRunner.run

    def failing(self: TorchRunner, call: Call, past: Any, present: Any) -> Any:
        logits = run(self, call, past, present)
        return logits * np.nan if logits.dtype == np.float32 else logits

    monkeypatch.setattr(TorchRunner, "run", failing)
    with pytest.raises(CheckError, match="nothing was recorded: PyTorch failed in case 'text'"):
        record_trace(read_bundle(tiny_bundle), ids, 60, cases="text")


def test_the_stored_elements_are_all_of_a_small_tensor_and_never_one_twice() -> None:
    for shape in ((1, 1), (3, 7), (3, 340), (8, 200704), (3, 2654435)):
        for is_last in (False, True):
            places = sample_places(shape, is_last)
            assert len(set(places.tolist())) == len(places) <= shape[1]
            assert places.max() < shape[1]
            if shape[1] <= 10 // shape[0]:
                assert len(places) == shape[1]
    array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    assert sorted(sampled(array, True)[1].tolist()) == list(range(12, 24))


def test_anchored_models_and_their_crossings(
    anchored_bundle: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    bundle: Bundle = read_bundle(anchored_bundle)
    assert bundle.manifest.config == ANCHORED
    trace: Trace = record_trace(bundle, ids, 60, cases="text,decode", seed=2)
    write_trace(tmp_path / "a.trace", trace)
    report = check_against(bundle, read_trace(tmp_path / "a.trace"), "onnxruntime")
    assert report.passed, report.problems()
    assert report.to_dict()["coverage"]["anchors"] > 0

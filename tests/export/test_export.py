"""Export: what it writes, what it refuses, and what it leaves behind when it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fwl_export.bundle.manifest import read_bundle
from fwl_export.bundle.onnx_file import count_ops
from fwl_export.errors import CheckpointError, ExportError, OutputExistsError
from fwl_export.export import export_bundle, trace, write_bundle
from fwl_export.op.spec import NODE_ATTRIBUTES
from fwl_export.precision.policy import in_precision
from tests.bundles import MAX_TOKENS, VOCABULARY, tiny_model, write_checkpoint


@pytest.fixture
def graph(tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_bundle / "model.onnx"), load_external_data=False)


def test_the_op_stays_one_node_with_a_body(graph: onnx.ModelProto) -> None:
    nodes = [node for node in graph.graph.node if node.domain == "fwl"]
    assert [node.op_type for node in nodes] == ["LinearAttentionUpdate"] * 2
    for node in nodes:
        found = {a.name: a.s.decode() for a in node.attribute}
        assert found == NODE_ATTRIBUTES
    (body,) = graph.functions
    assert (body.domain, body.name) == ("fwl", "LinearAttentionUpdate")
    assert {o.domain: o.version for o in graph.opset_import} == {"": 20, "fwl": 2}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_batch_and_tokens_are_dynamic(
    precision: str, tiny_bundle: Path, tiny_bundle_fp16: Path
) -> None:
    bundle = tiny_bundle if precision == "fp32" else tiny_bundle_fp16
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
    sizes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert sizes.pop("input_ids") == sizes.pop("label_weights") == ["batch", "tokens"]
    assert sizes.pop("lengths") == sizes.pop("learning_rate_scale") == ["batch"]
    assert sizes.pop("logit_positions") == ["batch", "positions"]
    assert sizes.pop("logits") == ["batch", "positions", VOCABULARY]
    state = read_bundle(bundle).manifest.state
    expected = {
        f"{side}.{s.name}": ["batch", *s.shape] for s in state for side in ("past", "present")
    }
    assert sizes == expected
    # Triton pairs past and present states by their index among the sorted names, so both must sort
    # alike.
    names = sorted(sizes)
    assert [n.split(".", 1)[1] for n in names if n.startswith("past.")] == [
        n.split(".", 1)[1] for n in names if n.startswith("present.")
    ]


def test_nothing_of_this_machine_is_in_the_files(tiny_bundle: Path) -> None:
    content = (tiny_bundle / "model.onnx").read_bytes() + (
        tiny_bundle / "manifest.json"
    ).read_bytes()
    for private in (str(Path(__file__).parents[2]), str(Path.home()), "/site-packages/"):
        assert private.encode() not in content


def test_the_manifest_tells_what_was_exported(tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    assert (manifest.precision, manifest.opset, manifest.max_tokens) == ("fp32", 20, MAX_TOKENS)
    assert manifest.op == {
        "domain": "fwl",
        "name": "LinearAttentionUpdate",
        "version": 2,
        "nodes": 2,
    }
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert manifest.state[0].name == "position"


def test_count_ops_leads_with_ours(tiny_bundle: Path) -> None:
    assert next(iter(count_ops(tiny_bundle / "model.onnx").items())) == (
        "fwl::LinearAttentionUpdate",
        2,
    )


def test_an_existing_output_is_not_overwritten(tmp_path: Path, own_bundle: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="exists and is not a bundle; choose another name"):
        export_bundle(checkpoint, tmp_path / "notes")
    with pytest.raises(OutputExistsError, match="is a bundle; choose another name or pass --force"):
        export_bundle(checkpoint, own_bundle)
    assert (tmp_path / "notes" / "a.txt").read_text() == "precious"


def test_the_only_copy_of_a_checkpoint_is_not_replaced_by_its_bundle(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "models" / "checkpoint")
    before = sorted(tmp_path.rglob("*"))
    for output in (checkpoint, checkpoint.parent):
        for include in (True, False):
            with pytest.raises(OutputExistsError, match="holds the checkpoint"):
                export_bundle(checkpoint, output, force=True, include_checkpoint=include)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_changes_meanwhile_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    original = write_bundle.run_once

    def change(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type] # passed through
        write_checkpoint(checkpoint, seed=1)

    monkeypatch.setattr(write_bundle, "run_once", change)
    with pytest.raises(ExportError, match="was changed while it was exported; export it again"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_force_does_not_replace_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "a.txt").write_text("precious")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(
        OutputExistsError, match="is or contains the current folder or your home folder"
    ):
        write_bundle.check_bundle_output(tmp_path, force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"opset": 27}, "opset 27 is not supported; expected 20"), ({"max_tokens": 0}, "1 or more")],
)
def test_unusable_options(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=re.escape(message)):
        export_bundle(checkpoint, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ExportError("broken")]
)
def test_a_failed_export_leaves_the_old_bundle(
    tmp_path: Path, own_bundle: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")

    def half_written(model: object, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(write_bundle, "export_onnx", half_written)
    with pytest.raises(type(error)):
        export_bundle(checkpoint, own_bundle, force=True)
    read_bundle(own_bundle).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_a_broken_checkpoint_writes_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="if it is truncated, copy"):
        export_bundle(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(bundle: Path, change: object) -> Path:
    path = bundle / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)  # type: ignore[operator]
    path.write_bytes(model.SerializeToString())
    return path


def test_the_checks_of_a_written_file_can_fail(own_bundle: Path) -> None:
    specs = list(read_bundle(own_bundle).manifest.state)
    path = own_bundle / "model.onnx"
    original = path.read_bytes()
    trace.check_onnx(path, specs, 20)

    def other_opset(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = model.functions[0].opset_import[0].version = 19

    def no_update(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.domain = "fwl2" if node.domain == "fwl" else node.domain
        model.functions[0].domain = "fwl2"
        model.opset_import.append(onnx.helper.make_opsetid("fwl2", 1))

    def fixed_size(model: onnx.ModelProto) -> None:
        value = next(i for i in model.graph.input if i.name == "input_ids")
        value.type.tensor_type.shape.dim[1].dim_value = 2

    def other_type(model: onnx.ModelProto) -> None:
        value = next(i for i in model.graph.input if i.name == "past.position")
        value.type.tensor_type.shape.dim[0].dim_param = "rows"

    for change, message in (
        (other_opset, "expected opset 20"),
        (no_update, "has 0 fwl::LinearAttentionUpdate nodes; expected 2"),
        (fixed_size, "takes 'input_ids' as int64 [batch, 2]; expected int64 [batch, tokens]"),
        (other_type, "state 'position' goes in as int64 [rows] and comes out as int64 [batch]"),
    ):
        with pytest.raises(ExportError, match=re.escape(message)):
            trace.check_onnx(broken(own_bundle, change), specs, 20)
        path.write_bytes(original)


def test_running_once_finds_what_does_not_run(own_bundle: Path) -> None:
    specs = list(read_bundle(own_bundle).manifest.state)
    path = own_bundle / "model.onnx"
    write_bundle.run_once(path, specs)
    data = path.with_name("model.onnx.data")
    poisoned = np.frombuffer(data.read_bytes(), np.float32).copy()
    poisoned[:] = np.nan
    data.write_bytes(poisoned.tobytes())
    with pytest.raises(
        ExportError, match=r"came out with shape .* and NaN or infinite values; expected finite"
    ):
        write_bundle.run_once(path, specs)
    path.write_bytes(b"nonsense")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run model\.onnx"):
        write_bundle.run_once(path, specs)


def test_precision_leaves_the_original_and_the_step_sizes_alone() -> None:
    model = tiny_model()
    model.fast_weights.steps["up_kernel"].fill_(1e-9)  # 0 in float16
    half = in_precision(model, "fp16")
    assert model.fast_weights.unembed.dtype == torch.float32
    assert half.fast_weights.unembed.dtype == torch.float16
    assert half.fast_weights.steps["up_kernel"] == model.fast_weights.steps["up_kernel"]
    assert half.fast_weights.horizon.dtype == torch.float32


def test_without_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    bundle = export_bundle(
        checkpoint, tmp_path / "out", max_tokens=MAX_TOKENS, include_checkpoint=False
    )
    assert not any(name.startswith("checkpoint/") for name in bundle.manifest.files)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schema_version"] == 3

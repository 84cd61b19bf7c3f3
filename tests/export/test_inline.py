"""The inlined file has no local functions and computes the same; other tools take it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from fwl_export.bundle.manifest import INLINED_FILE, MODEL_FILE, read_bundle
from fwl_export.errors import ExportError, PluginError
from fwl_export.export import export_bundle
from fwl_export.export.inline import write_inlined
from fwl_export.export.trace import export_onnx
from fwl_export.model.language_model import FWLModel
from fwl_export.precision.policy import PrecisionPolicy, parts
from fwl_export.runtimes import open_session
from tests.backbones import tiny_pretrained
from tests.bundles import ANCHORED, MAX_TOKENS, tiny_model, write_checkpoint
from tests.cli.run import run
from tools import conformance
from tools.conformance import Subject, in_onnxruntime, in_openvino


@pytest.fixture(scope="module")
def inlined_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, whose only ONNX file is inlined."""
    folder = tmp_path_factory.mktemp("inlined")
    checkpoint = write_checkpoint(folder / "checkpoint")
    export_bundle(checkpoint, folder / "bundle", max_tokens=MAX_TOKENS, inline=True)
    return folder / "bundle"


def test_the_second_file(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    assert bundle.file(INLINED_FILE).is_file(), "its hash is in the manifest"
    whole, inlined = (onnx.load(str(tiny_bundle / f)) for f in (MODEL_FILE, INLINED_FILE))
    assert whole.functions
    assert not inlined.functions
    assert [(o.domain, o.version) for o in inlined.opset_import] == [("", 20)]
    for side in ("input", "output"):
        assert list(getattr(whole.graph, side)) == list(getattr(inlined.graph, side))
    assert list(whole.metadata_props) == list(inlined.metadata_props)
    assert {t.name for t in whole.graph.initializer} <= {t.name for t in inlined.graph.initializer}
    assert len({node.name for node in inlined.graph.node}) == len(inlined.graph.node)


def test_the_second_file_shares_the_weights(tiny_bundle: Path) -> None:
    inlined = onnx.load(str(tiny_bundle / INLINED_FILE), load_external_data=False)
    stored = [t for t in inlined.graph.initializer if t.external_data]
    assert {e.value for t in stored for e in t.external_data if e.key == "location"} == {
        "model.onnx.data"
    }
    assert (tiny_bundle / INLINED_FILE).stat().st_size < 2 * (
        tiny_bundle / MODEL_FILE
    ).stat().st_size


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_both_files_compute_the_same(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    subject = Subject(folder)
    found = subject.logits(in_onnxruntime(folder / INLINED_FILE))
    for ours, theirs in zip(subject.expected, found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_bundle_whose_only_file_is_inlined(inlined_bundle: Path, tiny_bundle: Path) -> None:
    bundle = read_bundle(inlined_bundle)
    assert bundle.manifest.op["nodes"] == 0
    assert INLINED_FILE not in bundle.manifest.files
    assert not onnx.load(str(inlined_bundle / MODEL_FILE), load_external_data=False).functions
    for runtime in ("onnxruntime", "onnx-reference", "torch"):
        session = open_session(inlined_bundle, runtime)
        other = open_session(tiny_bundle, runtime, **_plain(runtime))
        for call in ([1, 2, 3], [4], [5] * 20):
            np.testing.assert_array_equal(session.feed(call), other.feed(call))


def _plain(runtime: str) -> dict[str, str]:
    return {"plugin": "none"} if runtime == "onnxruntime" else {}


def test_an_inlined_bundle_is_checked(
    inlined_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("ABCDEFGH" * 20)
    options = ("--text", tmp_path / "text", "--tokens", 40, "--candidates", "onnxruntime")
    done = run(capsys, "check", inlined_bundle, *options, "--report", tmp_path / "report.json")
    assert done.code == 0, done.err
    assert run(capsys, "inspect", inlined_bundle).code == 0


def test_a_plugin_that_has_nothing_to_compute_is_refused(inlined_bundle: Path) -> None:
    with pytest.raises(PluginError, match="exported with --inline and has no fast-weight updates"):
        open_session(inlined_bundle, plugin="required")


def test_what_cannot_be_inlined_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(str(tiny_bundle / MODEL_FILE))
    del model.functions[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match=re.escape("operators of the domains ['fwl']")):
        write_inlined(tmp_path / "model.onnx", tmp_path / "out.onnx")


def _int8() -> tuple[FWLModel, PrecisionPolicy]:
    model = tiny_model()
    return model, PrecisionPolicy("int8w", list(parts(model, "int8w")), [])


MODELS = {
    "decoder": lambda: (tiny_model(), "fp32"),
    "decoder fp16": lambda: (tiny_model(), "fp16"),
    "decoder int8w": _int8,
    "anchors": lambda: (tiny_model(config=ANCHORED), "fp32"),
    "GPT-2": lambda: (tiny_pretrained("GPT-2"), "fp32"),
    "Llama": lambda: (tiny_pretrained("Llama"), "fp32"),
    "Gemma 2, with a soft cap": lambda: (tiny_pretrained("Gemma 2"), "fp32"),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_inferred_with_their_names(name: str, tmp_path: Path) -> None:
    model, precision = MODELS[name]()
    path, inlined = tmp_path / MODEL_FILE, tmp_path / INLINED_FILE
    export_onnx(model, path, precision, 12, 20)
    write_inlined(path, inlined)
    for file in (path, inlined):
        conformance.onnx_shapes(file)
        if precision == "fp16" and file == path:
            # It does not know ReduceMax, by which half precision is scaled, with axes as an input.
            with pytest.raises(TypeError, match="NoneType"):
                conformance.symbolic_shapes(file)
        else:
            conformance.symbolic_shapes(file)
        graph = onnx.load(str(file), load_external_data=False).graph
        sizes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
        assert sizes["input_ids"] == ["batch", "tokens"]


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_openvino_runs_the_inlined_file(bundle: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install openvino")
    folder = request.getfixturevalue(bundle)
    subject = Subject(folder)
    _, verdict = subject.verdict(subject.logits(in_openvino(folder / INLINED_FILE)))
    assert verdict == "the same"


def test_openvino_runs_a_hugging_face_backbone(tmp_path: Path) -> None:
    """It computes int64 in 32 bits, which the phases of rotary embeddings must allow for."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install openvino")
    from fwl_export.model.checkpoint import save_checkpoint
    from tests.bundles import tiny_tokenizer

    save_checkpoint(tmp_path / "checkpoint", tiny_pretrained("Llama"), tiny_tokenizer())
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", max_tokens=MAX_TOKENS)
    subject = Subject(tmp_path / "bundle")
    _, verdict = subject.verdict(subject.logits(in_openvino(tmp_path / "bundle" / INLINED_FILE)))
    assert verdict == "the same"

"""The table of other tools: what is the same, what is not, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from fwl_export.bundle.manifest import MODEL_FILE
from tools import conformance
from tools.conformance import NODE_FILES, Subject, rows


@pytest.fixture(scope="module")
def subject(tiny_bundle: Path) -> Subject:
    return Subject(tiny_bundle)


def test_tools_that_are_always_installed(subject: Subject) -> None:
    table = [*rows(subject, ["reference", "extended", "shape inference"])]
    assert len(table) == 8
    for row in table:
        assert row.verdict in ("the same", "complete, all sizes keep their names"), str(row)
        assert row.version


def test_other_logits_are_called_so(subject: Subject, tmp_path: Path) -> None:
    def spoiled(source: Path, target: Path) -> None:
        model = onnx.load(str(source))
        weights = next(t for t in model.graph.initializer if len(t.dims) == 2)
        array = onnx.numpy_helper.to_array(weights) * np.float32(1.01)
        weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
        onnx.save(model, str(target))

    found = conformance._rewritten(subject, subject.folder / MODEL_FILE, spoiled)
    difference, verdict = subject.verdict(found)
    assert difference > 1e-4
    assert verdict.startswith("**other logits**")
    assert subject.verdict([logits[:, :1] for logits in found])[1] == "**wrong shapes**"


def test_what_a_tool_says_is_its_row(subject: Subject) -> None:
    def refuses() -> None:
        raise ValueError("\nno | such operator\nsecond line")

    row = conformance._tried("a tool", "numpy", "a file", refuses, subject)
    assert str(row).endswith("| a file |  | **refused**: no / such operator |")
    row = conformance._tried("a tool", "no-such-package", "a file", refuses, subject)
    assert (row.version, row.verdict) == ("", "not installed")


def test_a_size_without_its_name_is_found(tiny_bundle: Path) -> None:
    before = onnx.load(str(tiny_bundle / MODEL_FILE), load_external_data=False)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    after.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    with pytest.raises(ValueError, match="input_ids has another shape"):
        conformance._check_shapes(before, after)


def test_packages_for_node_are_pinned() -> None:
    package = json.loads((NODE_FILES / "package.json").read_text(encoding="utf-8"))
    assert package["private"]
    assert all(version[0].isdigit() for version in package["dependencies"].values())
    assert set(package["dependencies"]) == set(conformance.NODE_LIBRARIES)


def test_onnxruntime_for_node(subject: Subject) -> None:
    installed = Path("build") / "node"
    if shutil.which("node") is None or not (installed / "node_modules").is_dir():
        pytest.skip(
            "build/node has no packages: python -m tools.conformance BUNDLE --node build/node"
        )
    table = [*rows(subject, conformance.NODE_LIBRARIES, installed)]
    assert [row.verdict for row in table] == ["the same"] * 4

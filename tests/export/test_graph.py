"""The traced graph beside the ONNX file computes what the module does, under the same names."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from fwl_export.bundle.manifest import GRAPH_FILE, MODEL_FILE, read_bundle
from fwl_export.bundle.state import PAST
from fwl_export.errors import BundleError
from fwl_export.export.trace import example_inputs
from fwl_export.model.streaming import INPUTS
from fwl_export.model.traced_graph import TracedGraph, read_graph
from fwl_export.runtimes.torch import load_model
from tests.tolerances import assert_close

BUNDLES = ("tiny_bundle", "tiny_bundle_fp16", "anchored_bundle")


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.mark.parametrize("precision", ["fp64", None])
def test_it_computes_what_the_module_does(bundle: Path, precision: str | None) -> None:
    opened = read_bundle(bundle)
    model = load_model(opened, precision)
    parameters = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    arguments = [*example_inputs(2, 5)]
    for spec in model.specs:
        tensor = torch.zeros(2, *spec.shape, dtype=getattr(torch, spec.dtype))
        arguments.append(torch.rand_like(tensor) if tensor.is_floating_point() else tensor)
    names = [*INPUTS, *(PAST + spec.name for spec in model.specs)]
    kind = torch.float64 if precision == "fp64" else torch.float32
    graph = read_graph(opened.file(GRAPH_FILE))
    values = graph.run(parameters, dict(zip(names, arguments, strict=True)), kind)
    with torch.inference_mode():
        expected = model(*arguments)
    assert len(expected) == len(graph.outputs)
    for name, right in zip(graph.outputs.values(), expected, strict=True):
        if precision == "fp64" and opened.manifest.precision == "fp16":
            # The traced graph scales the rows that were float16, which float64 does not need.
            assert_close("model.float64", values[name], right, name)
        else:
            assert torch.equal(values[name], right), name


def test_its_names_are_those_of_the_onnx_file_and_its_scopes_those_of_the_model(
    tiny_bundle: Path,
) -> None:
    graph = read_graph(tiny_bundle / GRAPH_FILE)
    model = onnx.load(str(tiny_bundle / MODEL_FILE), load_external_data=False)
    names = {name for node in model.graph.node for name in node.output}
    assert set(graph.outputs) == {output.name for output in model.graph.output}
    shared = [o for o in graph.operations if o.name in names]
    assert len(shared) > 0.7 * len(names)
    scopes = {operation.scope for operation in graph.operations}
    for scope in (
        "backbone.blocks.1.attention.attend",
        "backbone.blocks.0.norm_1",
        "fast_weights.slow/normalize",
        "fast_weights.fast/normalize",
        "fast_weights.gradients",
    ):
        assert scope in scopes
    modules = dict(load_model(read_bundle(tiny_bundle)).model.named_modules())
    assert {s.partition("/")[0].rpartition(".")[0] or s for s in scopes if s} <= {
        *modules,
        *(scope for scope in scopes if scope in modules),
    }


def test_it_holds_no_path_and_can_be_written_again(tiny_bundle: Path, tmp_path: Path) -> None:
    text = (tiny_bundle / GRAPH_FILE).read_text()
    assert "site-packages" not in text
    assert ".py" not in text
    graph = read_graph(tiny_bundle / GRAPH_FILE)
    graph.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema_version is 9, but this fwl-export reads 1"),
        ({"operations": [{"nonsense": 1}]}, "is malformed"),
        ({"outputs": None}, "is malformed"),
    ],
)
def test_what_cannot_be_read(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / GRAPH_FILE
    TracedGraph({}, [], {}).write(path)
    assert read_graph(path) == TracedGraph({}, [], {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        read_graph(path)


def test_text_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / GRAPH_FILE).write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        read_graph(tmp_path / GRAPH_FILE)

"""The imported block computes what the paper's code computed, in every form we have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from fwl_export.bundle.config import BackboneConfig, ModelConfig
from fwl_export.bundle.state import PAST, PRESENT, TensorSpec, zeros
from fwl_export.export.trace import example_inputs, export_onnx
from fwl_export.importers import import_block
from fwl_export.model.backbones import Decoder
from fwl_export.model.fast_weights import FastWeights
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import INPUTS, StreamingModel
from tests.tolerances import assert_close

DATA = Path(__file__).parents[1] / "data"
SOURCES = {
    "jax": ("fwl_reference_jax.npz", "importers/jax.msgpack", "importers/jax_orbax"),
    "tf": ("fwl_reference_tf.npz", "importers/tf_checkpoint", "importers/tf_checkpoint/ckpt-1"),
}
Variant = Literal["jax", "tf"]
Feeds = dict[str, np.ndarray]


class TableBackbone(Decoder):
    """A backbone that returns the reference's hidden states, whatever the tokens are."""

    table: Tensor

    def __init__(self, config: BackboneConfig, vocab_size: int, table: Tensor) -> None:
        super().__init__(config, vocab_size)
        self.register_buffer("table", table)

    def stream(
        self, input_ids: Tensor, position: Tensor, lengths: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        rows = torch.arange(input_ids.shape[0]) % self.table.shape[0]
        steps = position[:, None] + torch.arange(input_ids.shape[1])
        return self.table[rows[:, None], steps.clamp(max=self.table.shape[1] - 1)], caches


def reference(variant: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"fwl_reference_{variant}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def imported(variant: Variant, source: str) -> FastWeights:
    """Return the layer that is imported from a file in tests/data, in float64."""
    block = import_block(variant, DATA / source, float(reference(variant)["loss_normalizer"]))
    assert block.vocab_size is not None
    layer = FastWeights(block.config, block.vocab_size).double().requires_grad_(False)
    layer.load_state_dict(dict(block.tensors))
    return layer


def model_of(variant: Variant) -> FWLModel:
    """Return a model with the imported block on a backbone that returns the reference's states."""
    layer = imported(variant, SOURCES[variant][1])
    size, vocabulary = layer.config.input_size, len(layer.unembed)
    backbone = BackboneConfig(width=size, layers=1, heads=1, window=4)
    model = FWLModel(ModelConfig(vocabulary, backbone, layer.config)).double()
    table = torch.from_numpy(reference(variant)["hidden"])
    model.backbone = TableBackbone(backbone, vocabulary, table).double()
    model.fast_weights = layer
    return model.eval().requires_grad_(False)


def calls(variant: str, lengths: list[int]) -> Iterator[Feeds]:
    """Yield the calls that read the reference's texts, in parts of the given lengths.

    The label of a position is the token after it, and its weight is that token's.
    """
    arrays = reference(variant)
    tokens = np.pad(arrays["labels"], ((0, 0), (1, 0)))[:, :-1]
    weights = np.pad(arrays["weights"], ((0, 0), (1, 0)))[:, :-1].astype(np.float32)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        example = example_inputs(len(tokens), length)
        feeds = {name: t.numpy() for name, t in zip(INPUTS, example, strict=True)}
        yield {**feeds, "input_ids": tokens[:, part], "label_weights": weights[:, part]}
        start += length


def stream(
    run: Callable[[Feeds], Feeds], specs: list[TensorSpec], variant: str, lengths: list[int]
) -> np.ndarray:
    """Return the logits [B, T, V] of all calls, each continuing from the state of the last."""
    state, logits = zeros(specs, 2), []
    for feeds in calls(variant, lengths):
        results = run({**feeds, **{PAST + name: array for name, array in state.items()}})
        state = {spec.name: results[PRESENT + spec.name] for spec in specs}
        logits.append(results["logits"])
    return np.concatenate(logits, 1)


@pytest.mark.parametrize(
    ("variant", "source"), [(v, source) for v, sources in SOURCES.items() for source in sources]
)
def test_the_parallel_form(variant: Variant, source: str) -> None:
    arrays = reference(variant)
    layer = imported(variant, source)
    inputs = [torch.from_numpy(arrays[name]) for name in ("hidden", "labels", "weights")]
    fast, slow = layer.parallel(*inputs)
    assert_close("model.paper_code", fast, arrays["fast_logits"])
    assert_close("model.paper_code", slow, arrays["slow_logits"])


@pytest.mark.parametrize("variant", ["jax", "tf"])
@pytest.mark.parametrize("lengths", [[24], [1, 7, 16], [1] * 24], ids=str)
def test_the_streaming_form(variant: Variant, lengths: list[int]) -> None:
    model = StreamingModel(model_of(variant), max(lengths))
    names = [spec.name for spec in model.specs]

    def run(feeds: Feeds) -> Feeds:
        order = [*INPUTS, *(PAST + name for name in names)]
        results = model(*(torch.from_numpy(feeds[name]) for name in order))
        outputs = ["logits", *(PRESENT + name for name in names)]
        return {name: t.numpy() for name, t in zip(outputs, results, strict=True)}

    logits = stream(run, model.specs, variant, lengths)
    assert_close("model.paper_code", logits, reference(variant)["fast_logits"])


@pytest.mark.parametrize("variant", ["jax", "tf"])
def test_onnx_runtime_and_the_reference_evaluator(variant: Variant, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    specs = export_onnx(model_of(variant).float(), path, "fp32", 16, 20)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    evaluator = ReferenceEvaluator(onnx.load(str(path)))
    names = [output.name for output in session.get_outputs()]
    for runtime in (session, evaluator):

        def run(feeds: Feeds, runtime: object = runtime) -> Feeds:
            return dict(zip(names, runtime.run(names, feeds), strict=True))

        logits = stream(run, specs, variant, [1, 16, 7])
        assert_close("importers.float32", logits, reference(variant)["fast_logits"])
        with pytest.raises(AssertionError):
            assert_close("importers.float32", logits, reference(variant)["slow_logits"])

"""Precision policies: what they quantize, what they refuse, and that exports compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fwl_export.bundle.manifest import read_bundle
from fwl_export.errors import ConfigError, ExportError
from fwl_export.export import export_bundle
from fwl_export.parity import check_bundle
from fwl_export.precision.int8 import Int8Weight
from fwl_export.precision.policy import (
    UPDATE,
    PrecisionPolicy,
    dequantize,
    parts,
    quantize,
    read_policy,
    streaming_model,
    with_stored_weights,
    write_policy,
)
from tests.bundles import MAX_TOKENS, VOCABULARY, tiny_model, write_checkpoint


def policy_excluding(target: str, *excluded: str) -> PrecisionPolicy:
    names = list(parts(tiny_model(), target))
    return PrecisionPolicy(target, [n for n in names if n not in excluded], list(excluded))


def test_the_parts_are_the_matrices_and_the_updates() -> None:
    names = list(parts(tiny_model(), "fp16"))
    assert names[:3] == [
        "backbone.embedding",
        "backbone.blocks.0.attention.qkv",
        "backbone.blocks.0.attention.out",
    ]
    assert names[-2:] == ["fast_weights.unembed", UPDATE]
    assert len(names) == 1 + 2 * 4 + 3 + 1
    assert list(parts(tiny_model(), "int8w")) == names[:-1]


def test_quantizing_leaves_the_original_and_the_excluded_parts_alone() -> None:
    model = tiny_model()
    excluded = "backbone.blocks.1.up"
    quantized = streaming_model(model, policy_excluding("fp16", excluded), MAX_TOKENS).model
    assert model.fast_weights.unembed.dtype == torch.float32
    assert quantized.fast_weights.unembed.dtype == torch.float16
    assert quantized.get_submodule(excluded).weight is model.get_submodule(excluded).weight
    assert quantized.get_submodule("backbone.blocks.1.down").weight.dtype == torch.float16


def test_int8_is_exact_to_half_a_step_and_what_onnx_computes() -> None:
    weight = torch.randn(5, 7)
    weight[3] = 0.0
    values, scale = quantize(weight, 0)
    restored = dequantize(values, scale, 0)
    assert (restored - weight).abs().le(scale[:, None] * 0.5001).all()
    stored = Int8Weight(values.numpy(), scale.numpy(), 0)
    np.testing.assert_array_equal(stored.dequantized(), restored.numpy())
    np.testing.assert_array_equal(stored.transposed.dequantized(), restored.numpy().T)


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    policy = policy_excluding("fp16", UPDATE)
    write_policy(tmp_path / "policy.json", policy)
    found = read_policy(tmp_path / "policy.json")
    assert found.to_dict() == policy.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema_version is 9, but this fwl-export reads 1"),
        (
            {"target": "fp4"},
            "'target' is 'fp4'; expected 'fp16' or 'bf16' or 'int8w'; make it again",
        ),
        ({"kept": [UPDATE], "lowered": [UPDATE]}, f"lists '{UPDATE}' in both 'kept' and"),
        (
            {"kept": "all"},
            "'kept' is 'all'; expected a list; make it again with `fwl-export precision`",
        ),
    ],
)
def test_files_that_are_not_policies(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**policy_excluding("fp16").to_dict(), **change}))
    with pytest.raises(ConfigError, match=message.replace("'", ".")):
        read_policy(path)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = PrecisionPolicy("fp16", ["backbone.blocks.9.up"], [])
    with pytest.raises(ConfigError, match="belongs to another model: the policy lacks the part"):
        with_stored_weights(tiny_model(), policy)


@pytest.mark.parametrize("target", ["fp16", "int8w"])
def test_an_export_under_a_policy_passes_its_check(target: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    policy = policy_excluding(target, "backbone.blocks.0.attention.out")
    bundle = export_bundle(checkpoint, tmp_path / "out", max_tokens=MAX_TOKENS, policy=policy)
    assert bundle.manifest.precision == {"fp16": "mix16", "int8w": "int8w"}[target]
    assert all(spec.dtype != "float16" for spec in bundle.manifest.state)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 200)
    report = check_bundle(read_bundle(tmp_path / "out"), ids, tokens=24, cases="text")
    assert report.passed, report.problems()


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [("bf16", "fp32", "has no bf16 kernels"), ("fp16", "fp16", "give one of the two")],
)
def test_exports_that_are_refused(
    target: str, precision: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(tmp_path, tmp_path / "out", precision, policy=policy_excluding(target))
    assert not (tmp_path / "out").exists()

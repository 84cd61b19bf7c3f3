"""`bisect` explains what is not finite: the first tensor, its type, and the numbers before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwl_export.bisect import Bisection, bisect_bundle
from fwl_export.bundle.manifest import read_bundle
from tests.bundles import VOCABULARY
from tests.parity import faults
from tests.parity.faults import Fault, broken_bundle
from tests.parity.planted import OVERFLOWS

TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)
UPDATE, SCORES = OVERFLOWS


def bisected(bundle: Path, folder: Path, fault: Fault, cases: str) -> Bisection:
    broken = broken_bundle(bundle, folder / "broken", fault)
    return bisect_bundle(broken, TEXT, "onnxruntime:no-plugin", 120, cases=cases)


@pytest.mark.parametrize(("name", "cases"), [(UPDATE, "endless@64"), (SCORES, "text")])
def test_an_overflow_is_explained(name: str, cases: str, tiny_bundle: Path, tmp_path: Path) -> None:
    result = bisected(tiny_bundle, tmp_path, OVERFLOWS[name], cases)
    found = result.finding
    assert found is not None, result.to_text()
    assert (found.kind, found.op_type, found.fault) == ("range", "Cast", "file"), result.to_text()
    overflow = found.overflow
    assert overflow is not None
    assert (overflow.dtype, overflow.largest) == ("float16", 65504)
    assert overflow.largest_input > 65504
    assert not np.isfinite(overflow.value)
    assert found.tensor.endswith(".half")
    assert found.row is not None
    assert result.exit_code == 1
    text = result.to_text()
    assert f"first at   token {found.token} of row {found.row} (id {found.token_id})" in text
    assert "the largest float16 is 65504" in text
    assert "the bundle is fp32, but the file computes this in float16" in text
    if name == UPDATE:
        assert found.token is not None
        assert found.token > 3
        assert found.module.startswith("fast_weights"), found.module
    else:
        assert "attention" in found.module, found.module


def test_nan_in_the_weights_is_the_fault_of_the_file(tiny_bundle: Path, tmp_path: Path) -> None:
    fault = faults.weight("fast_weights.up_kernel", (2, 3), added=np.inf)
    result = bisected(tiny_bundle, tmp_path, fault, "text")
    assert result.finding is not None
    assert result.finding.fault == "file", result.to_text()
    assert any(name.endswith("up_kernel") for name in result.finding.wrong_weights)


def test_a_number_too_large_for_float16_is_the_fault_of_nobody(tmp_path: Path) -> None:
    """A float16 model whose numbers really grow too large, in PyTorch too."""
    result = _of_a_large_model(tmp_path)
    found = result.finding
    assert found is not None, result.to_text()
    assert (found.kind, found.fault) == ("range", "range"), result.to_text()
    assert found.overflow is not None
    assert found.overflow.dtype == "float16"
    assert found.overflow.reference is None or abs(found.overflow.reference) > 65504
    assert "not the exporter or the runtime" in result.to_text()


def _of_a_large_model(folder: Path) -> Bisection:
    from fwl_export.export import write_bundle
    from fwl_export.model.checkpoint import save_checkpoint
    from tests.bundles import MAX_TOKENS, tiny_model, tiny_tokenizer

    model = tiny_model()
    # The values of this attention, float16 in the cache, are above 65504 for some tokens.
    width = model.config.backbone.width
    attention = model.backbone.blocks[1].attention
    attention.qkv.weight[2 * width :] *= 30_000
    attention.out.weight /= 30_000
    save_checkpoint(folder / "checkpoint", model, tiny_tokenizer())
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(write_bundle, "_read_repeated", lambda *arguments: None)
        bundle = write_bundle.export_bundle(
            folder / "checkpoint", folder / "bundle", "fp16", max_tokens=MAX_TOKENS
        )
    return bisect_bundle(
        read_bundle(bundle.folder), TEXT, "onnxruntime:no-plugin", 60, cases="text"
    )

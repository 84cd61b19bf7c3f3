"""Models that share no code with ours, converted as the checkpoint page says, and exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwl_export.export import export_bundle
from fwl_export.model.pretrained import join_checkpoint
from fwl_export.runtimes import open_session
from tests.backbones import tiny_causal, write_backbone
from tests.bundles import tiny_tokenizer
from tests.foreign_model import ForeignModel, ForeignOnTransformers
from tests.tolerances import assert_close

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "checkpoint.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the code of the page defines."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), names)
    return names


def assert_same(bundle: Path, foreign: ForeignModel, ids: Tensor) -> None:
    """Compare a bundle's logits, adapting to a text, with those of the foreign module."""
    found = open_session(bundle, "onnxruntime").feed(ids.numpy())[0]
    expected = foreign.double()(ids)
    assert_close("foreign.bundle", found, expected.numpy())
    still = torch.stack([foreign(ids[t : t + 1])[0] for t in range(len(ids))])
    assert (still - expected).abs().max() > 0.1  # it did learn


def test_a_foreign_model(page: dict[str, Any], tmp_path: Path) -> None:
    foreign = ForeignModel()
    page["convert"](foreign, tiny_tokenizer(40), tmp_path / "converted")
    export_bundle(tmp_path / "converted", tmp_path / "bundle", max_tokens=16)
    assert_same(tmp_path / "bundle", foreign, torch.randint(0, 40, (40,)))


def test_a_foreign_layer_on_a_language_model(page: dict[str, Any], tmp_path: Path) -> None:
    foreign = ForeignOnTransformers(tiny_causal("Llama"))
    page["convert_layer"](foreign, tmp_path / "layer")
    backbone = write_backbone(tmp_path / "backbone", "Llama")
    join_checkpoint(backbone, tmp_path / "layer", tmp_path / "joined")
    export_bundle(tmp_path / "joined", tmp_path / "bundle", max_tokens=16)
    assert_same(tmp_path / "bundle", foreign, torch.randint(0, 64, (40,)))

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fwl_export.model.checkpoint import load_checkpoint, save_checkpoint
from fwl_export.model.stored import all_finite
from tests.backbones import tiny_pretrained
from tests.bundles import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_finite_finds_one_bad_number(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 111).to(dtype)
    tensor[3, 3] = torch.finfo(dtype).max
    assert all_finite(tensor)
    assert all_finite(tensor[:0])
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 400, 776):
            changed = tensor.clone().flatten()
            changed[place] = bad
            assert not all_finite(changed)


@pytest.mark.parametrize("backbone", ["decoder", "GPT-2", "Gemma 2"])
def test_loading_draws_no_random_numbers(backbone: str, tmp_path: Path) -> None:
    model = tiny_model() if backbone == "decoder" else tiny_pretrained(backbone)
    save_checkpoint(tmp_path / "checkpoint", model, tiny_tokenizer())
    before = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "checkpoint").model
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

"""A new layer for a pretrained backbone says what the backbone says."""

from __future__ import annotations

import pytest
import torch

from fwl_export.errors import ConfigError
from fwl_export.model.language_model import FWLModel
from fwl_export.model.new_layer import final_norm
from tests.backbones import ARCHITECTURES, tiny_causal

IDS = (torch.arange(48) * 7 + 3)[None] % 60
# Its hidden states come from a projection after the norm.
WITHOUT_NORM = "OPT"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {WITHOUT_NORM}))
def test_the_final_norm_is_found(name: str) -> None:
    model = FWLModel.from_pretrained(tiny_causal(name))
    norm = final_norm(model.backbone)
    layer = model.fast_weights
    hidden = model.backbone(IDS)
    normalized = (hidden - norm.bias) / norm.scale
    torch.testing.assert_close(normalized.square().mean(-1), torch.ones(1, 48), atol=1e-3, rtol=0)
    if norm.centered:
        torch.testing.assert_close(layer.slow(hidden).output, hidden, atol=1e-4, rtol=1e-3)


def test_a_backbone_without_a_final_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer norm or RMS norm, from which a new"):
        FWLModel.from_pretrained(tiny_causal(WITHOUT_NORM))

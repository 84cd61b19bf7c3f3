"""Backbones: models that turn token ids into hidden states, for whole texts or as a stream.

A backbone is an `nn.Module` with three functions:

- `forward(input_ids [B, T]) -> hidden [B, T, width]` reads whole texts;
- `stream(input_ids [B, T], position [B], lengths [B], caches) -> (hidden, caches)` reads the next
  tokens;
- `cache_specs(capacity) -> list of (name, shape without batch)` describes its recurrent state.

To add a backbone, write its file, give it a config with a `type`, and name it in `build_backbone`.
"""

from __future__ import annotations

from fwl_export.bundle.config import AnyBackboneConfig, HuggingFaceConfig
from fwl_export.model.backbones.decoder import Decoder
from fwl_export.model.backbones.huggingface import HuggingFaceBackbone

Backbone = Decoder | HuggingFaceBackbone


def build_backbone(config: AnyBackboneConfig, vocab_size: int) -> Backbone:
    """Return a randomly initialized backbone of the configured type."""
    if isinstance(config, HuggingFaceConfig):
        return HuggingFaceBackbone(config, vocab_size)
    return Decoder(config, vocab_size)


__all__ = ["Backbone", "Decoder", "HuggingFaceBackbone", "build_backbone"]

"""Backbones: what turns token ids into hidden states, whole texts at once or as a stream.

A backbone is an `nn.Module` with
  `forward(input_ids [B, T]) -> hidden [B, T, width]` for whole texts,
  `stream(input_ids [B, T], position [B], lengths [B], caches) -> (hidden, caches)`, and
  `cache_specs(capacity) -> list of (name, shape without batch)` for its recurrent state.
To add one: write its file, give its config a `type`, and name it in `_BACKBONES`.
"""

from fwl_export.model.backbones.decoder import Decoder
from fwl_export.model.config import BackboneConfig

_BACKBONES = {"decoder": Decoder}


def build_backbone(config: BackboneConfig, vocab_size: int) -> Decoder:
    """Return a randomly initialised backbone of the configured type."""
    return _BACKBONES[config.type](config, vocab_size)


__all__ = ["Decoder", "build_backbone"]

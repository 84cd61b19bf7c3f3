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
from fwl_export.errors import ConfigError
from fwl_export.json_files import brief, shown
from fwl_export.model.backbones.decoder import Decoder
from fwl_export.model.backbones.huggingface import HuggingFaceBackbone

Backbone = Decoder | HuggingFaceBackbone

# What modules of transformers raise when a value of their configuration has the wrong type or size.
_SENSELESS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def build_backbone(config: AnyBackboneConfig, vocab_size: int) -> Backbone:
    """Return a randomly initialized backbone of the configured type.

    Raises:
      ConfigError: A configuration of transformers makes no sense as a backbone.
    """
    if isinstance(config, HuggingFaceConfig):
        try:
            return HuggingFaceBackbone(config, vocab_size)
        except _SENSELESS as error:
            raise ConfigError(
                f"backbone.model of model_type {shown(config.model['model_type'])} cannot be used "
                f"as a backbone ({type(error).__name__}: {brief(error)}); expected a configuration "
                "as transformers wrote it"
            ) from None
    return Decoder(config, vocab_size)


__all__ = ["Backbone", "Decoder", "HuggingFaceBackbone", "build_backbone"]

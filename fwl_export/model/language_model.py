"""The whole model: a backbone with a Fast Weight Layer between it and the softmax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fwl_export.bundle.config import FastWeightsConfig, ModelConfig
from fwl_export.model.backbones import Backbone, HuggingFaceBackbone, build_backbone
from fwl_export.model.fast_weights import FastWeights
from fwl_export.model.fwl_checkpoint import load_fast_weights

_TIED = "fast_weights.unembed"


class FWLModel(nn.Module):
    """A language model that learns while it reads; this is its parallel form, for training."""

    def __init__(self, config: ModelConfig, backbone: Backbone | None = None) -> None:
        """Build a model with random weights, but for those of a backbone that is given."""
        super().__init__()
        self.config = config
        self.backbone = backbone or build_backbone(config.backbone, config.vocab_size)
        self.fast_weights = FastWeights(config.fast_weights, config.vocab_size)
        if isinstance(self.backbone, HuggingFaceBackbone) and self.backbone.config.tied:
            self.fast_weights.unembed = cast(nn.Parameter, self.backbone.embedding.weight)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path | Any,
        fast_weights: str | Path | FastWeightsConfig | None = None,
        context: int | None = None,
        slide: bool = False,
    ) -> FWLModel:
        """Put a Fast Weight Layer on top of a language model of Hugging Face's transformers.

        Args:
          backbone: folder with config.json and safetensors, or a model of transformers, which is
            copied. Its head becomes the unembedding.
          fast_weights: folder of a trained layer (see `fwl_checkpoint`); or the config of a new
            one with random weights, for training; None: a new one of the usual sizes.
          context: tokens that layers with full attention see; None: as many as the model was made
            for, at most 2048 of them where positions are relative.
          slide: read on past the context, each token seeing the `context - 1` before it, instead
            of ending there; not possible where positions count from the beginning of the text.

        Returns:
          The model in float32, in evaluation mode.

        Raises:
          CheckpointError, ConfigError: backbone or layer cannot be used, or they do not fit.
          MissingDependencyError: transformers is not installed.
        """
        from fwl_export.model.backbones.huggingface_import import import_backbone

        trained: Mapping[str, Tensor] = {}
        if isinstance(fast_weights, str | Path):
            loaded = load_fast_weights(Path(fast_weights))
            fast_weights, trained = loaded.config, loaded.tensors
        taken = import_backbone(backbone, context, slide)
        layer = taken.layer_config(fast_weights, loaded.vocab_size if trained else None)
        if "unembed" in trained:
            taken.untie()
        model = cls(ModelConfig(taken.vocab_size, taken.backbone.config, layer), taken.backbone)
        with torch.no_grad():
            if not taken.backbone.config.tied:
                model.fast_weights.unembed.copy_(taken.unembed)
            model.fast_weights.unembed_bias.copy_(taken.unembed_bias)
        model.fast_weights.load_state_dict(dict(trained), strict=False)
        return model.eval()

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds by name: a tied unembedding is the backbone's."""
        tensors = self.state_dict()
        if isinstance(self.backbone, HuggingFaceBackbone) and self.backbone.config.tied:
            # Wherever the architecture itself keeps its embedding, it is there once.
            del tensors[_TIED]
        return tensors

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `stored_tensors` returned; names and shapes were checked."""
        tied = self.state_dict().keys() - tensors.keys()
        assert tied <= {_TIED}, tied
        self.load_state_dict(dict(tensors), strict=not tied)

    def forward(
        self, input_ids: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read whole texts, each from a fresh state.

        Args:
          input_ids: [B, T] int64.
          labels: [B, T] int64, the next token of each position.
          weights: [B, T] how much to learn from each label; None means 1 everywhere.

        Returns:
          Logits of the adapting model [B, T, V] and of the weights at which the gradients were
          taken [B, T, V]: with adaptation off, unless the config has an anchor.
        """
        return self.fast_weights.parallel(self.backbone(input_ids), labels, weights)

    def plain(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, T, V] with adaptation off, without the cost of adapting."""
        return self.fast_weights.logits(self.fast_weights.slow(self.backbone(input_ids)).output)

"""The whole model: a backbone, and a Fast Weight Layer between it and the softmax."""

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
    """A language model that learns while it reads, in its parallel form, which serves training.

    `StreamingModel` wraps it into the form that reads token by token.
    """

    def __init__(self, config: ModelConfig, backbone: Backbone | None = None) -> None:
        """Build a model with random weights.

        Args:
          config: The model's configuration.
          backbone: The backbone to use, with its weights; None builds a random one.
        """
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
          backbone: Folder with config.json and safetensors, a GGUF file, or a model of
            transformers, which is copied. Its head becomes the unembedding.
          fast_weights: Folder of a trained layer, see `fwl_checkpoint`; None for a new layer that
            needs no training, see `new_layer`; or the configuration of a layer with random weights,
            to train.
          context: Number of tokens that layers with full attention see. None means as many as the
            model was made for, but at most 2048 if its positions are relative.
          slide: Whether to read on past the context, where each token sees the `context - 1` tokens
            before it. This needs relative positions. Otherwise, reading ends at the context.

        Returns:
          The model, in float32 and in evaluation mode.

        Raises:
          CheckpointError, ConfigError: The backbone or the layer cannot be used, or they do not fit
            each other.
          MissingDependencyError: transformers is not installed.
        """
        from fwl_export.model.backbones.huggingface_import import import_backbone
        from fwl_export.model.new_layer import new_layer_config, start_near_identity

        trained: Mapping[str, Tensor] = {}
        if isinstance(fast_weights, str | Path):
            loaded = load_fast_weights(Path(fast_weights))
            fast_weights, trained = loaded.config, loaded.tensors
        taken = import_backbone(backbone, context, slide)
        layer = taken.layer_config(
            fast_weights or new_layer_config(taken.backbone),
            loaded.vocab_size if trained else None,
        )
        if "unembed" in trained:
            taken.untie()
        model = cls(ModelConfig(taken.vocab_size, taken.backbone.config, layer), taken.backbone)
        with torch.no_grad():
            if not taken.backbone.config.tied:
                model.fast_weights.unembed.copy_(taken.unembed)
            model.fast_weights.unembed_bias.copy_(taken.unembed_bias)
        if fast_weights is None:
            start_near_identity(model.fast_weights, taken.backbone)
        model.fast_weights.load_state_dict(dict(trained), strict=False)
        return model.eval()

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name; it holds a tied unembedding only once."""
        tensors = self.state_dict()
        if isinstance(self.backbone, HuggingFaceBackbone) and self.backbone.config.tied:
            # The backbone holds it already, as its embedding.
            del tensors[_TIED]
        return tensors

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `stored_tensors` returned; names and shapes must have been checked before."""
        tied = self.state_dict().keys() - tensors.keys()
        assert tied <= {_TIED}, tied
        self.load_state_dict(dict(tensors), strict=not tied)

    def forward(
        self, input_ids: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read whole texts, each from a fresh state.

        Args:
          input_ids: Token ids, [B, T] int64.
          labels: The token after each position, [B, T] int64.
          weights: How much to learn from each label, [B, T]; None means 1 everywhere.

        Returns:
          The logits of the adapting model, [B, T, V], and those of the weights at which the
          gradients are taken, [B, T, V]: the slow weights, or the anchor's if the model has one.
        """
        return self.fast_weights.parallel(self.backbone(input_ids), labels, weights)

    def plain(self, input_ids: Tensor) -> Tensor:
        """Return the logits with adaptation off, [B, T, V], at the cost of a plain model."""
        return self.fast_weights.logits(self.fast_weights.slow(self.backbone(input_ids)).output)

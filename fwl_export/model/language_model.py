"""The whole model: a backbone with a Fast Weight Layer between it and the softmax."""

from __future__ import annotations

from torch import Tensor, nn

from fwl_export.model.backbones import build_backbone
from fwl_export.model.config import ModelConfig
from fwl_export.model.fast_weights import FastWeights


class FWLModel(nn.Module):
    """A language model that learns while it reads; this is its parallel form, for training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.vocab_size)
        self.fast_weights = FastWeights(config.fast_weights, config.vocab_size)

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

"""The streaming form: some tokens per call, with the fast weights as explicit state.

The label of a position is the token after it. So a call first finishes the *pending* gradient
of the last position of the call before, and from then on "update, then read" is inclusive:
queries of positions t ... t+T-1 meet keys of positions t-1 ... t+T-2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fwl_export.model.config import ModelConfig
from fwl_export.model.fast_weights import (
    DENSE_BIASES,
    FAST_TENSORS,
    Gradients,
    SlowPass,
    squared_relu,
)
from fwl_export.model.language_model import FWLModel
from fwl_export.model.numerics import wide
from fwl_export.op.torch_op import decay_products, linear_attention_update
from fwl_export.state import TensorSpec

UpdateOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

INPUTS = ("input_ids", "label_weights", "lengths")
OUTPUTS = ("logits",)


def state_specs(config: ModelConfig, model: FWLModel, max_tokens: int) -> list[TensorSpec]:
    """Return the state of a model, in the order of inputs and outputs.

    Args:
      config: of the model.
      model: gives the type of activations; sums are float32, or float64 in a float64 model.
      max_tokens: largest T of a call. Ring buffers hold `window + max_tokens - 1` tokens.
    """
    layer = config.fast_weights
    activation = str(model.fast_weights.unembed.dtype).removeprefix("torch.")
    accumulate = "float64" if activation == "float64" else "float32"
    d, h, s = layer.input_size, layer.hidden_size, layer.output_size
    shapes = {
        "up.kernel": (d, h),
        "up.bias": (h,),
        "down.kernel": (h, s),
        "down.bias": (s,),
        "norm.scale": (s,),
        "norm.bias": (s,),
    }
    capacity = config.backbone.window + max_tokens - 1
    return [
        TensorSpec("position", (), "int64"),
        *(TensorSpec(n, shape, activation) for n, shape in model.backbone.cache_specs(capacity)),
        *(
            TensorSpec(f"fast.{name}", shapes[name], accumulate)
            for name in FAST_TENSORS
            if layer.update_dense_bias or name not in DENSE_BIASES
        ),
        TensorSpec("pending.hidden", (d,), activation),
        TensorSpec("pending.up", (h,), activation),
        TensorSpec("pending.normed", (s,), activation),
        TensorSpec("pending.inv_std", (1,), accumulate),
        TensorSpec("pending.expected", (s,), activation),
        TensorSpec("pending.valid", (), accumulate),
    ]


class StreamingModel(nn.Module):
    """One call of the model on the next tokens of every row."""

    def __init__(
        self, model: FWLModel, max_tokens: int, update: UpdateOp = linear_attention_update
    ) -> None:
        """Wrap a model.

        Args:
          model: its parameters are shared, not copied.
          max_tokens: largest T of a call.
          update: the op, see `fwl_export.op`; the exporter passes a symbolic one.
        """
        super().__init__()
        self.model = model
        self.specs = state_specs(model.config, model, max_tokens)
        self._update = update

    def forward(
        self, input_ids: Tensor, label_weights: Tensor, lengths: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Read the next tokens.

        Args:
          input_ids: [B, T] int64; row b brings `lengths[b]` tokens, then padding.
          label_weights: [B, T] float32, how much to learn from each token: 1 = fully, 0 = read
            it without learning or forgetting.
          lengths: [B] int64 in 0..T; a row of length 0 is left as it is.
          state: past tensors in the order of `specs`, [B, ...] each.

        Returns:
          logits [B, T, V] float32 (float64 in a float64 model; those of padding mean nothing),
          then the present tensors in the order of `specs`.
        """
        layer = self.model.fast_weights
        past = dict(zip((s.name for s in self.specs), state, strict=True))
        caches = [tensor for name, tensor in past.items() if name.startswith("cache.")]
        hidden, caches = self.model.backbone.stream(input_ids, past["position"], lengths, caches)
        slow = layer.slow(hidden)
        expected = layer.expected_embedding(layer.logits(slow.output))

        valid = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        weights = torch.where(valid, label_weights.to(past["pending.valid"].dtype), 0.0)
        # A fresh row has no position before its first token, hence nothing to learn from it.
        started = _shift(past["pending.valid"], torch.ones_like(weights))
        before = SlowPass(
            hidden=_shift(past["pending.hidden"], slow.hidden),
            up=_shift(past["pending.up"], slow.up),
            normed=_shift(past["pending.normed"], slow.normed),
            inv_std=_shift(past["pending.inv_std"], slow.inv_std),
            output=slow.output,
        )
        gradients = layer.gradients(
            before, _shift(past["pending.expected"], expected), input_ids, weights * started
        )
        output, sums = self._fast(
            slow, before, gradients, torch.exp(layer.log_decay(weights)), past
        )
        logits = layer.logits(output)

        present = {
            "position": past["position"] + lengths,
            **dict(zip((n for n in past if n.startswith("cache.")), caches, strict=True)),
            **sums,
        }
        pending = {**slow._asdict(), "expected": expected, "valid": torch.ones_like(weights)}
        for name, tensor in past.items():
            if name.startswith("pending."):
                now = pending[name.removeprefix("pending.")]
                present[name] = _at_last_token(now, tensor, lengths)
        return logits.to(weights.dtype), *(present[s.name] for s in self.specs)

    def _fast(
        self,
        slow: SlowPass,
        before: SlowPass,
        gradients: Gradients,
        decay: Tensor,
        past: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the fast weights and run the layer with them: output z [B, T, output] and the
        present sums.
        """
        layer = self.model.fast_weights
        kind = slow.hidden.dtype
        sums: dict[str, Tensor] = {}
        fade = decay_products(decay)

        def matrix(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            step = layer.scaled_step(name)
            if step.ndim:  # one per input feature: the ratios go to the query, where they fit
                ratio = step / step.abs().max().clamp_min(torch.finfo(step.dtype).tiny)
                query, step = (wide(query) * ratio).to(kind), step.abs().max()
            read, sums[f"fast.{name}"] = self._update(
                query, key, value.to(kind), decay, past[f"fast.{name}"]
            )
            return step * read.to(fade.dtype)

        def vector(name: str, value: Tensor) -> Tensor:
            if f"fast.{name}" not in past:
                return torch.zeros((), dtype=fade.dtype, device=fade.device)
            total = fade[:, :, 1:] @ value.to(fade.dtype)
            total = total + fade[:, :, :1] * past[f"fast.{name}"][:, None]
            sums[f"fast.{name}"] = total[:, -1]
            return layer.scaled_step(name) * total

        up = wide(slow.up) - matrix("up.kernel", slow.hidden, before.hidden, gradients.up)
        activated = squared_relu(up - vector("up.bias", gradients.up)).to(kind)
        down = wide(activated @ layer.down_kernel + layer.down_bias)
        down = down - matrix("down.kernel", activated, squared_relu(before.up), gradients.down)
        normed, _ = layer.normalize(down - vector("down.bias", gradients.down))
        scale = layer.norm_scale - vector("norm.scale", gradients.norm_scale)
        bias = layer.norm_bias - vector("norm.bias", gradients.norm_bias)
        return (normed * scale + bias).to(kind), sums


def _shift(pending: Tensor, now: Tensor) -> Tensor:
    """Return what belongs to the position before: [B, ...] and [B, T, ...] -> [B, T, ...]."""
    return torch.cat((pending[:, None], now[:, :-1]), 1)


def _at_last_token(now: Tensor, past: Tensor, lengths: Tensor) -> Tensor:
    """Return each row's value at its last real token, the past one where it brought none."""
    row = torch.arange(now.shape[0], device=now.device)
    last = now[row, torch.clamp(lengths - 1, min=0)]
    some = (lengths > 0).reshape(-1, *[1] * (past.ndim - 1))
    return torch.where(some, last, past)

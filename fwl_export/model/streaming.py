"""The streaming form of the model: it reads some tokens per call and carries an explicit state.

This is the form that is exported. The label of a position is the token after it, so the gradient of
a call's last position must wait for the next call: it is *pending*. Each position first adds the
gradient of the one before it to the sums, then reads the sums: the queries of positions t to t+T-1
meet the keys of positions t-1 to t+T-2. README.md in this folder has the equations.

With an anchor (`FastWeightsConfig.anchor_interval`), no row of a call may cross a position that the
interval divides; `fwl_export.runtimes.Session` splits calls there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fwl_export.bundle.config import ModelConfig
from fwl_export.bundle.state import INPUTS as MODEL_INPUTS
from fwl_export.bundle.state import TensorSpec
from fwl_export.model.fast_weights import DENSE_BIASES, FAST_TENSORS, Pending, shift
from fwl_export.model.language_model import FWLModel
from fwl_export.model.numerics import UpdateOp, narrowed
from fwl_export.op.torch_op import decay_products, linear_attention_update

INPUTS = tuple(spec.name for spec in MODEL_INPUTS)
OUTPUTS = ("logits",)


def state_specs(config: ModelConfig, model: FWLModel, max_tokens: int) -> list[TensorSpec]:
    """Return the state tensors of a model, in the order of its inputs and outputs.

    Args:
      config: The model's configuration.
      model: The model. Keys, values and hidden states have the backbone's dtype; sums, and what
        else waits for a label, are float32, or float64 in a float64 model.
      max_tokens: Largest number of tokens per call. Ring buffers hold `window + max_tokens - 1`
        tokens.
    """
    layer = config.fast_weights
    activation = str(model.backbone.activation_type).removeprefix("torch.")
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
    learning = [n for n in FAST_TENSORS if layer.update_dense_bias or n not in DENSE_BIASES]
    return [
        TensorSpec("position", (), "int64"),
        *(TensorSpec(n, shape, activation) for n, shape in model.backbone.cache_specs(capacity)),
        *(TensorSpec(f"fast.{name}", shapes[name], accumulate) for name in learning),
        *(
            TensorSpec(f"anchor.{name}", shapes[name], accumulate)
            for name in learning
            if layer.anchor_interval
        ),
        TensorSpec("pending.hidden", (d,), activation),
        TensorSpec("pending.up", (h,), accumulate),
        TensorSpec("pending.normed", (s,), accumulate),
        TensorSpec("pending.inv_std", (1,), accumulate),
        TensorSpec("pending.expected", (s,), accumulate),
        TensorSpec("pending.valid", (), accumulate),
    ]


class StreamingModel(nn.Module):
    """The model as a function of the next tokens and the state of every row."""

    def __init__(
        self, model: FWLModel, max_tokens: int, update: UpdateOp = linear_attention_update
    ) -> None:
        """Wrap a model.

        Args:
          model: The model, whose parameters are shared, not copied.
          max_tokens: Largest number of tokens per call.
          update: The implementation of the fast-weight update, see `fwl_export.op`; the exporter
            passes a symbolic one.
        """
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens
        self.specs = state_specs(model.config, model, max_tokens)
        kind = model.backbone.activation_type
        self._update = narrowed(update, kind) if kind == torch.float16 else update

    def forward(
        self,
        input_ids: Tensor,
        label_weights: Tensor,
        lengths: Tensor,
        logit_positions: Tensor,
        learning_rate_scale: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """Read the next tokens of every row.

        Args:
          input_ids: Token ids, [B, T] int64; row b has `lengths[b]` tokens, then padding.
          label_weights: How much to learn from each token, [B, T] float32; 1 fully, and 0 to read
            it without learning or forgetting.
          lengths: Number of tokens in each row, [B] int64 in 0..T. The state of a row of length 0
            does not change.
          logit_positions: The columns of the call to return logits for, [B, P] int64 in 0..T-1. One
            column instead of all T saves most of the product with the unembedding.
          learning_rate_scale: Factor on the step sizes for what this call's tokens teach, [B]
            float32. It changes neither what was learned before nor the decay.
          state: The past state tensors in the order of `specs`, [B, ...] each.

        Returns:
          The logits [B, P, V], float32, or float64 in a float64 model, then the present state
          tensors in the order of `specs`. Logits of padding are meaningless. All logits of a row
          are NaN if it crosses an anchor or goes beyond the backbone's `max_positions`.
        """
        layer = self.model.fast_weights
        past = dict(zip((s.name for s in self.specs), state, strict=True))
        caches = _of(past, "cache.")
        hidden, cached = self.model.backbone.stream(
            input_ids, past["position"], lengths, list(caches.values())
        )
        anchor = self._anchor(past, lengths)
        slow = layer.slow(hidden, anchor)
        # The last position's gradient waits for the next call. So its slow logits can wait for the
        # fast ones: a single product with the unembedding then yields both, which is all of them in
        # a call of one token. Until then its slow output takes the place of its expected embedding,
        # which `one_later` drops. In every call it is the last position, since tools that infer
        # shapes do not follow a size that depends on whether there are more.
        early = input_ids.shape[1] - 1
        expected = layer.expected_embedding(layer.logits(slow.output[:, :early]))
        last = Pending(*(past[f"pending.{n}"] for n in Pending._fields))
        before = slow.pending(torch.cat((expected, slow.output[:, early:]), 1)).one_later(last)

        valid = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        weights = torch.where(valid, label_weights.to(past["pending.valid"].dtype), 0.0)
        # A fresh row has no position before its first token, and learns nothing from that token.
        started = shift(past["pending.valid"], torch.ones_like(weights))
        scale = learning_rate_scale.to(weights.dtype)[:, None]
        gradients = layer.gradients(before, input_ids, weights * started * scale, anchor)
        sums = _StateSums(self._update, past, torch.exp(layer.log_decay(weights)))
        fast = layer.fast(slow, before, gradients, sums)
        rows = torch.arange(fast.shape[0], device=fast.device)[:, None]
        wanted = fast[rows, logit_positions]
        logits = layer.logits(torch.cat((wanted, slow.output[:, early:]), 1))
        late = layer.expected_embedding(logits[:, wanted.shape[1] :])
        pending = slow.pending(torch.cat((expected, late), 1))
        logits = logits[:, : wanted.shape[1]].to(weights.dtype)

        present = {
            "position": past["position"] + lengths,
            **{f"cache.{n}": tensor for n, tensor in zip(caches, cached, strict=True)},
            **sums.present,
            **{f"anchor.{name}": tensor for name, tensor in (anchor or {}).items()},
        }
        left = {**pending._asdict(), "valid": torch.ones_like(weights)}
        for name, tensor in left.items():
            key = f"pending.{name}"
            present[key] = _at_last_token(tensor, past[key], lengths)
        if interval := layer.config.anchor_interval:
            crosses = past["position"] % interval + lengths > interval
            logits = torch.where(crosses[:, None, None], torch.nan, logits)
        if limit := self.model.config.backbone.max_positions:
            beyond = past["position"] + lengths > limit
            logits = torch.where(beyond[:, None, None], torch.nan, logits)
        return logits, *(present[s.name] for s in self.specs)

    def _anchor(self, past: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor] | None:
        """Return the anchor's sums for this call, or None in a model without an anchor.

        At every position that the interval divides, a row's anchor becomes a copy of its sums.
        """
        interval = self.model.fast_weights.config.anchor_interval
        if not interval:
            return None
        due = (past["position"] % interval == 0) & (lengths > 0)
        return {
            name: torch.where(
                due.reshape(-1, *[1] * (tensor.ndim - 1)),
                past[f"fast.{name}"],
                tensor,
            )
            for name, tensor in _of(past, "anchor.").items()
        }


class _StateSums:
    """The `GradientSums` of a call, from the past state to the present one."""

    def __init__(self, update: UpdateOp, past: dict[str, Tensor], decay: Tensor) -> None:
        self._update = update
        self._past = past
        self._decay = decay
        self._fade = decay_products(decay)
        self.present: dict[str, Tensor] = {}

    def matrix(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        read, self.present[f"fast.{name}"] = self._update(
            query, key, value, self._decay, self._past[f"fast.{name}"]
        )
        return read

    def vector(self, name: str, value: Tensor) -> Tensor:
        total = self._fade[:, :, 1:] @ value.to(self._fade.dtype)
        total = total + self._fade[:, :, :1] * self._past[f"fast.{name}"][:, None]
        self.present[f"fast.{name}"] = total[:, -1]
        return total


def _of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _at_last_token(now: Tensor, past: Tensor, lengths: Tensor) -> Tensor:
    """Return each row's value at its last token, or its past value if the row has no token."""
    row = torch.arange(now.shape[0], device=now.device)
    last = now[row, torch.clamp(lengths - 1, min=0)]
    some = (lengths > 0).reshape(-1, *[1] * (past.ndim - 1))
    return torch.where(some, last, past)

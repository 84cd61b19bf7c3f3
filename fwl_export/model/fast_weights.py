"""The Fast Weight Layer and its parallel form: Clark et al., EMNLP 2022 (arXiv 2212.02475).

Formulas are those of section 3 of the paper, in the notation of the README of this folder:
a = h W1 + b1, r = relu(a)^2, m = r W2 + b2, n = norm(m), z = gamma n + beta, p = softmax(z U + c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwl_export.bundle.config import FastWeightsConfig
from fwl_export.model.numerics import linear, product, wide

# The tensors of the layer that have a fast part, in the order used everywhere.
FAST_TENSORS = ("up.kernel", "up.bias", "down.kernel", "down.bias", "norm.scale", "norm.bias")
DENSE_BIASES = ("up.bias", "down.bias")


Sums = Mapping[str, Tensor]


class Pending(NamedTuple):
    """What a position leaves for its gradient, which waits for the label; [B, T, size] each.

    With an anchor, all but `hidden` are of the anchored weights.

    Attributes:
      hidden: the backbone's output h, size input_size.
      up: a = h W1 + b1, before the activation, size hidden_size.
      normed: n, size output_size.
      inv_std: 1 / sigma of the norm, size 1, float32 or better.
      expected: p U^T, from `FastWeights.expected_embedding`, size output_size.
    """

    hidden: Tensor
    up: Tensor
    normed: Tensor
    inv_std: Tensor
    expected: Tensor

    def one_later(self, last: Pending | None) -> Pending:
        """Return what the position before each left; `last` is of the one before the first,
        [B, size] each, None where there is none.
        """
        if last is None:
            last = Pending(*(torch.zeros_like(tensor[:, 0]) for tensor in self))
        return Pending(*(shift(before, now) for before, now in zip(last, self, strict=True)))


class SlowPass(NamedTuple):
    """The layer with its slow weights, or those of an anchor; [B, T, size] each.

    Attributes:
      hidden, up, normed, inv_std: see `Pending`.
      base: h W1 + b1 with the slow weights always, size hidden_size.
      output: z, size output_size.
    """

    hidden: Tensor
    base: Tensor
    up: Tensor
    normed: Tensor
    inv_std: Tensor
    output: Tensor

    def pending(self, expected: Tensor) -> Pending:
        """Return what is left for the gradients."""
        return Pending(self.hidden, self.up, self.normed, self.inv_std, expected)


class Gradients(NamedTuple):
    """Gradients of the unnormalised loss per token; [B, T, size] each, float32 or better.

    `up` is at a (g1), `down` at m (g2), `norm_scale` and `norm_bias` at gamma and beta.
    """

    up: Tensor
    down: Tensor
    norm_scale: Tensor
    norm_bias: Tensor


class FastWeights(nn.Module):
    """Two dense layers with a squared relu between them, a layer norm, and the unembedding.

    Parameters: `up_kernel` [input, hidden], `up_bias` [hidden], `down_kernel` [hidden, output],
    `down_bias`, `norm_scale`, `norm_bias` [output], `unembed` [V, output], `unembed_bias` [V],
    `steps`: the step sizes (one per tensor or layer), `horizon` []: tokens after which a
    gradient has faded to 1/e (only with decay "learned").

    For training, two attributes of the parallel form that change no output: `first_order` takes
    the gradient steps for constants (no gradient goes through them, but for step sizes and
    horizon), and `gradient_checkpointing` computes each chunk again in the backward pass instead
    of keeping what it computed.
    """

    first_order = False
    gradient_checkpointing = False

    def __init__(self, config: FastWeightsConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        d, h, s = config.input_size, config.hidden_size, config.output_size
        self.up_kernel = nn.Parameter(torch.randn(d, h) * d**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(h))
        self.down_kernel = nn.Parameter(torch.randn(h, s) * h**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(s))
        self.norm_scale = nn.Parameter(torch.ones(s))
        self.norm_bias = nn.Parameter(torch.zeros(s))
        # [V, output]: with [output, V] an engine would hold a second, transposed copy.
        self.unembed = nn.Parameter(torch.randn(vocab_size, s) * 0.03)
        self.unembed_bias = nn.Parameter(torch.zeros(vocab_size))
        self.steps = nn.ParameterDict(
            {name: nn.Parameter(torch.full(shape, 1e-3)) for name, shape in step_shapes(config)}
        )
        if config.decay == "learned":
            self.horizon = nn.Parameter(torch.tensor(500.0))

    def scaled_step(self, tensor: str) -> Tensor:
        """Return step size / loss_normalizer of one of FAST_TENSORS: [] or [input features]."""
        return self.steps[step_name(self.config, tensor)] / self.config.loss_normalizer

    def log_decay(self, weights: Tensor) -> Tensor:
        """Return the log of the per-token decay, in float32 or better, shaped like `weights`.

        A token of weight 1 fades the sums by exp(-1 / horizon); a token of weight 0, which
        teaches nothing, fades nothing.
        """
        if self.config.decay == "none":
            return torch.zeros_like(weights)
        return -weights / self.horizon.to(weights.dtype)

    def normalize(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return n = (m - mean) / sigma [..., output] and 1 / sigma [..., 1]."""
        centered = m - m.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        inv_std = torch.rsqrt(variance + self.config.norm_epsilon)
        return centered * inv_std, inv_std

    def learned(self, tensor: str, query: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what was learned in a kernel, as seen by a query: its share of q W.

        Args:
          tensor: "up.kernel" or "down.kernel".
          query: [B, T, input features].
          read: multiplies a query with the sum of that kernel's gradients, [B, T, columns].
        """
        step = self.scaled_step(tensor)
        if step.ndim:  # one per input feature: the ratios go to the query, where they fit
            ratio = step / step.abs().max().clamp_min(torch.finfo(step.dtype).tiny)
            query, step = (wide(query) * ratio).to(query.dtype), step.abs().max()
        return step * wide(read(query))

    def slow(self, hidden: Tensor, anchor: Sums | None = None) -> SlowPass:
        """Run the layer with its slow weights, or those of the anchor.

        Args:
          hidden: [B, T, input].
          anchor: the sums of gradients [B, ...] whose steps the weights include; None = none.
        """
        base = product(hidden, self.up_kernel) + self.up_bias
        scale: Tensor = self.norm_scale
        bias: Tensor = self.norm_bias
        if anchor is None:
            up = base
            down = wide(product(squared_relu(up), self.down_kernel) + self.down_bias)
        else:
            kind = hidden.dtype

            def matrix(name: str, query: Tensor) -> Tensor:
                return self.learned(name, query, lambda q: wide(q) @ anchor[name])

            def vector(name: str) -> Tensor | float:
                return self._learned_vector(name, anchor.get(name))

            up = (wide(base) - matrix("up.kernel", hidden) - vector("up.bias")).to(kind)
            activated = squared_relu(up)
            down = wide(product(activated, self.down_kernel) + self.down_bias)
            down = down - matrix("down.kernel", activated) - vector("down.bias")
            scale, bias = self._anchored_scale(anchor), bias - vector("norm.bias")
        normed, inv_std = self.normalize(down)
        output = (normed * scale + bias).to(hidden.dtype)
        return SlowPass(hidden, base, up, normed.to(hidden.dtype), inv_std, output)

    def _learned_vector(self, name: str, total: Tensor | None) -> Tensor | float:
        """Return step size x sum, [B, 1, size]; zero where the tensor does not learn."""
        if total is None:
            return 0.0
        return self.scaled_step(name) * total[:, None]

    def _anchored_scale(self, anchor: Sums | None) -> Tensor:
        if anchor is None:
            return wide(self.norm_scale)
        return wide(self.norm_scale) - self._learned_vector("norm.scale", anchor["norm.scale"])

    def logits(self, output: Tensor) -> Tensor:
        """Return z U + c, soft-capped where the config says so: [B, T, output] -> [B, T, V]."""
        logits = linear(output, self.unembed, self.unembed_bias)
        if cap := self.config.logit_softcap:
            logits = (cap * torch.tanh(wide(logits) / cap)).to(logits.dtype)
        return logits

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """Return p U^T, the unembedding row expected under the prediction: [B, T, output].

        With soft-capped logits l = cap tanh(u / cap), where dl/du = 1 - (l / cap)^2, the gradient
        at z is sum_v (p_v - [v = label]) dl_v/du_v U_v: this returns the part with p, and
        `_label_embedding` the rest.
        """
        weights = torch.softmax(wide(logits), -1)
        if cap := self.config.logit_softcap:
            weights = weights * (1 - (wide(logits) / cap).square())
        return product(weights.to(logits.dtype), self.unembed)

    def _label_embedding(self, at: Pending, labels: Tensor, anchor: Sums | None) -> Tensor:
        """Return what is subtracted from the expected embedding: U of the label [B, T, output].

        With soft-capped logits it is scaled by the cap's slope at the label's own logit. That
        takes one product of size output, z being the norm's result again: no state of the
        vocabulary's size is kept.
        """
        embedding = wide(F.embedding(labels, self.unembed))
        if not (cap := self.config.logit_softcap):
            return embedding
        bias = wide(self.norm_bias)
        if anchor is not None:
            bias = bias - self._learned_vector("norm.bias", anchor["norm.bias"])
        output = wide(at.normed) * self._anchored_scale(anchor) + bias
        raw = (output * embedding).sum(-1) + wide(self.unembed_bias[labels])
        return embedding * (1 - torch.tanh(raw / cap).square())[..., None]

    def gradients(
        self,
        at: Pending,
        labels: Tensor,
        weights: Tensor,
        anchor: Sums | None = None,
    ) -> Gradients:
        """Return the unnormalised loss gradients of each position.

        Args:
          at: what the positions left.
          labels: [B, T] int64, the token that followed.
          weights: [B, T], 1 to learn from it, 0 not to.
          anchor: see `slow`; the gradient goes back through these weights.
        """
        surprise = wide(at.expected) - self._label_embedding(at, labels, anchor)
        norm_bias = surprise * weights[..., None]
        at_normed = norm_bias * self._anchored_scale(anchor)
        normed = wide(at.normed)
        down = at.inv_std * (
            at_normed
            - at_normed.mean(-1, keepdim=True)
            - normed * (at_normed * normed).mean(-1, keepdim=True)
        )
        at_activated = wide(product(down.to(at.up.dtype), self.down_kernel.T))
        if anchor is not None:
            back = down @ anchor["down.kernel"].transpose(1, 2)
            at_activated = at_activated - back * self.scaled_step("down.kernel")
        up = at_activated * (2 * torch.relu(wide(at.up)))
        return Gradients(up, down, norm_bias * normed, norm_bias)

    def fast(
        self, slow: SlowPass, before: Pending, gradients: Gradients, sums: GradientSums
    ) -> Tensor:
        """Learn from the gradients, then run the layer with its fast weights.

        Args:
          slow: the slow pass of the positions that are read.
          before: what the positions before each left, to which `gradients` belong.
          gradients: of the positions before.
          sums: to which the gradients are added, and from which the positions read.

        Returns:
          z, [B, T, output].
        """
        kind = slow.hidden.dtype

        def matrix(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.learned(name, query, lambda q: sums.matrix(name, q, key, value))

        def vector(name: str, value: Tensor) -> Tensor | float:
            if name in DENSE_BIASES and not self.config.update_dense_bias:
                return 0.0
            return self.scaled_step(name) * sums.vector(name, value)

        up = wide(slow.base) - matrix("up.kernel", slow.hidden, before.hidden, gradients.up)
        activated = squared_relu(up - vector("up.bias", gradients.up)).to(kind)
        down = wide(product(activated, self.down_kernel) + self.down_bias)
        down = down - matrix("down.kernel", activated, squared_relu(before.up), gradients.down)
        normed, _ = self.normalize(down - vector("down.bias", gradients.down))
        scale = self.norm_scale - vector("norm.scale", gradients.norm_scale)
        bias = self.norm_bias - vector("norm.bias", gradients.norm_bias)
        return (normed * scale + bias).to(kind)

    def parallel(
        self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None, chunk: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Read whole texts at once, each from a fresh state: the form for training.

        Differentiable, through the gradients too (second order). Memory for the sums over
        earlier positions is O(T * chunk) instead of O(T^2).

        Args:
          hidden: [B, T, input] of the backbone.
          labels: [B, T] int64, the next token of each position.
          weights: [B, T] of each position's own gradient; None means 1 everywhere.
          chunk: positions handled by one masked matrix product, at most.

        Returns:
          Logits with fast weights [B, T, V] and with the slow weights alone, or those of the
          anchor, [B, T, V].
        """
        if weights is None:
            weights = torch.ones_like(labels, dtype=hidden.dtype)
        interval = self.config.anchor_interval
        # As in the streaming form, each position comes with the gradient of the one before.
        known = F.pad(labels[:, :-1], (1, 0))
        taught = F.pad(weights[:, :-1], (1, 0))
        totals: dict[str, Tensor] = {}
        anchor: Sums | None = None
        last: Pending | None = None
        outputs, slow_outputs = [], []
        start = 0
        while start < labels.shape[1]:
            stop = min(start + chunk, labels.shape[1])
            if interval:
                stop = min(stop, (start // interval + 1) * interval)
                if start and start % interval == 0:
                    anchor = dict(totals)
            part = slice(start, stop)
            arguments = (hidden[:, part], known[:, part], taught[:, part], totals, anchor, last)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                output, slow_logits, totals, last = checkpoint(
                    self._chunk, *arguments, use_reentrant=False
                )
            else:
                output, slow_logits, totals, last = self._chunk(*arguments)
            outputs.append(output)
            slow_outputs.append(slow_logits)
            start = stop
        return self.logits(torch.cat(outputs, 1)), torch.cat(slow_outputs, 1)

    def _chunk(
        self,
        hidden: Tensor,
        known: Tensor,
        taught: Tensor,
        totals: Mapping[str, Tensor],
        anchor: Sums | None,
        last: Pending | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Pending]:
        """Read the next positions of every text.

        Args:
          hidden: [B, C, input].
          known: [B, C] label of the position before each.
          taught: [B, C] weight of the position before each.
          totals: the sums over all positions before the chunk.
          anchor: see `slow`.
          last: what the position before the chunk left.

        Returns:
          z [B, C, output] with the fast weights, logits [B, C, V] with the slow ones, and totals
          and last for the next chunk.
        """
        slow = self.slow(hidden, anchor)
        slow_logits = self.logits(slow.output)
        pending = slow.pending(self.expected_embedding(slow_logits))
        before = pending.one_later(last)
        gradients = self.gradients(before, known, taught, anchor)
        if self.first_order:
            before = Pending(*(tensor.detach() for tensor in before))
            gradients = Gradients(*(tensor.detach() for tensor in gradients))
        sums = _DecayedSums(dict(totals), self.log_decay(taught))
        output = self.fast(slow, before, gradients, sums)
        return output, slow_logits, sums.totals, Pending(*(tensor[:, -1] for tensor in pending))


class GradientSums(Protocol):
    """Sums of gradients over the positions so far, faded by the decay: update, then read."""

    def matrix(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add key (outer) value of each position to a sum; return query x sum, [B, T, Dv]."""

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Add value of each position to a sum; return the sum at each position, [B, T, Dv]."""


class _DecayedSums:
    """`GradientSums` of one chunk of positions, differentiable; `totals` is carried on.

    In float32 under autocast too: thousands of small updates vanish in bfloat16.
    """

    def __init__(self, totals: dict[str, Tensor], log_decay: Tensor) -> None:
        size = log_decay.shape[1]
        faded = log_decay.cumsum(1)
        so_far = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
        exponent = faded[:, :, None] - faded[:, None, :]
        self._mask = torch.exp(exponent.masked_fill(~so_far, -torch.inf))  # [B, C, C]
        self._read = torch.exp(faded)[..., None]  # of the sums at the chunk's start
        self._keep = torch.exp(faded[:, -1:] - faded)[..., None]  # to the chunk's end
        self._total = torch.exp(faded[:, -1:])[..., None]
        self.totals = totals

    def matrix(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        past = self.totals.get(name)
        result, self.totals[name] = self._add_and_read(past, query, key, value)
        return result

    def vector(self, name: str, value: Tensor) -> Tensor:
        past = self.totals.get(name)
        past = None if past is None else past[:, None]
        ones = value.new_ones(*value.shape[:2], 1)
        result, total = self._add_and_read(past, ones, ones, value)
        self.totals[name] = total[:, 0]
        return result

    def _add_and_read(
        self, past: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            query, key = query.to(value.dtype), key.to(value.dtype)
            result = ((query @ key.transpose(1, 2)) * self._mask) @ value
            total = key.transpose(1, 2) @ (value * self._keep)
            if past is not None:
                result = result + (query @ past) * self._read
                total = total + past * self._total
        return result, total


def shift(before: Tensor, now: Tensor) -> Tensor:
    """Return what belongs to the position before: [B, ...] and [B, T, ...] -> [B, T, ...]."""
    return torch.cat((before[:, None], now[:, :-1]), 1)


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)^2, the activation between the two dense layers."""
    return torch.relu(x).square()


def step_name(config: FastWeightsConfig, tensor: str) -> str:
    """Return the key in `FastWeights.steps` of one of FAST_TENSORS."""
    name = tensor if config.step_sizes == "per_tensor" else tensor.partition(".")[0]
    return name.replace(".", "_")  # a dot is not allowed in a parameter's name


def step_shapes(config: FastWeightsConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of every step size that the config has."""
    inputs = {"up.kernel": config.input_size, "down.kernel": config.hidden_size}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in FAST_TENSORS:
        if tensor in DENSE_BIASES and not config.update_dense_bias:
            continue
        vector = config.step_size_shape == "input" and tensor in inputs
        shapes.setdefault(step_name(config, tensor), (inputs[tensor],) if vector else ())
    return list(shapes.items())

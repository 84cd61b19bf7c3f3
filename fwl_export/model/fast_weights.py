"""The Fast Weight Layer and its parallel form, after Clark et al., EMNLP 2022 (arXiv 2212.02475).

The layer learns while it reads: each token's gradient changes its weights for the tokens after it.
The formulas are those of section 3 of the paper; README.md in this folder derives them and explains
every symbol. In short, with h the output of the backbone:

    a = h W1 + b1    r = relu(a)^2    m = r W2 + b2
    n = norm(m)      z = gamma n + beta      p = softmax(z U + c)

The *slow* weights are the trained ones. The *fast* weights are the slow ones plus the steps of all
gradients so far. They are never built as matrices of their own: the layer keeps the sums of the
gradients and applies each sum to its input.
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

# The tensors of the layer that have fast weights, in the order that the whole package uses.
FAST_TENSORS = ("up.kernel", "up.bias", "down.kernel", "down.bias", "norm.scale", "norm.bias")
DENSE_BIASES = ("up.bias", "down.bias")

# The sum of all gradients so far for each of FAST_TENSORS, with a row per text: [B, *shape].
Sums = Mapping[str, Tensor]


class Pending(NamedTuple):
    """What each position stores for its gradient, which must wait for the label.

    The label of a position is the token after it. All tensors are [B, T, size], and in float32 or
    better, except that `hidden` has the backbone's dtype. With an anchor, all but `hidden` are
    computed with the anchor's weights.

    Attributes:
      hidden: The backbone's output h; size input_size.
      up: a = h W1 + b1, before the activation; size hidden_size.
      normed: n, the normalized m; size output_size.
      inv_std: 1 / sigma, the reciprocal standard deviation of m; size 1.
      expected: p U^T, see `FastWeights.expected_embedding`; size output_size.
    """

    hidden: Tensor
    up: Tensor
    normed: Tensor
    inv_std: Tensor
    expected: Tensor

    def one_later(self, last: Pending | None) -> Pending:
        """Return at each position what the position before it stored.

        Args:
          last: What the position before the first one stored, [B, size] each; None means zeros, at
            the beginning of a text.
        """
        if last is None:
            last = Pending(*(torch.zeros_like(tensor[:, 0]) for tensor in self))
        return Pending(*(shift(before, now) for before, now in zip(last, self, strict=True)))


class SlowPass(NamedTuple):
    """What the layer computes with its slow weights, or with an anchor's; [B, T, size] each.

    Attributes:
      hidden, up, normed, inv_std: The same as in `Pending`.
      base: h W1 + b1, always with the slow weights; size hidden_size.
      output: z, the input of the unembedding; size output_size.
    """

    hidden: Tensor
    base: Tensor
    up: Tensor
    normed: Tensor
    inv_std: Tensor
    output: Tensor

    def pending(self, expected: Tensor) -> Pending:
        """Return what the positions store for their gradients."""
        return Pending(self.hidden, self.up, self.normed, self.inv_std, expected)


class Gradients(NamedTuple):
    """Gradients of each token's unnormalized loss; [B, T, size] each, in float32 or better.

    Attributes:
      up: g1, the gradient at a; size hidden_size.
      down: g2, the gradient at m; size output_size.
      norm_scale: The gradient at gamma; size output_size.
      norm_bias: The gradient at beta; size output_size.
    """

    up: Tensor
    down: Tensor
    norm_scale: Tensor
    norm_bias: Tensor


class FastWeights(nn.Module):
    """Two dense layers with a squared relu between them, a layer norm, and the unembedding.

    Parameters: `up_kernel` [input, hidden], `up_bias` [hidden], `down_kernel` [hidden, output],
    `down_bias`, `norm_scale` and `norm_bias` [output], `unembed` [V, output], `unembed_bias` [V];
    `steps`, the step sizes, one per tensor or per layer; and, with decay "learned", `horizon` [],
    the number of tokens after which a gradient has faded to 1/e.

    Two attributes affect training, but no output. With `first_order`, training treats the gradient
    steps as constants: only the step sizes and the horizon get gradients through them. With
    `gradient_checkpointing`, training computes each chunk again in the backward pass instead of
    storing its activations.
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
        # Stored as U^T [V, output]: with [output, V], an engine would hold a transposed copy too.
        self.unembed = nn.Parameter(torch.randn(vocab_size, s) * 0.03)
        self.unembed_bias = nn.Parameter(torch.zeros(vocab_size))
        self.steps = nn.ParameterDict(
            {name: nn.Parameter(torch.full(shape, 1e-3)) for name, shape in step_shapes(config)}
        )
        if config.decay == "learned":
            self.horizon = nn.Parameter(torch.tensor(500.0))

    def scaled_step(self, tensor: str) -> Tensor:
        """Return a tensor's step size divided by the loss normalizer N.

        Args:
          tensor: One of FAST_TENSORS.

        Returns:
          The step size, [], or one per input feature, [input features].
        """
        return self.steps[step_name(self.config, tensor)] / self.config.loss_normalizer

    def log_decay(self, weights: Tensor) -> Tensor:
        """Return the logarithm of each token's decay, in the shape and dtype of `weights`.

        A token of weight w multiplies the sums by exp(-w / horizon). So a token of weight 0, from
        which nothing is learned, fades nothing.

        Args:
          weights: How much to learn from each token, in float32 or better.
        """
        if self.config.decay == "none":
            return torch.zeros_like(weights)
        return -weights / self.horizon.to(weights.dtype)

    def normalize(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize m [..., output]: return n = (m - mean) / sigma, and 1 / sigma [..., 1]."""
        centered = m - m.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        inv_std = torch.rsqrt(variance + self.config.norm_epsilon)
        return centered * inv_std, inv_std

    def learned(self, tensor: str, query: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return step size x query x sum of a kernel's gradients: what learning changed in q W.

        Args:
          tensor: "up.kernel" or "down.kernel".
          query: The input of the kernel, [B, T, input features].
          read: Multiplies a query by the sum of the kernel's gradients; returns [B, T, columns].
        """
        step = self.scaled_step(tensor)
        if step.ndim:  # one step size per input feature: scale the query's features by their ratios
            ratio = step / step.abs().max().clamp_min(torch.finfo(step.dtype).tiny)
            query, step = wide(query) * ratio, step.abs().max()
        return step * read(query)

    def slow(self, hidden: Tensor, anchor: Sums | None = None) -> SlowPass:
        """Run the layer with its slow weights, or with an anchor's.

        An anchor is a copy of the sums at an earlier position. Its weights are the slow ones plus
        the steps of those sums; gradients are taken at these weights.

        Args:
          hidden: The backbone's output, [B, T, input].
          anchor: The sums of the anchor; None runs the slow weights.
        """
        base = product(hidden, self.up_kernel) + self.up_bias
        scale: Tensor = self.norm_scale
        bias: Tensor = self.norm_bias
        if anchor is None:
            up = base
            down = product(squared_relu(up), self.down_kernel) + self.down_bias
        else:

            def matrix(name: str, query: Tensor) -> Tensor:
                return self.learned(name, query, lambda q: wide(q) @ anchor[name])

            def vector(name: str) -> Tensor | float:
                return self._learned_vector(name, anchor.get(name))

            up = base - matrix("up.kernel", hidden) - vector("up.bias")
            activated = squared_relu(up)
            down = product(activated, self.down_kernel) + self.down_bias
            down = down - matrix("down.kernel", activated) - vector("down.bias")
            scale, bias = self._anchored_scale(anchor), bias - vector("norm.bias")
        normed, inv_std = self.normalize(down)
        return SlowPass(hidden, base, up, normed, inv_std, normed * scale + bias)

    def _learned_vector(self, name: str, total: Tensor | None) -> Tensor | float:
        """Return step size x sum, [B, 1, size], or 0 for a tensor without fast weights."""
        if total is None:
            return 0.0
        return self.scaled_step(name) * total[:, None]

    def _anchored_scale(self, anchor: Sums | None) -> Tensor:
        if anchor is None:
            return wide(self.norm_scale)
        return wide(self.norm_scale) - self._learned_vector("norm.scale", anchor["norm.scale"])

    def logits(self, output: Tensor) -> Tensor:
        """Return z U + c, with a soft cap if the config has one: [B, T, output] -> [B, T, V]."""
        logits = linear(output, self.unembed, self.unembed_bias)
        if cap := self.config.logit_softcap:
            logits = cap * torch.tanh(wide(logits) / cap)
        return logits

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """Return p U^T, the unembedding that the prediction expects of the label: [B, T, output].

        A soft cap makes the logits l = cap tanh(u / cap) of u = z U + c, with the slope
        dl/du = 1 - (l / cap)^2. Then the gradient at z is
        sum_v (p_v - [v = label]) dl_v/du_v U_v. This function returns the terms with p_v, and
        `_label_embedding` the term of the label.

        Args:
          logits: The logits l, [B, T, V].
        """
        weights = torch.softmax(wide(logits), -1)
        if cap := self.config.logit_softcap:
            weights = weights * (1 - (wide(logits) / cap).square())
        return wide(weights.to(self.unembed.dtype) @ self.unembed)

    def _label_embedding(self, at: Pending, labels: Tensor, anchor: Sums | None) -> Tensor:
        """Return the unembedding of the label, U_label: [B, T, output].

        With a soft cap it is multiplied by the cap's slope at the label's logit. That logit is
        computed again from n, with one scalar product per position, so that the state need not hold
        logits of the size of the vocabulary.
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
        """Return the gradients of each position's unnormalized loss.

        Args:
          at: What the positions stored.
          labels: The token after each position, [B, T] int64.
          weights: How much to learn from each label, [B, T]; 1 fully, 0 not at all.
          anchor: The sums of the anchor, see `slow`, through whose weights the loss is
            differentiated.
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
        at_activated = product(down, self.down_kernel.T)
        if anchor is not None:
            back = down @ anchor["down.kernel"].transpose(1, 2)
            at_activated = at_activated - back * self.scaled_step("down.kernel")
        up = at_activated * (2 * torch.relu(wide(at.up)))
        return Gradients(up, down, norm_bias * normed, norm_bias)

    def fast(
        self, slow: SlowPass, before: Pending, gradients: Gradients, sums: GradientSums
    ) -> Tensor:
        """Add the gradients to the sums, then run the layer with the fast weights.

        Args:
          slow: The slow pass of the positions to read.
          before: At each of them, what the position before it stored.
          gradients: At each of them, the gradients of the position before it.
          sums: The sums of all gradients so far, to add to and to read from.

        Returns:
          z with the fast weights, [B, T, output].
        """

        def matrix(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.learned(name, query, lambda q: sums.matrix(name, q, key, value))

        def vector(name: str, value: Tensor) -> Tensor | float:
            if name in DENSE_BIASES and not self.config.update_dense_bias:
                return 0.0
            return self.scaled_step(name) * sums.vector(name, value)

        up = slow.base - matrix("up.kernel", slow.hidden, before.hidden, gradients.up)
        activated = squared_relu(up - vector("up.bias", gradients.up))
        down = product(activated, self.down_kernel) + self.down_bias
        down = down - matrix("down.kernel", activated, squared_relu(before.up), gradients.down)
        normed, _ = self.normalize(down - vector("down.bias", gradients.down))
        scale = self.norm_scale - vector("norm.scale", gradients.norm_scale)
        bias = self.norm_bias - vector("norm.bias", gradients.norm_bias)
        return normed * scale + bias

    def parallel(
        self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None, chunk: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Read whole texts at once, each from a fresh state. This is the form for training.

        It is differentiable, through the gradient steps too (second order). The sums over earlier
        positions take O(T * chunk) memory instead of O(T^2).

        Args:
          hidden: The backbone's output, [B, T, input].
          labels: The token after each position, [B, T] int64.
          weights: How much to learn from each label, [B, T]; None means 1 everywhere.
          chunk: Largest number of positions in one masked matrix product.

        Returns:
          The logits with the fast weights, [B, T, V], and those with the slow weights, or with the
          anchor's, [B, T, V].
        """
        if weights is None:
            weights = torch.ones_like(labels, dtype=hidden.dtype)
        interval = self.config.anchor_interval
        # As in the streaming form, each position first learns from the gradient of the one before.
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
        """Read the next C positions of every text.

        Args:
          hidden: The backbone's output, [B, C, input].
          known: At each position the label of the one before, [B, C] int64.
          taught: At each position the weight of the one before, [B, C].
          totals: The sums over all positions before the chunk.
          anchor: The sums of the anchor, see `slow`.
          last: What the last position before the chunk stored.

        Returns:
          z with the fast weights, [B, C, output]; the logits with the slow ones, [B, C, V]; and
          `totals` and `last` for the next chunk.
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
    """Decayed sums of the gradients so far. At each position they are updated first, then read."""

    def matrix(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add the outer product key x value at each position to a kernel's sum, then read it.

        Args:
          name: The kernel, one of FAST_TENSORS.
          query: What to multiply the sum by, [B, T, Dk].
          key: The kernel's input at the position before, [B, T, Dk].
          value: The gradient at the kernel's output there, [B, T, Dv].

        Returns:
          query x sum at each position, [B, T, Dv].
        """

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Add the value at each position, [B, T, Dv], to a vector's sum; return the sums there."""


class _DecayedSums:
    """The `GradientSums` of one chunk, differentiable; `totals` holds the sums at its end.

    The sums are float32 even under autocast: in bfloat16, thousands of small updates would vanish.
    """

    def __init__(self, totals: dict[str, Tensor], log_decay: Tensor) -> None:
        size = log_decay.shape[1]
        faded = log_decay.cumsum(1)
        so_far = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
        exponent = faded[:, :, None] - faded[:, None, :]
        self._mask = torch.exp(exponent.masked_fill(~so_far, -torch.inf))  # [B, C, C]
        self._read = torch.exp(faded)[..., None]  # decay from the chunk's start to each position
        self._keep = torch.exp(faded[:, -1:] - faded)[..., None]  # from each position to its end
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
    """Return at each position the value of the one before it.

    Args:
      before: The value before the first position, [B, ...].
      now: The values at all positions, [B, T, ...].
    """
    return torch.cat((before[:, None], now[:, :-1]), 1)


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)^2, the activation between the two dense layers."""
    return torch.relu(x).square()


def step_name(config: FastWeightsConfig, tensor: str) -> str:
    """Return the key of a tensor, one of FAST_TENSORS, in `FastWeights.steps`."""
    name = tensor if config.step_sizes == "per_tensor" else tensor.partition(".")[0]
    return name.replace(".", "_")  # PyTorch allows no dots in names of parameters


def step_shapes(config: FastWeightsConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the shape of every step size of a layer."""
    inputs = {"up.kernel": config.input_size, "down.kernel": config.hidden_size}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in FAST_TENSORS:
        if tensor in DENSE_BIASES and not config.update_dense_bias:
            continue
        vector = config.step_size_shape == "input" and tensor in inputs
        shapes.setdefault(step_name(config, tensor), (inputs[tensor],) if vector else ())
    return list(shapes.items())

"""The Fast Weight Layer and its parallel form: Clark et al., EMNLP 2022 (arXiv 2212.02475).

Formulas are those of section 3 of the paper, in the notation of the README of this folder:
a = h W1 + b1, r = relu(a)^2, m = r W2 + b2, n = norm(m), z = gamma n + beta, p = softmax(z U + c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwl_export.model.config import FastWeightsConfig
from fwl_export.model.numerics import wide

# The tensors of the layer that have a fast part, in the order used everywhere.
FAST_TENSORS = ("up.kernel", "up.bias", "down.kernel", "down.bias", "norm.scale", "norm.bias")
DENSE_BIASES = ("up.bias", "down.bias")


class SlowPass(NamedTuple):
    """What the slow pass leaves for the gradient; [B, T, size] each.

    Attributes:
      hidden: the backbone's output h, size input_size.
      up: a = h W1 + b1, before the activation, size hidden_size.
      normed: n, size output_size.
      inv_std: 1 / sigma of the norm, size 1, float32 or better.
      output: z, size output_size.
    """

    hidden: Tensor
    up: Tensor
    normed: Tensor
    inv_std: Tensor
    output: Tensor


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
    """

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

    def slow(self, hidden: Tensor) -> SlowPass:
        """Run the layer with its slow weights on hidden states [B, T, input]."""
        up = hidden @ self.up_kernel + self.up_bias
        down = squared_relu(up) @ self.down_kernel + self.down_bias
        normed, inv_std = self.normalize(wide(down))
        output = normed * self.norm_scale + self.norm_bias
        return SlowPass(hidden, up, normed.to(hidden.dtype), inv_std, output.to(hidden.dtype))

    def logits(self, output: Tensor) -> Tensor:
        """Return z U + c: [B, T, output] -> [B, T, V]."""
        return F.linear(output, self.unembed, self.unembed_bias)

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """Return p U^T, the unembedding row expected under the prediction: [B, T, output]."""
        return torch.softmax(wide(logits), -1).to(logits.dtype) @ self.unembed

    def gradients(
        self, slow: SlowPass, expected: Tensor, labels: Tensor, weights: Tensor
    ) -> Gradients:
        """Return the unnormalised loss gradients of each position.

        Args:
          slow: the slow pass at the positions.
          expected: [B, T, output] from `expected_embedding`.
          labels: [B, T] int64, the token that followed.
          weights: [B, T], 1 to learn from it, 0 not to.
        """
        surprise = wide(expected) - wide(F.embedding(labels, self.unembed))
        norm_bias = surprise * weights[..., None]
        at_normed = norm_bias * wide(self.norm_scale)
        normed = wide(slow.normed)
        down = slow.inv_std * (
            at_normed
            - at_normed.mean(-1, keepdim=True)
            - normed * (at_normed * normed).mean(-1, keepdim=True)
        )
        at_activated = wide(down.to(slow.up.dtype) @ self.down_kernel.T)
        up = at_activated * (2 * torch.relu(wide(slow.up)))
        return Gradients(up, down, norm_bias * normed, norm_bias)

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
          chunk: positions handled by one masked matrix product.

        Returns:
          Logits with fast weights [B, T, V] and with the slow weights alone [B, T, V].
        """
        if weights is None:
            weights = torch.ones_like(labels, dtype=hidden.dtype)
        slow = self.slow(hidden)
        slow_logits = self.logits(slow.output)
        grads = self.gradients(slow, self.expected_embedding(slow_logits), labels, weights)
        log_decay = self.log_decay(weights)
        activated = squared_relu(slow.up)
        sums: dict[str, Tensor] = {}
        outputs = []
        for start in range(0, labels.shape[1], chunk):
            part = slice(start, start + chunk)
            now = _ExclusiveSums(sums, log_decay[:, part])
            up, down = grads.up[:, part], grads.down[:, part]
            fast_up = slow.up[:, part] - now.matrix(
                "up.kernel",
                hidden[:, part] * self.scaled_step("up.kernel"),
                hidden[:, part],
                up,
            )
            if self.config.update_dense_bias:
                fast_up = fast_up - self.scaled_step("up.bias") * now.vector("up.bias", up)
            fast_act = squared_relu(fast_up)
            fast_down = (
                fast_act @ self.down_kernel
                + self.down_bias
                - now.matrix(
                    "down.kernel",
                    fast_act * self.scaled_step("down.kernel"),
                    activated[:, part],
                    down,
                )
            )
            if self.config.update_dense_bias:
                fast_down = fast_down - self.scaled_step("down.bias") * now.vector(
                    "down.bias", down
                )
            normed, _ = self.normalize(fast_down)
            scale = self.norm_scale - self.scaled_step("norm.scale") * now.vector(
                "norm.scale", grads.norm_scale[:, part]
            )
            bias = self.norm_bias - self.scaled_step("norm.bias") * now.vector(
                "norm.bias", grads.norm_bias[:, part]
            )
            outputs.append(normed * scale + bias)
        return self.logits(torch.cat(outputs, 1)), slow_logits


class _ExclusiveSums:
    """Decayed sums over all earlier positions, for one chunk of positions.

    A position reads the gradients of the positions before it, never its own. Gradient j,
    read at i, has faded by the decays of gradients j+1 ... i-1, which were added after it.
    """

    def __init__(self, sums: dict[str, Tensor], log_decay: Tensor) -> None:
        size = log_decay.shape[1]
        after = log_decay.cumsum(1)
        before = F.pad(after[:, :-1], (1, 0))
        earlier = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
        exponent = before[:, :, None] - after[:, None, :]
        self._mask = torch.exp(exponent.masked_fill(~earlier, -torch.inf))  # [B, C, C]
        self._read = torch.exp(before)[..., None]  # of the sums at the chunk's start
        self._keep = torch.exp(after[:, -1:] - after)[..., None]  # to the chunk's end
        self._total = torch.exp(after[:, -1:])[..., None]
        self._sums = sums

    def matrix(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return sum_j (query . key_j) value_j and add this chunk to the named sum."""
        result = ((query @ key.transpose(1, 2)) * self._mask) @ value
        past = self._sums.get(name)
        added = key.transpose(1, 2) @ (value * self._keep)
        if past is not None:
            result = result + (query @ past) * self._read
            added = added + past * self._total
        self._sums[name] = added
        return result

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Return sum_j value_j and add this chunk to the named sum."""
        ones = value.new_ones(*value.shape[:2], 1)
        return self.matrix(name, ones, ones, value)


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

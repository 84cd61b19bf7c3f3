"""A new Fast Weight Layer for a pretrained backbone, which predicts what the backbone predicts.

A random layer would turn a pretrained model's predictions into noise until it is trained. This one
starts near the identity: with learning off, the model says what its backbone says, and with
learning on it adapts to what it reads, both without any training.

Let h = w x + b be the backbone's output, where w and b are the parameters of its final norm, and x
the normalized state. The entries of x are at most c = sqrt(width) in size. The layer of section 2
of README.md then computes, with twice the backbone's width in its middle,

    a = [c + x, c - x]        from W1 = [1/w, -1/w] and b1 = [c - b/w, c + b/w]
    m = x A                   from (c + x)^2 - (c - x)^2 = 4 c x, so W2 = [A; -A] / 4c
    z = w norm(m) + b         from gamma = w and beta = b

with A the identity, and z is h where the layer norm changes nothing. After a layer norm that holds
exactly. After an RMS norm the layer norm would remove the mean of x over its features, one
direction of many. Which one is a matter of choice: w and x may change their signs together, feature
by feature, and A may move x along any direction until its mean is zero. `_least_missed` chooses
both so that the predictions change least, by the model's own distributions over texts that it
writes itself; no text is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fwl_export.bundle.config import FastWeightsConfig
from fwl_export.errors import ConfigError
from fwl_export.model.backbones.huggingface import HuggingFaceBackbone
from fwl_export.model.fast_weights import FastWeights

# Chosen on SmolLM2-135M-Instruct, on the first 1024 tokens of the descriptions of two Python
# packages and of two modules of others (released in 2026, after the model), full attention.
# Perplexity with learning on against off, descriptions / modules, and the worst of the four texts:
#   step 0.01   -1.1 % / -0.9 %   -0.1 %     (last quarter of the texts -2.4 % / -2.1 %)
#   step 0.02   -0.7 % / -1.4 %   +1.7 %     (last quarter -3.8 % / -3.9 %)
#   step 0.04   +2.3 % / +1.7 %   +8.3 %
#   step 0.08   diverges
# So a step of 0.01 hurts no text, and the gain grows with what has been read. That was without
# forgetting; the horizon only bounds what a stream of millions of tokens adds up to.
ANCHOR_INTERVAL = 32
HORIZON = 1e6
_STEP = 0.01  # of the first kernel
_LEAST_STEP = 1e-9  # of all other tensors

# Entries of w that are smaller than this part of the largest would need too large entries of 1/w:
# float16 has no normal numbers below 6e-5.
_SMALLEST_SCALE = 1e-3
# Texts that the model writes itself, their tokens, and the first of those whose states are used.
_OWN_TEXTS, _OWN_TOKENS, _BEGINNING = 8, 96, 1
_STATES_AT_ONCE = 64
_STARTS, _FLIPS = 20, 4  # searches for signs, and flips in each of them by the number of features
_RIDGE = 0.1
_PROBES = 8  # random vectors by which a norm is recognized
_SAME = 1e-4  # relative error that float32 stays below by a factor of 10


@dataclass(frozen=True)
class FinalNorm:
    """The norm after a backbone's last block: w n(u) + b.

    Attributes:
      scale: w, [width].
      bias: b, [width].
      centered: Whether n subtracts the mean over the features (layer norm) or not (RMS norm).
    """

    scale: Tensor
    bias: Tensor
    centered: bool


def new_layer_config(backbone: HuggingFaceBackbone, **changes: Any) -> FastWeightsConfig:
    """Return the configuration of a new layer.

    Args:
      backbone: The backbone that the layer is put on.
      changes: Other values of fields of `FastWeightsConfig`, e.g. the soft cap of the head.
    """
    width = backbone.config.width
    settings = {"anchor_interval": ANCHOR_INTERVAL, **changes}
    return FastWeightsConfig(width, 2 * width, width, **settings)


@torch.no_grad()
def start_near_identity(layer: FastWeights, backbone: HuggingFaceBackbone) -> None:
    """Set a layer's weights and step sizes so that its output is the backbone's.

    Args:
      layer: The layer, whose unembedding is that of the backbone already. Its hidden size is twice
        the width or more; units beyond that are read with random weights and start without effect.
      backbone: The backbone, with its weights.

    Raises:
      ConfigError: The backbone has no final norm, or the layer's sizes do not fit.
    """
    norm = final_norm(backbone)
    keep = torch.eye(len(norm.scale))
    if not norm.centered:
        signs, keep = _least_missed(_sensitivity(layer, _own_states(layer, backbone), norm.scale))
        norm = replace(norm, scale=norm.scale * signs)
    width, hidden = len(norm.scale), layer.config.hidden_size
    if hidden < 2 * width or layer.config.output_size != width:
        raise ConfigError(
            f"fast_weights.hidden_size is {hidden} and output_size {layer.config.output_size}; to "
            f"start from the backbone's predictions they must be at least {2 * width} and {width}"
        )
    scale, seen = _divisor(norm.scale)
    limit = width**0.5
    layer.up_kernel[:, : 2 * width] = torch.cat((torch.diag(1 / scale), torch.diag(-1 / scale)), 1)
    shift = norm.bias / scale
    layer.up_bias.zero_()[: 2 * width] = torch.cat((limit - shift, limit + shift))
    layer.down_kernel.zero_()[: 2 * width] = torch.cat((keep, -keep)) / (4 * limit)
    layer.down_bias.zero_()
    layer.norm_scale.copy_(scale * seen)
    layer.norm_bias.copy_(norm.bias)
    _set_steps(layer, norm)


def _divisor(scale: Tensor) -> tuple[Tensor, float]:
    """Return w without entries too small to divide by, [width], and the part of x that is seen.

    Dividing by a larger entry shrinks that feature of x, and with it the norm's mean square. The
    second value is the root of the mean square that is left if all features are equally large.
    """
    least = float(scale.abs().max()) * _SMALLEST_SCALE
    sign = torch.where(scale < 0, -1.0, 1.0)
    divisor = sign * scale.abs().clamp_min(least)
    return divisor, float((scale / divisor).square().mean().sqrt())


def _own_states(layer: FastWeights, backbone: HuggingFaceBackbone) -> Tensor:
    """Return hidden states of texts that the model writes itself, [tokens, width].

    Args:
      layer: The layer, for its unembedding.
      backbone: The backbone.
    """
    config, generator = backbone.config, torch.Generator().manual_seed(0)
    length = min(_OWN_TOKENS, config.max_positions or _OWN_TOKENS)
    backbone.config = replace(config, window=length, max_positions=length)  # short caches
    try:
        caches = [torch.zeros(_OWN_TEXTS, *shape) for _, shape in backbone.cache_specs(length)]
        ids = torch.randint(len(layer.unembed), (_OWN_TEXTS, 1), generator=generator)
        lengths = torch.ones(_OWN_TEXTS, dtype=torch.int64)
        states = []
        for position in range(length):
            hidden, caches = backbone.stream(ids, lengths * position, lengths, caches)
            states.append(hidden[:, 0])
            likely = torch.softmax(layer.logits(hidden[:, 0]), -1)
            ids = torch.multinomial(likely, 1, generator=generator)
    finally:
        backbone.config = config
    return torch.cat(states[_BEGINNING:] or states)


def _sensitivity(layer: FastWeights, states: Tensor, scale: Tensor) -> Tensor:
    """Return how much the predictions change with each pair of features of x, [width, width].

    It is the covariance of w U[y] over the labels y that the model expects, averaged over states:
    the second derivative of the divergence between the predictions before and after a change of x.

    Args:
      layer: The layer, for its unembedding.
      states: Hidden states, [tokens, width].
      scale: w, [width].
    """
    expected = torch.zeros(len(layer.unembed))
    outer = torch.zeros(len(scale), len(scale), dtype=torch.float64)
    for part in states.split(_STATES_AT_ONCE):
        likely = torch.softmax(layer.logits(part), -1)
        expected += likely.sum(0)
        mean = (likely @ layer.unembed).double()
        outer -= mean.T @ mean
    outer += (layer.unembed.T @ (layer.unembed * expected[:, None])).double()
    w = scale.double()
    return w[:, None] * (outer / len(states)) * w


def _least_missed(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """Return signs [width] of the features of x, and A [width, width] for x with these signs.

    Args:
      sensitivity: How much the predictions change with each pair of features of x.
    """
    _, vectors = torch.linalg.eigh(sensitivity)
    starts = [torch.where(column < 0, -1.0, 1.0).double() for column in vectors.T[:_STARTS]]
    signs = min(
        (_flipped(sensitivity, start) for start in starts), key=lambda s: float(s @ sensitivity @ s)
    )
    ridge = _RIDGE * sensitivity.diagonal().mean()
    away = torch.linalg.solve(sensitivity + ridge * torch.eye(len(signs)).double(), signs) * signs
    away /= away.sum()
    return signs.float(), (torch.eye(len(signs)) - away).float()


def _flipped(matrix: Tensor, signs: Tensor) -> Tensor:
    """Return signs s [width] for which s M s is small: no flip of a single one makes it smaller."""
    for _ in range(_FLIPS * len(signs)):
        gain = matrix.diagonal() - signs * (matrix @ signs)
        best = int(gain.argmin())
        if gain[best] >= 0:
            break
        signs[best] = -signs[best]
    return signs


def _set_steps(layer: FastWeights, norm: FinalNorm) -> None:
    """Set step sizes and horizon.

    A step is divided by the expected square of the tensor's input: for the first kernel of h, which
    is the sum of w^2 + b^2; for the second of r, whose 2 width entries are about c^2 = width each.
    All but the first are so small that only training makes them count; 0 would have no logarithm,
    which is what training changes.
    """
    up = float((norm.scale.square() + norm.bias.square()).sum())
    down = 2.0 * len(norm.scale) ** 3
    steps = {"up_kernel": _STEP / up, "down_kernel": _LEAST_STEP / down}
    steps |= {"up": steps["up_kernel"], "down": steps["down_kernel"]}  # one per layer
    for name, step in layer.steps.items():
        step.fill_(steps.get(name, _LEAST_STEP) * layer.config.loss_normalizer)
    if layer.config.decay == "learned":
        layer.horizon.fill_(HORIZON)


@torch.no_grad()
def final_norm(backbone: HuggingFaceBackbone) -> FinalNorm:
    """Return the backbone's final norm, whatever its class is called.

    It is the module whose output is the backbone's output. What it computes is measured on random
    vectors: Gemma's norm, for instance, multiplies by 1 + weight.

    Raises:
      ConfigError: The output comes from no norm.
    """
    outputs: list[tuple[nn.Module, Any]] = []
    leaves = [module for module in backbone.body.modules() if not list(module.children())]
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in leaves]
    try:
        hidden = backbone(torch.arange(4)[None] % len(backbone.embedding.weight))
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in reversed(outputs):
        is_last = isinstance(output, Tensor) and output.shape == hidden.shape
        if is_last and torch.equal(output, hidden) and (norm := _measured(module, hidden.shape[2])):
            return norm
    raise ConfigError(
        f"the last module of this {backbone.config.model['model_type']} model is no layer norm or "
        "RMS norm, from which a new Fast Weight Layer could start; give a trained layer"
    )


def _measured(module: nn.Module, width: int) -> FinalNorm | None:
    """Return w, b and the kind of a norm, or None if the module computes something else."""
    generator = torch.Generator().manual_seed(0)
    # Large values, beside which the norm's epsilon is nothing, with a mean that tells both apart.
    u = 100 * (torch.randn(1, _PROBES, width, generator=generator) + 0.5)
    try:
        above, below = module(u)[0], module(-u)[0]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    odd, even = (above - below) / 2, (above + below) / 2
    for centered in (False, True):
        x = (u - u.mean(-1, keepdim=True) if centered else u)[0]
        x = x * x.square().mean(-1, keepdim=True).rsqrt()
        scale, bias = (odd * x).sum(0) / x.square().sum(0), even.mean(0)
        error = (above - (scale * x + bias)).abs().max()
        if error <= _SAME * above.abs().max():
            return FinalNorm(scale, bias, centered)
    return None

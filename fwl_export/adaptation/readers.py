"""Readers of a long stream of tokens: standard inference, dynamic evaluation, fast weights.

A reader predicts the next tokens of one stream and carries its state from call to call. Every
reader predicts a token before it learns from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import StreamingModel

# Default number of tokens per call; ring buffers are sized for it.
CHUNK = 256

# The epsilon of the RMS rule, relative to the mean RMS over all weights, so that it suits any
# model. Without it, weights that hardly ever had a gradient, such as embeddings of rare tokens,
# would jump. On the demo model, 1, 3 and 10 give perplexities within 0.5 % of each other; 0.1 is
# 2 % worse.
RMS_EPSILON = 1.0

Losses = npt.NDArray[np.float32]


class Reader(Protocol):
    """Predicts the next tokens of one stream.

    Attributes:
      model: The model that reads.
      shared_bytes: Size of the tensors that the reader was given and still holds, such as weights.
    """

    model: FWLModel
    shared_bytes: int

    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read the next tokens.

        Args:
          inputs: The next tokens, [1, T] int64.
          labels: The token after each of them, [1, T] int64; used only after the prediction.

        Returns:
          The logits, [1, T, V].
        """
        ...


class PlainReader:
    """Standard inference with key and value caches: backbone and slow weights, no adaptation."""

    def __init__(self, model: FWLModel, max_tokens: int = CHUNK) -> None:
        """Start a stream.

        Args:
          model: The model, whose parameters are shared, not copied.
          max_tokens: Largest number of tokens per call.
        """
        self.model = model
        self.shared_bytes = weight_bytes(model)
        self._device = model.fast_weights.unembed.device
        capacity = model.config.backbone.window + max_tokens - 1
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._caches = [
            torch.zeros(1, *shape, device=self._device)
            for _, shape in model.backbone.cache_specs(capacity)
        ]

    @torch.no_grad()
    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read the next tokens, see `Reader.read`."""
        return self._logits(inputs)

    def _logits(self, inputs: Tensor) -> Tensor:
        lengths = torch.tensor([inputs.shape[1]], device=self._device)
        hidden, caches = self.model.backbone.stream(inputs, self._position, lengths, self._caches)
        self._caches = [cache.detach() for cache in caches]
        self._position = self._position + lengths
        layer = self.model.fast_weights
        return layer.logits(layer.slow(hidden).output)


class DynamicReader(PlainReader):
    """Dynamic evaluation (Krause et al., ICML 2018, arXiv 1709.07432).

    After each segment, it takes a gradient step on all weights, with the segment's mean loss. These
    are the two rules of that paper, with the gradient g, the weights theta, and the weights at the
    start of the stream theta_g:

        SGD   theta += -eta g + lambda (theta_g - theta)
        RMS   theta += -eta g / (rms + epsilon) + min(lambda rms / mean(rms), 1) (theta_g - theta)

    Keys and values of earlier calls stay as the weights at that time computed them.
    """

    def __init__(
        self,
        model: FWLModel,
        segment: int,
        learning_rate: float,
        decay: float = 0.0,
        rms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start a stream on a copy of the model.

        Args:
          model: The model, which is not changed.
          segment: Largest number of tokens per call.
          learning_rate: The learning rate eta.
          decay: lambda, the rate at which weights return to their start; 0 means never.
          rms: Root mean square of each weight's gradient, see `gradient_rms`, for the RMS rule;
            None means the SGD rule.
        """
        super().__init__(copy.deepcopy(model).requires_grad_(True), segment)
        self.shared_bytes = weight_bytes(model) if decay else 0
        self._learning_rate, self._decay = learning_rate, decay
        self._start = dict(model.named_parameters())
        self._rms = rms
        if rms is not None:
            self.shared_bytes += sum(tensor.nbytes for tensor in rms.values())
            self._mean_rms = _mean(rms)

    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read the next tokens and learn from them, see `Reader.read`."""
        with torch.enable_grad():
            logits = self._logits(inputs)
            loss = cross_entropy(logits[0], labels[0])
        self.model.zero_grad()
        torch.autograd.backward(loss)
        self._step()
        return logits.detach()

    @torch.no_grad()
    def _step(self) -> None:
        for name, weight in self.model.named_parameters():
            if weight.grad is None:  # e.g. the step sizes of the fast weights
                continue
            back: Tensor | float = self._decay
            if self._rms is None:
                step = weight.grad
            else:
                rms = self._rms[name]
                step = weight.grad / (rms + RMS_EPSILON * self._mean_rms)
                back = (self._decay / self._mean_rms * rms).clamp(max=1.0) if back else back
            if self._decay:
                weight.add_(back * (self._start[name] - weight))
            weight.add_(step, alpha=-self._learning_rate)


class _Observer(DynamicReader):
    """Sums the squares of gradients, and does not change the weights."""

    def __init__(self, model: FWLModel, segment: int) -> None:
        super().__init__(model, segment, 0.0)
        self.squares: dict[str, Tensor] = {}
        self.count = 0

    def _step(self) -> None:
        self.count += 1
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                square = weight.grad.square()
                self.squares[name] = self.squares.get(name, torch.zeros_like(square)) + square


def gradient_rms(
    model: FWLModel,
    tokens: Tensor,
    segment: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """Return the root mean square of every weight's gradient over the segments of a text.

    Args:
      model: The model, which is not changed.
      tokens: Token ids of the text, [N] int64. Krause et al. use the training text; any text of
        the same kind will do.
      segment: Number of tokens per gradient.
      advance: Called with the number of tokens read since the last time.

    Returns:
      A tensor in the shape of each parameter, by the parameter's name.
    """
    reader = _Observer(model, segment)
    for losses in iterate_losses(reader, tokens, segment):
        advance(len(losses))
    return {name: (square / reader.count).sqrt() for name, square in reader.squares.items()}


def _mean(rms: Mapping[str, Tensor]) -> float:
    """Return the mean over all weights, but at least a tiny positive number."""
    total = sum(float(tensor.sum()) for tensor in rms.values())
    return max(total / sum(tensor.numel() for tensor in rms.values()), 1e-30)


class AdaptingReader:
    """The streaming model with fast weights, in one row that carries its state."""

    def __init__(
        self, model: FWLModel, reset_every: int | None = None, max_tokens: int = CHUNK
    ) -> None:
        """Start a stream.

        Args:
          model: The model, whose parameters are shared, not copied.
          reset_every: Number of tokens after which the sums are reset to zero; caches, position and
            the pending gradient stay. None means never. A call must end at each reset.
          max_tokens: Largest number of tokens per call.
        """
        self.model = model
        self.shared_bytes = weight_bytes(model)
        self._device = model.fast_weights.unembed.device
        self._streaming = StreamingModel(model, max_tokens)
        self._state = [
            torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in self._streaming.specs
        ]
        self._reset_every = reset_every
        self._anchor_interval = model.config.fast_weights.anchor_interval
        self._read = 0

    @torch.no_grad()
    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read the next tokens, see `Reader.read`; a label teaches when it arrives as an input."""
        self._reset_if_due(inputs.shape[1])
        parts = []
        while inputs.shape[1]:
            length = inputs.shape[1]
            if self._anchor_interval:
                length = min(length, self._anchor_interval - self._read % self._anchor_interval)
            logits: Tensor
            logits, *self._state = self._streaming(
                inputs[:, :length],
                torch.ones(1, length, device=self._device),
                torch.tensor([length], device=self._device),
                torch.arange(length, device=self._device)[None],
                torch.ones(1, device=self._device),
                *self._state,
            )
            parts.append(logits)
            self._read += length
            inputs = inputs[:, length:]
        return torch.cat(parts, 1)

    def _reset_if_due(self, length: int) -> None:
        if self._reset_every is None:
            return
        since = self._read % self._reset_every
        if since + length > self._reset_every:
            raise ValueError(
                f"a call of {length} tokens at {self._read} crosses a reset, due every "
                f"{self._reset_every} tokens; end a call at each reset"
            )
        if since == 0:
            for spec, tensor in zip(self._streaming.specs, self._state, strict=True):
                if spec.name.startswith("fast."):
                    tensor.zero_()


def weight_bytes(model: FWLModel) -> int:
    """Return the size of a model's parameters in bytes."""
    return sum(parameter.nbytes for parameter in model.parameters())


def iterate_losses(reader: Reader, tokens: Tensor, chunk: int) -> Iterator[Losses]:
    """Read a stream and yield the loss of each token but the first, call by call.

    Args:
      reader: The reader, at the beginning of a stream.
      tokens: Token ids of the stream, [N] int64.
      chunk: Number of tokens per call.

    Yields:
      The losses of a call in nats, [T]; all calls together have N - 1.
    """
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[None, start : start + chunk + 1]
        inputs, labels = part[:, :-1], part[:, 1:]
        logits = reader.read(inputs, labels)
        yield cross_entropy(logits[0], labels[0], reduction="none").numpy()


def perplexity(losses: npt.NDArray[Any]) -> float:
    """Return the exponential of the mean loss; infinity if that overflows or is NaN."""
    mean = float(np.mean(losses, dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf

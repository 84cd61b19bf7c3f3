"""Ways to read a long stream of tokens, and what each costs: the rows of evaluate_demo.py.

A reader predicts the next tokens of one stream and keeps what it needs in between. All readers
predict a token before they learn from it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fwl_export import state
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import StreamingModel
from fwl_export.op import torch_op

# Tokens per call where nothing asks for fewer; ring buffers are sized for it.
CHUNK = 256

Losses = npt.NDArray[np.float32]


class Reader(Protocol):
    """Predicts the next tokens of one stream."""

    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read on.

        Args:
          inputs: [1, T] int64, the next tokens.
          labels: [1, T] int64, the token after each of them; used after the prediction only.

        Returns:
          Logits [1, T, V].
        """
        ...


class PlainReader:
    """Standard inference with key/value caches: backbone and slow weights, nothing of the FWL."""

    def __init__(self, model: FWLModel, max_tokens: int = CHUNK) -> None:
        """Start a stream in which a call brings at most `max_tokens` tokens."""
        self.model = model
        capacity = model.config.backbone.window + max_tokens - 1
        self._position = torch.zeros(1, dtype=torch.int64)
        self._caches = [torch.zeros(1, *shape) for _, shape in model.backbone.cache_specs(capacity)]

    @torch.no_grad()
    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read on, see `Reader.read`."""
        return self._logits(inputs)

    def _logits(self, inputs: Tensor) -> Tensor:
        lengths = torch.tensor([inputs.shape[1]])
        hidden, caches = self.model.backbone.stream(inputs, self._position, lengths, self._caches)
        self._caches = [cache.detach() for cache in caches]
        self._position = self._position + lengths
        layer = self.model.fast_weights
        return layer.logits(layer.slow(hidden).output)


class DynamicReader(PlainReader):
    """Dynamic evaluation: after each call one SGD step on all weights with its mean loss.

    Keys and values of earlier calls stay as the weights of their time computed them.
    """

    def __init__(self, model: FWLModel, segment: int, learning_rate: float) -> None:
        """Start a stream on a copy of the model, read in calls of at most `segment` tokens."""
        super().__init__(copy.deepcopy(model).requires_grad_(True), segment)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)

    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read on and learn, see `Reader.read`."""
        with torch.enable_grad():
            logits = self._logits(inputs)
            loss = cross_entropy(logits[0], labels[0])
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return logits.detach()


class AdaptingReader:
    """The streaming Fast Weight Layer model, one row, with the state carried on."""

    def __init__(
        self, model: FWLModel, reset_every: int | None = None, max_tokens: int = CHUNK
    ) -> None:
        """Start a stream.

        Args:
          model: its parameters are shared, not copied.
          reset_every: tokens after which the sums start again from zero; caches, position and
            the pending gradient stay. None means never. Calls must end where a reset falls.
          max_tokens: the most tokens of a call.
        """
        self._streaming = StreamingModel(model, max_tokens)
        fresh = state.zeros(self._streaming.specs, 1)
        self._state = [torch.from_numpy(array) for array in fresh.values()]
        self._reset_every = reset_every
        self._anchor_interval = model.config.fast_weights.anchor_interval
        self._read = 0

    @torch.no_grad()
    def read(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Read on, see `Reader.read`; a label is learned from when it comes as an input."""
        self._reset_if_due(inputs.shape[1])
        parts = []
        while inputs.shape[1]:
            length = inputs.shape[1]
            if self._anchor_interval:
                length = min(length, self._anchor_interval - self._read % self._anchor_interval)
            logits: Tensor
            logits, *self._state = self._streaming(
                inputs[:, :length],
                torch.ones(1, length),
                torch.tensor([length]),
                torch.arange(length)[None],
                torch.ones(1),
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


def paper_form(model: FWLModel) -> FWLModel:
    """Return a model with the same weights and step sizes whose sums only grow (decay 1), with
    gradients at the slow weights.
    """
    layer = dataclasses.replace(model.config.fast_weights, decay="none", anchor_interval=0)
    pure = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    weights = {k: v for k, v in model.state_dict().items() if k != "fast_weights.horizon"}
    pure.load_state_dict(weights)
    return pure.eval()


def anchored(model: FWLModel, interval: int, step_factor: float, horizon_factor: float) -> FWLModel:
    """Return a model with the same weights that takes its gradients at an anchor.

    What was learned is then not learned again, so it can be kept for longer: `horizon_factor`
    and `step_factor` multiply the learned horizon and all step sizes.
    """
    layer = dataclasses.replace(model.config.fast_weights, anchor_interval=interval)
    read = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    read.load_state_dict(model.state_dict())
    with torch.no_grad():
        read.fast_weights.horizon.mul_(horizon_factor)
        for step in read.fast_weights.steps.values():
            step.mul_(step_factor)
    return read.eval()


def iterate_losses(reader: Reader, tokens: Tensor, chunk: int) -> Iterator[Losses]:
    """Read a stream and yield the loss of each token but the first, a call at a time.

    Args:
      reader: at the beginning of a stream.
      tokens: [N] int64.
      chunk: tokens per call.

    Yields:
      Losses in nats, [T] each; together [N - 1].
    """
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[None, start : start + chunk + 1]
        inputs, labels = part[:, :-1], part[:, 1:]
        logits = reader.read(inputs, labels)
        yield cross_entropy(logits[0], labels[0], reduction="none").numpy()


def perplexity(losses: npt.NDArray[Any]) -> float:
    """Return exp of the mean loss; infinity where that is too large or not a number."""
    mean = float(np.mean(losses, dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def minimize_on_grid(
    cost: Callable[[float], float], start: float, factor: float, max_moves: int = 6
) -> tuple[float, bool]:
    """Return the best point of a geometric grid, and whether its neighbours are both worse.

    The grid begins with start / factor, start and start * factor, and grows at an edge for as
    long as the best point lies there. Equal costs, e.g. infinities, go to the smaller value.
    """
    known: dict[int, float] = {}
    center = 0
    for _ in range(max_moves):
        for index in (center - 1, center, center + 1):
            if index not in known:
                known[index] = cost(_rounded(start * factor**index))
        best = min(sorted(known), key=lambda index: known[index])
        if best == center:
            return _rounded(start * factor**center), True
        center = best
    return _rounded(start * factor**center), False


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def seconds_per_block(
    readers: Mapping[str, tuple[Reader, int]], tokens: Tensor, block: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time readers on the same blocks of tokens, one after the other on every block.

    Args:
      readers: name -> (reader, tokens per call). Who goes first changes from block to block.
      tokens: [N] int64; the stream, of which as many whole blocks are read as it holds.
      block: tokens per block.
      warm_up: blocks at the beginning that are read and not reported.

    Returns:
      Seconds of each reader for each block after the warm-up.
    """
    names = list(readers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, start in enumerate(range(0, len(tokens) - block, block)):
        part = tokens[None, start : start + block + 1]
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            began = time.perf_counter()
            _read_block(*readers[name], part)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def count_flops(reader: Reader, chunk: int, tokens: Tensor) -> int:
    """Return the floating-point operations of the matrix products of reading `tokens[:-1]`.

    Args:
      reader: at any point of a stream; it reads on.
      chunk: tokens per call.
      tokens: [N + 1] int64.
    """
    formulas = {torch.ops.fwl.linear_attention_update: linear_attention_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        _read_block(reader, chunk, tokens[None])
    return int(counter.get_total_flops())


def linear_attention_flops(
    query_shape: list[int],
    key_shape: list[int],
    value_shape: list[int],
    *_: Any,
    out_shape: Any = None,
) -> int:
    """Return the operations of `fwl::linear_attention_update`: the counter cannot see into it."""
    batch, length, key_size = query_shape
    value_size = value_shape[2]
    total = 0
    for start in range(0, length, torch_op._CHUNK):
        size = min(torch_op._CHUNK, length - start)
        # query x key, (query x key) x value; query x state and key x value
        total += 2 * size * (size * (key_size + value_size) + 2 * key_size * value_size)
    return batch * total


def _read_block(reader: Reader, chunk: int, block: Tensor) -> None:
    inputs, labels = block[:, :-1], block[:, 1:]
    for start in range(0, inputs.shape[1], chunk):
        part = slice(start, start + chunk)
        reader.read(inputs[:, part], labels[:, part])

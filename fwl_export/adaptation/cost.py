"""Measure what a reader costs: seconds, floating-point operations by part, peak memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fwl_export.adaptation.readers import (
    AdaptingReader,
    Losses,
    PlainReader,
    Reader,
    iterate_losses,
)
from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.model.language_model import FWLModel
from fwl_export.op import torch_op

# The parts of the model for which operations are counted, in the order of a call.
BACKBONE = "backbone"
SLOW = "slow layer"
SLOW_LOGITS = "slow logits, z U"
EXPECTED = "expected embedding, p U^T"
GRADIENT = "gradient"
UPDATE = "update and read"
VECTORS = "sums of biases and norm"
FAST = "fast second layer"
FAST_LOGITS = "fast logits, z' U"
BACKWARD = "backward"
PARTS = (
    BACKBONE,
    SLOW,
    SLOW_LOGITS,
    EXPECTED,
    GRADIENT,
    UPDATE,
    VECTORS,
    FAST,
    FAST_LOGITS,
    BACKWARD,
)

# Model shapes whose operations can be counted without a checkpoint.
SHAPES = {
    # The paper's GPT-2 small, 124 M parameters with a tied embedding, plus the Fast Weight Layer.
    "gpt2-small": ModelConfig(
        50257,
        BackboneConfig(width=768, layers=12, heads=12, window=1024),
        FastWeightsConfig(input_size=768, hidden_size=3072, output_size=768),
    ),
}


@dataclass(frozen=True)
class Reading:
    """The result of one reader on a stream.

    Attributes:
      losses: Loss of each token but the first in nats, [N - 1].
      seconds: Time for each whole block.
    """

    losses: Losses
    seconds: list[float]


def read_interleaved(
    readers: Mapping[str, tuple[Reader, int]],
    tokens: Tensor,
    block: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Reading]:
    """Read a stream with all readers in turn, block by block.

    The reader that goes first changes from block to block.

    Args:
      readers: The readers and their tokens per call, by name.
      tokens: Token ids of the stream, [N] int64.
      block: Number of tokens per block, a multiple of every reader's tokens per call. The last
        block may be shorter, and is then not timed.
      advance: Called with the number of tokens that a reader has read since the last time.
    """
    names = list(readers)
    losses: dict[str, list[Losses]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, start in enumerate(range(0, len(tokens) - 1, block)):
        part = tokens[start : start + block + 1]
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            began = time.perf_counter()
            losses[name] += iterate_losses(*_reading(readers[name], part))
            if len(part) == block + 1:
                seconds[name].append(time.perf_counter() - began)
            advance(len(part) - 1)
    return {name: Reading(np.concatenate(losses[name]), seconds[name]) for name in names}


def _reading(reader: tuple[Reader, int], tokens: Tensor) -> tuple[Reader, Tensor, int]:
    return reader[0], tokens, reader[1]


def time_ratio(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of the ratios of paired times."""
    low, middle, high = np.quantile(np.array(seconds) / np.array(base), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def count_flops(reader: Reader, chunk: int, tokens: Tensor) -> int:
    """Return the number of floating-point operations in matrix products to read `tokens[:-1]`.

    Args:
      reader: The reader, at any point of a stream; it reads on from there.
      chunk: Number of tokens per call.
      tokens: Token ids, [N + 1] int64.
    """
    return sum(count_parts(reader, chunk, tokens).values())


def count_parts(reader: Reader, chunk: int, tokens: Tensor) -> dict[str, int]:
    """Return the same number as `count_flops`, by part of the model, see PARTS."""
    formulas = {torch.ops.fwl.linear_attention_update: linear_attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    parts = dict.fromkeys(PARTS, 0)
    with _told_apart(reader.model, counter, parts), counter:
        _read_block(reader, chunk, tokens[None])
    # All else happens outside the model's own functions: the gradients of dynamic evaluation.
    parts[BACKWARD] = int(counter.get_total_flops()) - sum(parts.values())
    return {name: count for name, count in parts.items() if count}


def _read_block(reader: Reader, chunk: int, block: Tensor) -> None:
    inputs, labels = block[:, :-1], block[:, 1:]
    for start in range(0, inputs.shape[1], chunk):
        part = slice(start, start + chunk)
        reader.read(inputs[:, part], labels[:, part])


@contextmanager
def _told_apart(model: FWLModel, counter: FlopCounterMode, parts: dict[str, int]) -> Iterator[None]:
    """Context that adds the operations counted inside each of the model's functions to `parts`."""
    layer = model.fast_weights
    in_fast_pass, slow_rows = [False], [0]

    def ops() -> dict[str, int]:
        return {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}

    def plain(name: str) -> Callable[[dict[str, int], Any], None]:
        def add(done: dict[str, int], _: Any) -> None:
            parts[name] += sum(done.values())

        return add

    def logits(done: dict[str, int], result: Tensor) -> None:
        slow = count = sum(done.values())
        if in_fast_pass[0]:  # in a call of one token, these logits include the slow ones
            slow = 0 if slow_rows[0] else count // result.shape[1]
        slow_rows[0] = result.shape[1]
        parts[SLOW_LOGITS] += slow
        parts[FAST_LOGITS] += count - slow
        in_fast_pass[0] = False

    def fast(done: dict[str, int], _: Any) -> None:
        in_fast_pass[0] = True  # the next logits belong to this pass
        for op, count in done.items():
            of_sums = VECTORS if "bmm" in op else FAST
            parts[UPDATE if "linear_attention_update" in op else of_sums] += count

    watched: list[tuple[nn.Module, str, Callable[[dict[str, int], Any], None]]] = [
        (model.backbone, "stream", plain(BACKBONE)),
        (layer, "slow", plain(SLOW)),
        (layer, "logits", logits),
        (layer, "expected_embedding", plain(EXPECTED)),
        (layer, "gradients", plain(GRADIENT)),
        (layer, "fast", fast),
    ]
    try:
        for module, method, add in watched:
            vars(module)[method] = _watched(getattr(module, method), ops, add)
        yield
    finally:
        for module, method, _ in watched:
            vars(module).pop(method, None)


def _watched(
    function: Callable[..., Any],
    ops: Callable[[], dict[str, int]],
    add: Callable[[dict[str, int], Any], None],
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = ops()
        result = function(*args, **kwargs)
        add({op: count - before.get(op, 0) for op, count in ops().items()}, result)
        return result

    return run


def linear_attention_flops(
    query_shape: list[int],
    key_shape: list[int],
    value_shape: list[int],
    *_: Any,
    out_shape: Any = None,
) -> int:
    """Return the operations of `fwl::linear_attention_update`, which is opaque to the counter."""
    batch, length, key_size = query_shape
    value_size = value_shape[2]
    total = 0
    for start in range(0, length, torch_op._CHUNK):
        size = min(torch_op._CHUNK, length - start)
        # query x key, (query x key) x value; query x state and key x value
        total += 2 * size * (size * (key_size + value_size) + 2 * key_size * value_size)
    return batch * total


def count_shape(config: ModelConfig, chunk: int) -> dict[str, dict[str, float]]:
    """Count the operations of a model of any size, without weights.

    Args:
      config: The model's configuration.
      chunk: Number of tokens per call; two calls are counted.

    Returns:
      Operations per token by part, for "standard" inference and for "adapting".
    """
    with torch.device("meta"):
        model = FWLModel(config).eval().requires_grad_(False)
        tokens = torch.zeros(2 * chunk + 1, dtype=torch.int64)
    readers: dict[str, Reader] = {
        "standard": PlainReader(model, chunk),
        "adapting": AdaptingReader(model, max_tokens=chunk),
    }
    return {
        name: {part: n / (2 * chunk) for part, n in count_parts(reader, chunk, tokens).items()}
        for name, reader in readers.items()
    }


def peak_memory(start: Callable[[], Reader], chunk: int, tokens: Tensor) -> int:
    """Return the peak memory of reading in bytes: weights, state and intermediate results.

    Args:
      start: Returns a reader at the beginning of a stream.
      chunk: Number of tokens per call.
      tokens: Token ids, [N + 1] int64; enough of them for memory to reach its peak.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints that it started
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        reader = start()
        _read_block(reader, chunk, tokens[None])
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return reader.shared_bytes + int(max(totals))

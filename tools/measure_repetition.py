"""Measure what a bundle makes of single tokens repeated many times.

python -m tools.measure_repetition demo-bundle-fp16

The fast weights add up the gradients of a repeated token, so their sums grow further than on any
ordinary text, and half precision ends at 65504. Each token is read alone, from a fresh state, in
the bundle's runtime and in PyTorch in float32 with the checkpoint's weights. Prints a table and one
JSON line; the exit status is 1 if a logit is not finite.

Columns of the table:
  largest sum: largest absolute value that a query reads from the sums, in float32.
  difference: largest difference of a logit from float32.
  nats: largest difference of the log-probability of the repeated token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fwl_export.bundle.manifest import TOKENIZER_FILE, Bundle, read_bundle
from fwl_export.bundle.state import Array
from fwl_export.bundle.tokenizer import load_tokenizer
from fwl_export.model.numerics import UpdateOp
from fwl_export.runtimes.base import Call, Runner
from fwl_export.runtimes.registry import RUNTIMES, Options, load
from fwl_export.runtimes.torch import TorchRunner, load_model

# Texts that repeat in what people read: blank lines, indents, rules, tables, numbers.
_TEXTS = ("\n", "\n\n", " ", "  ", "    ", "\t", "-", "--", "=", "*", "#", ".", ",", "|", "_")
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Repetition:
    """What a bundle made of one token, repeated.

    Attributes:
      token: Id of the token.
      not_finite: Number of tokens read when the first logit was not finite, or None.
      largest_sum: Largest absolute value that a query read from the sums, in float32.
      difference: Largest difference of a logit from float32, over the finite logits.
      nats: Largest difference of the log-probability of the token.
    """

    token: int
    not_finite: int | None
    largest_sum: float
    difference: float
    nats: float


def measure(
    bundle: Bundle, tokens: Sequence[int], repeats: int, runtime: str, rows: int
) -> Iterator[Repetition]:
    """Read each token repeatedly, in a runtime and in PyTorch in float32.

    Args:
      bundle: Bundle with a checkpoint.
      tokens: Ids of the tokens to read.
      repeats: How many times to read each.
      runtime: Name of the runtime, e.g. "onnxruntime".
      rows: Tokens that are read at the same time, as rows of a batch.
    """
    under_test = load(runtime, bundle, Options()).runner
    reference = load_model(bundle, "fp32")
    largest: list[Array] = []
    reference._update = _recording(reference._update, largest)
    for start in range(0, len(tokens), rows):
        ids = np.array(tokens[start : start + rows])
        yield from _repeat(bundle, under_test, TorchRunner(reference), largest, ids, repeats)


def _recording(update: UpdateOp, largest: list[Array]) -> UpdateOp:
    """Return an update that adds the largest output of each row to a list."""

    def record(
        query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        output, present_state = update(query, key, value, decay, past_state)
        largest.append(output.abs().amax((1, 2)).numpy())
        return output, present_state

    return record


def _repeat(
    bundle: Bundle,
    under_test: Runner,
    reference: Runner,
    largest: list[Array],
    ids: Array,
    repeats: int,
) -> list[Repetition]:
    """Read a batch in which each row repeats one token; see `measure`."""
    largest.clear()
    rows = len(ids)
    first = np.full(rows, -1)
    difference, nats = np.zeros(rows), np.zeros(rows)
    columns = ids[:, None, None]
    read = 0
    streams = (_logits(each, bundle, ids, repeats) for each in (under_test, reference))
    for found, expected in zip(*streams, strict=True):
        finite = np.isfinite(found).all(-1)
        broken = (first < 0) & ~finite.all(1)
        first[broken] = read + 1 + finite.argmin(1)[broken]
        read += found.shape[1]
        shown = np.where(finite[..., None], found, expected)
        difference = np.maximum(difference, np.abs(shown - expected).max((1, 2)))
        shift = np.take_along_axis(_log_softmax(shown) - _log_softmax(expected), columns, 2)
        nats = np.maximum(nats, np.abs(shift).max((1, 2)))
    sums = np.max(largest, 0)
    return [
        Repetition(int(i), int(f) if f >= 0 else None, float(s), float(d), float(n))
        for i, f, s, d, n in zip(ids, first, sums, difference, nats, strict=True)
    ]


def _logits(runner: Runner, bundle: Bundle, ids: Array, repeats: int) -> Iterator[Array]:
    """Yield the logits [B, T, V] of one call after the other."""
    interval = bundle.manifest.config.fast_weights.anchor_interval or repeats
    past, present = runner.new_buffers(len(ids)), runner.new_buffers(len(ids))
    read = 0
    while read < repeats:
        size = min(bundle.manifest.max_tokens, repeats - read, interval - read % interval)
        yield runner.run(_call(ids, size), past, present).astype(np.float32)
        past, present = present, past
        read += size


def _call(ids: Array, size: int) -> Call:
    rows = len(ids)
    return Call(
        np.repeat(ids[:, None], size, 1).astype(np.int64),
        np.ones((rows, size), np.float32),
        np.full(rows, size, np.int64),
        np.tile(np.arange(size), (rows, 1)),
        np.ones(rows, np.float32),
    )


def _log_softmax(logits: Array) -> Array:
    result: Array = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    return result


def choose_tokens(tokenizer: Tokenizer | None, vocab_size: int, count: int) -> list[int]:
    """Return ids of tokens that repeat in texts, of the most and least frequent, and of others.

    Args:
      tokenizer: Tokenizer of the model, or None.
      vocab_size: Number of token ids.
      count: Number of ids to return.
    """
    chosen: list[int] = []
    if tokenizer is not None:
        texts = [*_TEXTS, *_DIGITS[:3]]
        encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        chosen += [ids[0] for ids in encoded if len(ids) == 1]
    # Merges are numbered in the order of their frequency.
    chosen += [*range(3), *range(256, 260), *range(vocab_size - 4, vocab_size)]
    rng = np.random.default_rng(0)
    chosen += rng.permutation(vocab_size).tolist()
    return [i for i in dict.fromkeys(chosen) if 0 <= i < vocab_size][:count]


def table(results: Sequence[Repetition], tokenizer: Tokenizer | None) -> str:
    """Return the measurements as a table for people."""
    titles = f"{'token':>7}  {'text':14} {'finite':>10} {'largest sum':>12} {'difference':>11} nats"
    lines = [titles]
    for each in results:
        text = repr(tokenizer.decode([each.token], skip_special_tokens=False)) if tokenizer else ""
        finite = "yes" if each.not_finite is None else f"until {each.not_finite - 1}"
        lines.append(
            f"{each.token:>7}  {text:14} {finite:>10} {each.largest_sum:>12.5g} "
            f"{each.difference:>11.3g} {each.nats:.3g}"
        )
    bad = sum(each.not_finite is not None for each in results)
    lines.append(f"{bad} of {len(results)} not finite")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="bundle with a checkpoint, in any precision")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="how many tokens")
    parser.add_argument("--repeats", type=int, default=256, metavar="N", help="times to read each")
    parser.add_argument("--rows", type=int, default=8, metavar="B", help="tokens read at a time")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime", help="what runs it")
    options = parser.parse_args(arguments)
    bundle = read_bundle(options.bundle)
    path = options.bundle / TOKENIZER_FILE
    tokenizer = load_tokenizer(path) if path.is_file() else None
    ids = choose_tokens(tokenizer, bundle.manifest.config.vocab_size, options.tokens)
    results = list(measure(bundle, ids, options.repeats, options.runtime, options.rows))
    print(table(results, tokenizer))
    facts: dict[str, Any] = {
        "precision": bundle.manifest.precision,
        "runtime": options.runtime,
        "repeats": options.repeats,
        "tokens": [asdict(each) for each in results],
    }
    print(json.dumps(facts))
    return int(any(each.not_finite is not None for each in results))


if __name__ == "__main__":
    sys.exit(main())

"""The paper's comparison: standard inference, dynamic evaluation, fast weights off and on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwl_export.adaptation.analysis import (
    FREQUENCIES,
    REPETITIONS,
    Class,
    frequency_classes,
    gains_by_class,
    repetition_classes,
)
from fwl_export.adaptation.cost import (
    Reading,
    count_parts,
    peak_memory,
    read_interleaved,
    time_ratio,
)
from fwl_export.adaptation.readers import (
    CHUNK,
    AdaptingReader,
    DynamicReader,
    Losses,
    PlainReader,
    Reader,
    gradient_rms,
    perplexity,
)
from fwl_export.adaptation.tuning import choose, stream_perplexity
from fwl_export.bundle.tokenizer import read_ids
from fwl_export.errors import CheckpointError, TokenError
from fwl_export.json_files import without_non_finite
from fwl_export.machine import processor_name
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.model.language_model import FWLModel

STANDARD, OFF, ON, SGD, RMS = "standard", "off", "adapting", "sgd", "rms"

SEGMENTS = (128, 32, 16)
# The learning rate at which each rule's grid begins.
FIRST_RATES = {SGD: 0.1, RMS: 5e-4}
# Values of Krause's lambda to try, at the segment and the rate that are best without it.
DECAYS = (1e-3, 1e-2)

# The first blocks are not timed, because they also fill caches and allocators.
WARM_UP = 1
LEAST_BLOCKS = 4
DECODE_TOKENS, DECODE_BLOCK = 256, 32

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show no progress; `fwl_export.cli.terminal.progress_bar` shows some."""
    yield lambda tokens: None


@dataclass(frozen=True)
class ComparisonPlan:
    """How much to measure.

    Attributes:
      segments: Segment lengths to try for dynamic evaluation, in tokens; divisors of 256.
      tuning_tokens: Largest number of tokens to use of the validation text. The first half gives
        the statistics of the RMS rule; settings are tuned on the second half.
      max_tokens: Largest number of tokens to read of all texts together; 0 means all.
    """

    segments: tuple[int, ...] = SEGMENTS
    tuning_tokens: int = 6000
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.segments or any(s < 1 or CHUNK % s for s in self.segments):
            raise TokenError(
                f"segments are {list(self.segments)}; expected divisors of {CHUNK}, "
                "such as 128, 32 and 16"
            )


@dataclass(frozen=True)
class Texts:
    """The texts to read.

    Attributes:
      names: Names of the texts, in the order in which they are read.
      starts: Position of each text's first token.
      stream: Token ids of all texts as one stream, [N] int64.
      validation: Token ids of the text that dynamic evaluation is tuned on, [M] int64; not part of
        the stream.
      validation_name: What the validation text is.
    """

    names: list[str]
    starts: list[int]
    stream: Tensor
    validation: Tensor
    validation_name: str


def read_texts(
    checkpoint: Checkpoint, files: Sequence[Path], validation: Path | None, plan: ComparisonPlan
) -> Texts:
    """Read the texts as one stream, and the validation text.

    Args:
      checkpoint: The checkpoint whose tokenizer to use.
      files: The texts, UTF-8 files.
      validation: The validation text. None uses the beginning of the stream, and removes it there.
      plan: How much to read.

    Raises:
      TokenError: A file is not text, or there are too few tokens.
    """
    # Of the validation text at the beginning, a fifth of the rest would do.
    needed = plan.max_tokens and plan.max_tokens + 5 * plan.tuning_tokens
    parts = _parts(checkpoint, files, needed)
    names = [path.name for path in files]
    stream = torch.cat(parts)
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    if validation is not None:
        ids = read_ids(validation, checkpoint.tokenizer, most=plan.tuning_tokens)
        held_out, name = torch.from_numpy(ids), validation.name
    else:
        size = min(plan.tuning_tokens, len(stream) // 5)
        held_out, stream = stream[:size], stream[size:]
        starts = [max(start - size, 0) for start in starts]
        name = f"the first {size} tokens, which are left out of the results"
    stream = stream[: plan.max_tokens or len(stream)]
    least = LEAST_BLOCKS * CHUNK + 1
    if len(stream) < least:
        raise TokenError(
            f"the texts leave {len(stream)} tokens to read; expected {least} or more: give more "
            "text, or a larger --max-tokens"
        )
    least = 4 * max(plan.segments)
    if len(held_out) <= least:
        raise TokenError(
            f"the validation text leaves {len(held_out)} tokens to tune on; expected more than "
            f"{least}: give more text, a longer one with --validation, or a larger --tuning-tokens"
        )
    last = sum(start < len(stream) for start in starts)
    return Texts(names[:last], starts[:last], stream, held_out, name)


def _parts(checkpoint: Checkpoint, files: Sequence[Path], needed: int) -> list[Tensor]:
    """Return the token ids of texts that follow one another, each [N] int64.

    Args:
      checkpoint: The checkpoint whose tokenizer to use.
      files: The texts.
      needed: Tokens that are needed in all; 0 means all.
    """
    parts: list[Tensor] = []
    for path in files:
        most = needed and max(needed - sum(map(len, parts)), 2)
        ids = read_ids(path, checkpoint.tokenizer, start=not parts, most=most)
        parts.append(torch.from_numpy(ids))
    return parts


def check_pair(first: Checkpoint, second: Checkpoint) -> None:
    """Check that the perplexities of two checkpoints can be compared.

    Raises:
      CheckpointError: Their vocabularies or tokenizers differ.
    """
    sizes = first.config.vocab_size, second.config.vocab_size
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the two checkpoints have vocabularies of {sizes[0]} and {sizes[1]} entries, so their "
            "perplexities cannot be compared; give a plain checkpoint with the same tokenizer"
        )
    if first.tokenizer.to_str() != second.tokenizer.to_str():
        raise CheckpointError(
            "the two checkpoints have different tokenizers, so their perplexities cannot be "
            "compared; give a plain checkpoint with the same tokenizer"
        )


@dataclass(frozen=True)
class Method:
    """The measurements of one way of reading. Ratios are relative to standard inference.

    Attributes:
      name: Name for tables and plots.
      tokens_per_call: Number of tokens per call; for dynamic evaluation, its segment.
      losses: Loss of each token but the first in nats, [N - 1].
      perplexity: Perplexity of all these tokens.
      milliseconds_per_token: Time per token, the median over blocks.
      time_ratio: Ratio of times over paired blocks: lower quartile, median, upper quartile.
      decode_ratio: Median ratio of times in calls of one token; None for dynamic evaluation.
      flops_by_part: Floating-point operations of matrix products per token, see `cost.PARTS`.
      flops_ratio: Ratio of the sums of these operations.
      peak_bytes: Peak memory of weights, state and intermediate results.
      memory_ratio: Ratio of peak memory.
    """

    name: str
    tokens_per_call: int
    losses: Losses = field(repr=False)
    perplexity: float
    milliseconds_per_token: float
    time_ratio: tuple[float, float, float]
    decode_ratio: float | None
    flops_by_part: dict[str, float]
    flops_ratio: float
    peak_bytes: int
    memory_ratio: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
      methods: The ways of reading in the order of the table, by key; the first is "standard".
      texts: The texts that were read.
      tuning: The chosen setting and all trials, by rule of dynamic evaluation.
      frequency: Gains over standard inference by the frequency of tokens.
      repetition: Gains over standard inference by what was read before.
      blocks: Number of timed blocks, and tokens per block.
      machine: Description of the machine, see `machine`.
    """

    methods: dict[str, Method]
    texts: Texts
    tuning: dict[str, dict[str, Any]]
    frequency: list[Class]
    repetition: list[Class]
    blocks: tuple[int, int]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: everything except the losses of single tokens."""
        methods = {}
        for key, method in self.methods.items():
            methods[key] = {n: v for n, v in vars(method).items() if n != "losses"}
        return without_non_finite(
            {
                "texts": dict(zip(self.texts.names, self.texts.starts, strict=True)),
                "tokens": len(self.texts.stream),
                "validation": self.texts.validation_name,
                "validation_tokens": len(self.texts.validation),
                "methods": methods,
                "tuning": self.tuning,
                "gain_by_frequency": [asdict(part) for part in self.frequency],
                "gain_by_repetition": [asdict(part) for part in self.repetition],
                "timed_blocks": {"count": self.blocks[0], "tokens": self.blocks[1]},
                "machine": self.machine,
            }
        )


@dataclass(frozen=True)
class _Way:
    """A way of reading: its name, a function that starts a stream, and its tokens per call."""

    name: str
    start: Callable[[], Reader]
    chunk: int


def compare(
    fwl: FWLModel,
    plain: FWLModel | None,
    texts: Texts,
    plan: ComparisonPlan,
    progress: Progress = no_progress,
) -> Comparison:
    """Read a stream in all ways, interleaved, and measure what each gains and costs.

    Args:
      fwl: The model that learns while it reads.
      plain: The model for standard inference and dynamic evaluation; None uses `fwl` with
        adaptation off.
      texts: The texts to read.
      plan: How much to measure.
      progress: Shows progress; called with a title and a total number of tokens.
    """
    backbone = plain or fwl
    off = "plain checkpoint" if plain else "adaptation off"
    ways = {STANDARD: _Way(f"standard inference, {off}", lambda: PlainReader(backbone), CHUNK)}
    if plain is not None:
        ways[OFF] = _Way("FWL, adaptation off", lambda: PlainReader(fwl), CHUNK)
    ways[ON] = _Way("FWL, adapting", lambda: AdaptingReader(fwl), CHUNK)
    tuning = {}
    for rule in (SGD, RMS):
        tuning[rule] = tune(backbone, texts.validation, rule, plan, progress)
        ways[rule] = _dynamic_way(backbone, texts.validation, tuning[rule], rule)
    readers = {key: (way.start(), way.chunk) for key, way in ways.items()}
    total = len(readers) * (len(texts.stream) - 1)
    with progress("reading in all ways", total) as advance:
        readings = read_interleaved(readers, texts.stream, CHUNK, advance)
    with progress("reading token by token", 2 * DECODE_TOKENS) as advance:
        decode = _decode({k: ways[k] for k in (STANDARD, ON)}, texts.stream, advance)
    methods = _methods(ways, readings, decode, texts.stream)
    losses = {key: method.losses for key, method in methods.items()}
    standard = losses.pop(STANDARD)
    labels, tokens = texts.stream[1:].numpy(), texts.stream.numpy()
    seen = frequency_classes(labels, texts.validation.numpy(), fwl.config.vocab_size)
    return Comparison(
        methods,
        texts,
        tuning,
        gains_by_class(FREQUENCIES, seen, standard, losses),
        gains_by_class(REPETITIONS, repetition_classes(tokens), standard, losses),
        (len(readings[STANDARD].seconds) - WARM_UP, CHUNK),
        machine(),
    )


def tune(
    model: FWLModel, text: Tensor, rule: str, plan: ComparisonPlan, progress: Progress
) -> dict[str, Any]:
    """Choose segment, learning rate and decay of a rule on the second half of a validation text.

    The statistics of the RMS rule come from the first half. If they came from the tuned text, every
    weight with a gradient there would have some, and the chosen rate would be too large.

    Args:
      model: The model, which is not changed.
      text: Token ids of the validation text, [M] int64.
      rule: The rule of dynamic evaluation, SGD or RMS.
      plan: How much to measure.
      progress: Shows progress; called with a title and a total number of tokens.

    Returns:
      The chosen setting and all trials, JSON-ready.
    """
    trials: dict[tuple[int, float, float], float] = {}
    statistics: dict[int, dict[str, Tensor]] = {}
    first, text = _halves(text)

    def trial(segment: int, rate: float, decay: float = 0.0) -> float:
        setting = segment, rate, decay
        if setting not in trials:
            if rule == RMS and segment not in statistics:
                statistics[segment] = gradient_rms(model, first, segment)
            reader = DynamicReader(model, segment, rate, decay, statistics.get(segment))
            title = f"tuning {rule}: segment {segment}, rate {rate:g}, decay {decay:g}"
            with progress(title, len(text) - 1) as advance:
                trials[setting] = stream_perplexity(reader, text, segment, advance)
        return trials[setting]

    chosen = choose(trial, trial, plan.segments, FIRST_RATES[rule])
    segment, rate = chosen.segment, chosen.learning_rate
    decay = min((0.0, *DECAYS), key=partial(trial, segment, rate))
    return {
        "segment": segment,
        "learning_rate": rate,
        "decay": decay,
        "learning_rate_is_interior": chosen.interior,
        "segment_is_smallest_tried": segment == min(plan.segments),
        "trials": [
            dict(zip(("segment", "learning_rate", "decay", "perplexity"), (*k, v), strict=True))
            for k, v in trials.items()
        ],
    }


def _halves(text: Tensor) -> tuple[Tensor, Tensor]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def _dynamic_way(model: FWLModel, text: Tensor, tuned: dict[str, Any], rule: str) -> _Way:
    segment, rate, decay = (tuned[name] for name in ("segment", "learning_rate", "decay"))
    rms = gradient_rms(model, _halves(text)[0], segment) if rule == RMS else None
    name = f"dynamic evaluation, {rule.upper()}, every {segment}"
    return _Way(name, lambda: DynamicReader(model, segment, rate, decay, rms), segment)


def _decode(
    ways: dict[str, _Way], stream: Tensor, advance: Callable[[int], None]
) -> dict[str, float]:
    """Return median times in calls of one token, relative to standard inference, by key."""
    readers = {key: (way.start(), 1) for key, way in ways.items()}
    tokens = stream[: DECODE_TOKENS + 1]
    readings = read_interleaved(readers, tokens, DECODE_BLOCK, advance)
    times = {key: reading.seconds[WARM_UP:] for key, reading in readings.items()}
    return {key: time_ratio(seconds, times[STANDARD])[1] for key, seconds in times.items()}


def _methods(
    ways: dict[str, _Way],
    readings: dict[str, Reading],
    decode: dict[str, float],
    stream: Tensor,
) -> dict[str, Method]:
    times = {key: reading.seconds[WARM_UP:] for key, reading in readings.items()}
    some = stream[: 2 * CHUNK + 1]
    flops, peaks = {}, {}
    for key, way in ways.items():
        parts = count_parts(way.start(), way.chunk, some)
        flops[key] = {part: count / (2 * CHUNK) for part, count in parts.items()}
        peaks[key] = peak_memory(way.start, way.chunk, some)
    total = {key: sum(parts.values()) for key, parts in flops.items()}
    return {
        key: Method(
            way.name,
            way.chunk,
            readings[key].losses,
            perplexity(readings[key].losses),
            sorted(times[key])[len(times[key]) // 2] / CHUNK * 1e3,
            time_ratio(times[key], times[STANDARD]),
            decode.get(key),
            flops[key],
            total[key] / total[STANDARD],
            peaks[key],
            peaks[key] / peaks[STANDARD],
        )
        for key, way in ways.items()
    }


def machine() -> dict[str, Any]:
    """Return a JSON-ready description of this machine: processor, load, threads, versions."""
    return {
        "cpu": processor_name() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

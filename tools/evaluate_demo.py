"""Measure what adapting while reading is worth, on held-out plays read as one long stream.

Compares two checkpoints of the same size: `plain`, trained on the slow logits, and `fwl`, the same
network trained while adapting. The rows:

    a   plain, standard inference
    b   fwl with adaptation off: its slow weights
    c   fwl adapting, gradients at the weights as they were at the last anchor, never reset
    c0  fwl adapting as it was trained: gradients at the slow weights, learned decay
    c'  the weights of c0 in the paper's form (sums only grow), at the best reset interval
    d   plain with dynamic evaluation: an SGD step on all weights after each segment

Reset interval, segment, learning rate, and the factors of (c) on step sizes and horizon are chosen
on the validation play. Perplexity is per BPE token, over all tokens of the test stream except the
first. Time and operations are relative to (a) on the same blocks of text, timed on one thread, so
nothing else should run on the machine. The model of (c) is written to OUT/checkpoint.

    python tools/evaluate_demo.py --plain runs/plain --fwl runs/fwl --data runs/data -o runs/eval

An interrupted run resumes where it stopped; finished parts are kept in OUT/partial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from fwl_export.adaptation import (
    CHUNK,
    AdaptingReader,
    DynamicReader,
    Losses,
    PlainReader,
    Reader,
    choose,
    count_flops,
    iterate_losses,
    machine,
    minimize_on_grid,
    perplexity,
    read_interleaved,
    stream_perplexity,
    time_ratio,
)
from fwl_export.errors import CheckpointError, FwlError, OutputExistsError
from fwl_export.json_files import without_non_finite
from fwl_export.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fwl_export.model.language_model import FWLModel
from tools import demo_data
from tools.evaluation_report import growth, mean_difference, plot_perplexity, results_markdown
from tools.stream_readers import anchored, paper_form

ROWS = ("a", "b", "c", "c0", "c'", "d")


@dataclass(frozen=True)
class EvaluationPlan:
    """How much to measure.

    Attributes:
      play_tokens: Tokens read from each test play; None means all.
      validation_tokens: Tokens read from the validation text; None means all.
      tuning_tokens: Tokens of the validation text on which the segment of (d) is chosen.
      segments: Segments to try for (d), in tokens.
      reset_intervals: Intervals to try for (c'), in tokens; None means never.
      anchor_interval: Tokens between anchors of (c).
      bin_tokens: Tokens per point of the curves.
      timing_blocks: Number of timed blocks of 256 tokens; decode takes half as many, of 32 tokens.
    """

    play_tokens: int | None = None
    validation_tokens: int | None = None
    tuning_tokens: int = 15_000
    segments: tuple[int, ...] = (128, 64, 32, 16)
    reset_intervals: tuple[int | None, ...] = (256, 512, 1024, 2048, 4096, None)
    anchor_interval: int = CHUNK
    bin_tokens: int = 4000
    timing_blocks: int = 32


QUICK = EvaluationPlan(2000, 1500, 600, (128, 64), (256, None), CHUNK, 500, 4)

# Pairs of rows whose losses are compared token by token.
ROW_PAIRS = (("b", "a"), ("c", "a"), ("c0", "a"), ("c'", "a"), ("d", "a"), ("c", "c0"), ("c", "d"))

# First guess of the learning rate of (d).
FIRST_LEARNING_RATE = 0.3
# First guesses of (c)'s factors on step sizes and horizon, and the ratios of their grids.
FIRST_STEP_FACTOR, STEP_RATIO = 0.35, 2**0.5
FIRST_HORIZON_FACTOR, HORIZON_RATIO = 64.0, 4.0
DECODE_BLOCK = 32
WARM_UP = 2


@dataclass
class Workspace:
    """Keeps finished parts in a folder and shows progress.

    Attributes:
      folder: Folder of the finished parts.
      settings: Everything the parts depend on; a folder made with other settings is refused.
      console: Console that shows the progress.
    """

    folder: Path
    settings: dict[str, Any]
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.part("settings", lambda: self.settings) != json.loads(json.dumps(self.settings)):
            raise OutputExistsError(
                f"'{self.folder}' holds parts of an evaluation of other checkpoints, text or "
                "settings; remove it, or choose another output folder"
            )

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON part of that name; compute it if it is missing."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return json.loads(path.read_text())

    def losses(self, name: str, title: str, reader: Reader, tokens: Tensor, chunk: int) -> Losses:
        """Return the losses of a stream, [N - 1] nats; read the stream if they are missing."""
        path = self.folder / f"losses-{name}.npy"
        if not path.exists():
            with self.watched(title, len(tokens) - 1) as advance:
                losses = _collect(iterate_losses(reader, tokens, chunk), advance)
            beside = path.with_suffix(".unfinished.npy")
            np.save(beside, losses)
            beside.replace(path)
        found: Losses = np.load(path)
        self.console.print(f"{title}: perplexity {perplexity(found):.2f}")
        return found

    @contextmanager
    def watched(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar while something reads `total` tokens; yield the function that advances it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # In a log file, the line printed after each pass is enough.
        silent = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=silent) as progress:
            task = progress.add_task(title, total=total)
            yield lambda tokens: progress.advance(task, tokens)


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all; numbers that are not finite become null."""
    beside = path.with_suffix(".unfinished")
    beside.write_text(json.dumps(without_non_finite(value), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _collect(chunks: Iterable[Losses], advance: Callable[[int], None]) -> Losses:
    parts = []
    for losses in chunks:
        parts.append(losses)
        advance(len(losses))
    return np.concatenate(parts)


def evaluate(
    plain: FWLModel,
    fwl: FWLModel,
    plays: Mapping[str, Tensor],
    validation: Tensor,
    plan: EvaluationPlan,
    work: Workspace,
) -> dict[str, Any]:
    """Measure all rows.

    Args:
      plain: Model trained on the slow logits.
      fwl: Model trained while adapting.
      plays: Test plays by name in reading order, each [N] int64 token ids.
      validation: [N] int64 token ids of the text on which (c), (c') and (d) are tuned.
      plan: How much to measure.
      work: Workspace that keeps finished parts.

    Returns:
      Results, which `write_json` can write.
    """
    stream = torch.cat(list(plays.values()))
    anchor = work.part("anchor-tuning", lambda: tune_anchor(fwl, validation, plan, work))
    read = anchored(fwl, plan.anchor_interval, anchor["step_factor"], anchor["horizon_factor"])
    losses = {
        "a": work.losses("a", "(a) plain", PlainReader(plain), stream, CHUNK),
        "b": work.losses("b", "(b) adaptation off", PlainReader(fwl), stream, CHUNK),
        "c": work.losses("c", "(c) adapting", AdaptingReader(read), stream, CHUNK),
        "c0": work.losses("c0", "(c0) adapting, no anchor", AdaptingReader(fwl), stream, CHUNK),
    }
    resets = work.part("reset-tuning", lambda: tune_reset(fwl, validation, plan, work))
    reset_every = resets["chosen"]
    pure = AdaptingReader(paper_form(fwl), reset_every)
    losses["c'"] = work.losses("c-paper", "(c') paper's form", pure, stream, CHUNK)
    dynamic = work.part("dynamic-tuning", lambda: tune_dynamic(plain, validation, plan, work))
    segment, rate = dynamic["segment"], dynamic["learning_rate"]
    reader = DynamicReader(plain, segment, rate)
    losses["d"] = work.losses("d", "(d) dynamic evaluation", reader, stream, segment)
    readers: dict[str, Callable[[], Reader]] = {
        "a": lambda: PlainReader(plain),
        "b": lambda: PlainReader(fwl),
        "c": lambda: AdaptingReader(read),
        "c0": lambda: AdaptingReader(fwl),
        "d": lambda: DynamicReader(plain, segment, rate),
    }
    cost = work.part("cost", lambda: measure_cost(readers, stream, segment, plan, work))
    return {
        "tokens": {
            "test": {name: len(play) for name, play in plays.items()},
            "predicted": len(stream) - 1,
            "validation": len(validation),
        },
        "rows": {row: _row(losses[row], plays) for row in ROWS},
        "tuning": {"anchor": anchor, "reset": resets, "dynamic": dynamic},
        "cost": cost,
        "position": _over_position(losses, plan.bin_tokens),
    }


def _row(losses: Losses, plays: Mapping[str, Tensor]) -> dict[str, Any]:
    per_play = {}
    end = -1  # the first token has no prediction
    for name, play in plays.items():
        start, end = max(end, 0), end + len(play)
        per_play[name] = perplexity(losses[start:end])
    return {"perplexity": perplexity(losses), "plays": per_play}


def _over_position(losses: Mapping[str, Losses], size: int) -> dict[str, Any]:
    """Return the curves, and whether (c) loses ground against (a) along the stream."""
    bins = {row: _bin_means(row_losses, size) for row, row_losses in losses.items()}
    return {
        "bin_tokens": size,
        "mean_loss": {row: means.tolist() for row, means in bins.items()},
        "growth_c_against_a": growth(losses["c"] - losses["a"], size),
        "log_perplexity_difference": {
            f"{row} - {other}": mean_difference(bins[row] - bins[other]) for row, other in ROW_PAIRS
        },
    }


def _bin_means(losses: Losses, size: int) -> npt.NDArray[np.float64]:
    whole = len(losses) // size * size
    means: npt.NDArray[np.float64] = losses[:whole].astype(np.float64).reshape(-1, size).mean(1)
    return means


def tune_anchor(
    model: FWLModel, text: Tensor, plan: EvaluationPlan, work: Workspace
) -> dict[str, Any]:
    """Choose the factors of (c) on the validation text: step sizes, horizon, step sizes again."""
    trials: list[dict[str, Any]] = []

    def trial(step_factor: float, horizon_factor: float) -> float:
        name = f"anchor {plan.anchor_interval}, steps x {step_factor:g}, H x {horizon_factor:g}"
        reader = AdaptingReader(anchored(model, plan.anchor_interval, step_factor, horizon_factor))
        part = f"validation-anchor-{plan.anchor_interval}-{step_factor:g}-{horizon_factor:g}"
        losses = work.losses(part, name, reader, text, CHUNK)
        found = {
            "step_factor": step_factor,
            "horizon_factor": horizon_factor,
            "perplexity": perplexity(losses),
        }
        if found not in trials:
            trials.append(found)
        return perplexity(losses)

    step, horizon = FIRST_STEP_FACTOR, FIRST_HORIZON_FACTOR
    step, _ = minimize_on_grid(lambda s: trial(s, horizon), step, STEP_RATIO)
    horizon, _ = minimize_on_grid(lambda h: trial(step, h), horizon, HORIZON_RATIO)
    step, interior = minimize_on_grid(lambda s: trial(s, horizon), step, STEP_RATIO)
    return {
        "tokens": len(text),
        "interval": plan.anchor_interval,
        "step_factor": step,
        "horizon_factor": horizon,
        "step_factor_is_interior": interior,
        "trials": trials,
    }


def tune_reset(
    model: FWLModel, text: Tensor, plan: EvaluationPlan, work: Workspace
) -> dict[str, Any]:
    """Choose the reset interval of the paper's form on the validation text."""
    pure = paper_form(model)
    trials: list[dict[str, Any]] = []
    for every in plan.reset_intervals:
        name = f"reset {every or 'never'}"
        reader = AdaptingReader(pure, every)
        losses = work.losses(f"validation-{name.replace(' ', '-')}", name, reader, text, CHUNK)
        trials.append({"reset_every": every, "perplexity": perplexity(losses)})
    chosen = min(trials, key=lambda trial: trial["perplexity"])["reset_every"]
    return {"tokens": len(text), "chosen": chosen, "trials": trials}


def tune_dynamic(
    model: FWLModel, text: Tensor, plan: EvaluationPlan, work: Workspace
) -> dict[str, Any]:
    """Choose segment and learning rate of dynamic evaluation on the validation text.

    First finds, for every segment, the best learning rate of a coarse grid on the beginning of the
    text; then, for the best segment, the best of a finer grid on the whole text.
    """
    trials: list[dict[str, Any]] = []

    def trial(segment: int, tokens: Tensor, rate: float) -> float:
        name = f"dynamic-{segment}-{rate:g}-{len(tokens)}"
        result = work.part(name, lambda: _dynamic_trial(model, segment, rate, tokens, work))
        trials.append(result)
        return _or_infinity(result["perplexity"])

    beginning = text[: plan.tuning_tokens]
    chosen = choose(
        lambda segment, rate: trial(segment, beginning, rate),
        lambda segment, rate: trial(segment, text, rate),
        plan.segments,
        FIRST_LEARNING_RATE,
    )
    return {
        "segment": chosen.segment,
        "learning_rate": chosen.learning_rate,
        "learning_rate_is_interior": chosen.interior,
        "segment_is_smallest_tried": chosen.segment == min(plan.segments),
        "trials": trials,
    }


def _dynamic_trial(
    model: FWLModel, segment: int, rate: float, tokens: Tensor, work: Workspace
) -> dict[str, Any]:
    """Return the perplexity of one setting; a run that diverges is stopped early."""
    title = f"segment {segment}, learning rate {rate:g}"
    reader = DynamicReader(model, segment, rate)
    with work.watched(title, len(tokens) - 1) as advance:
        found = stream_perplexity(reader, tokens, segment, advance)
    work.console.print(f"{title}, {len(tokens)} tokens: perplexity {found:.2f}")
    return {
        "segment": segment,
        "learning_rate": rate,
        "tokens": len(tokens),
        "perplexity": found,
    }


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def measure_cost(
    readers: Mapping[str, Callable[[], Reader]],
    stream: Tensor,
    segment: int,
    plan: EvaluationPlan,
    work: Workspace,
) -> dict[str, Any]:
    """Measure the time and count the operations of the rows on the same blocks of text.

    Args:
      readers: Functions that start reading a stream, by row.
      stream: [N] int64 token ids.
      segment: Tokens per call of (d).
      plan: How much to measure.
      work: Workspace that shows progress.
    """
    work.console.print(f"cost: timing on one thread, blocks of ({') ('.join(readers)}) in turn")
    block = math.lcm(CHUNK, segment)
    chunked = {row: (start(), segment if row == "d" else CHUNK) for row, start in readers.items()}
    decode = {row: (readers[row](), 1) for row in ("a", "c", "c0")}
    decode_blocks = max(2, plan.timing_blocks // 2)
    return {
        "load_average_before": os.getloadavg()[0],
        "chunk": _paired_cost(chunked, stream, block, plan.timing_blocks),
        "decode": _paired_cost(decode, stream, DECODE_BLOCK, decode_blocks),
    }


def _paired_cost(
    readers: Mapping[str, tuple[Reader, int]], stream: Tensor, block: int, blocks: int
) -> dict[str, Any]:
    """Return each reader's cost relative to "a": the median over blocks of the ratio per block."""
    tokens = stream[: (WARM_UP + blocks) * block + 1]
    read = read_interleaved(readers, tokens, block)
    seconds = {name: reading.seconds[WARM_UP:] for name, reading in read.items()}
    flops = {
        name: count_flops(reader, chunk, tokens[: block + 1])
        for name, (reader, chunk) in readers.items()
    }
    rows = {}
    for name, (_, chunk) in readers.items():
        low, middle, high = time_ratio(seconds[name], seconds["a"])
        rows[name] = {
            "tokens_per_call": chunk,
            "milliseconds_per_token": float(np.median(seconds[name])) / block * 1e3,
            "time_ratio": middle,
            "time_ratio_quartiles": [low, high],
            "flops_per_token": flops[name] / block,
            "flops_ratio": flops[name] / flops["a"],
        }
    return {"block_tokens": block, "blocks": len(seconds["a"]), "rows": rows}


def load_pair(plain: Path, fwl: Path) -> tuple[Checkpoint, Checkpoint]:
    """Load both checkpoints and check that they can be compared.

    Args:
      plain: Folder of the checkpoint trained on the slow logits.
      fwl: Folder of the checkpoint trained while adapting.

    Raises:
      CheckpointError: A folder is unusable, or the two differ in size or in tokenizer.
    """
    first, second = load_checkpoint(plain), load_checkpoint(fwl)
    sizes = [sum(p.numel() for p in c.model.backbone.parameters()) for c in (first, second)]
    layers = [
        (c.config.vocab_size, c.config.fast_weights.hidden_size, c.config.fast_weights.output_size)
        for c in (first, second)
    ]
    if sizes[0] != sizes[1] or layers[0] != layers[1]:
        raise CheckpointError(
            f"'{plain}' and '{fwl}' are networks of different sizes: backbones of {sizes[0]} and "
            f"{sizes[1]} parameters, vocabulary and layer {layers[0]} and {layers[1]}; compare "
            "two trainings of one configuration"
        )
    if first.tokenizer.to_str() != second.tokenizer.to_str():
        raise CheckpointError(
            f"'{plain}' and '{fwl}' have different tokenizers, so their perplexities cannot be "
            "compared; train both with one tokenizer"
        )
    return first, second


def load_texts(
    checkpoint: Checkpoint, data: Path, plan: EvaluationPlan
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the token ids of the test plays by name, and those of the validation text."""
    plays = demo_data.load_plays(data)

    def tokens(names: Iterable[str], limit: int | None) -> Tensor:
        texts = [plays[name] for name in names]
        return torch.from_numpy(demo_data.encode(checkpoint.tokenizer, texts))[:limit]

    test = {name: tokens([name], plan.play_tokens) for name in demo_data.TEST_PLAYS}
    return test, tokens(demo_data.VALIDATION_PLAYS, plan.validation_tokens)


def _sha256(*chunks: bytes) -> str:
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def run(plain: Path, fwl: Path, data: Path, output: Path, plan: EvaluationPlan) -> None:
    """Evaluate two checkpoints; write results.json, results.md, the plot and a checkpoint."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    first, second = load_pair(plain, fwl)
    plays, validation = load_texts(first, data, plan)
    files = {"plain": plain / "model.safetensors", "fwl": fwl / "model.safetensors"}
    settings = {
        "plan": dataclasses.asdict(plan),
        **{name: _sha256(path.read_bytes()) for name, path in files.items()},
        "text": _sha256(*(play.numpy().tobytes() for play in [*plays.values(), validation])),
    }
    work = Workspace(output / "partial", settings)
    results = evaluate(first.model, second.model, plays, validation, plan, work)
    tuned = results["tuning"]["anchor"]
    factors = tuned["step_factor"], tuned["horizon_factor"]
    read = anchored(second.model, tuned["interval"], *factors)
    layer = read.fast_weights
    save_checkpoint(output / "checkpoint", read, second.tokenizer)
    results |= {
        "parameters": sum(p.numel() for p in first.model.parameters()),
        "fwl": {
            "steps": {name: step.mean().item() for name, step in layer.steps.items()},
            "horizon": layer.horizon.item() if layer.config.decay == "learned" else None,
            "loss_normalizer": layer.config.loss_normalizer,
        },
        "config": read.config.to_dict(),
        "settings": settings,
        "machine": machine(),
        "command": shlex.join(["python", f"tools/{Path(__file__).name}", *sys.argv[1:]]),
        "seconds_of_this_run": time.perf_counter() - began,
    }
    write_json(output / "results.json", results)
    results = json.loads((output / "results.json").read_text())
    (output / "results.md").write_text(results_markdown(results))
    plot_perplexity(results, output)
    work.console.print(
        f"wrote {output / 'results.json'}, results.md, perplexity.png and .svg, checkpoint"
    )


def main(
    plain: Annotated[Path, typer.Option(help="Checkpoint trained on the slow logits.")],
    fwl: Annotated[Path, typer.Option(help="Checkpoint trained while adapting.")],
    data: Annotated[Path, typer.Option(help="Folder for the plays; downloaded if missing.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")],
    quick: Annotated[
        bool, typer.Option(help="Read a few thousand tokens only, to see that it runs.")
    ] = False,
) -> None:
    """Compare an adapting model with a plain one and with dynamic evaluation."""
    try:
        run(plain, fwl, data, output, QUICK if quick else EvaluationPlan())
    except FwlError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)

"""Compare ways to train: seconds per update, peak memory and loss.

    python -m tools.training_report --updates 40

Every way runs in its own process and sees the same texts in the same order from the same weights.
Peak memory includes what an idle process with torch takes. The last line printed is JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.bundle.tokenizer import load_tokenizer, read_ids
from fwl_export.cli.terminal import table
from fwl_export.demo import HELD_OUT_PLAY, checkpoint_folder
from fwl_export.model.language_model import FWLModel
from fwl_export.model.training import TrainingConfig, initialize_steps, train

WAYS: dict[str, dict[str, Any]] = {
    "plain, no adaptation": {"adapt": False},
    "second order": {},
    "second order, checkpointing": {"gradient_checkpointing": True},
    "second order, bfloat16": {"precision": "bfloat16"},
    "first order": {"first_order": True},
    "first order, checkpointing": {"first_order": True, "gradient_checkpointing": True},
    "second order, frozen backbone": {"train_backbone": False},
}


def main(
    updates: Annotated[int, typer.Option(help="Number of updates per way.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens per text.")] = 1024,
    width: Annotated[
        int, typer.Option(help="Width of backbone and layer, a multiple of 64.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the order of texts.")] = 0,
    way: Annotated[str, typer.Option(help="Run only this way, in this process; print JSON.")] = "",
) -> None:
    """Train each way in turn and print a table."""
    if way:
        print(json.dumps(measure(way, updates, length, width, seed)))
        return
    results = {}
    for name in WAYS:
        command = [sys.executable, "-m", "tools.training_report", "--way", name]
        sizes = ["--updates", updates, "--length", length, "--width", width, "--seed", seed]
        done = subprocess.run(
            [*command, *map(str, sizes)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[name] = json.loads(done.stdout)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    rows = [[name, *(f"{value:.3f}" for value in r.values())] for name, r in results.items()]
    print(table(["way", *next(iter(results.values()))], rows))
    print(json.dumps(results))


def measure(way: str, updates: int, length: int, width: int, seed: int) -> dict[str, float]:
    """Train one way and return its figures.

    Args:
      way: Key of `WAYS`.
      updates: Number of updates.
      length: Tokens per text.
      width: Width of backbone and layer.
      seed: Seed of the weights and the order of texts.

    Returns:
      Median seconds per update, peak memory in MB, and the mean loss over the last quarter of the
      updates, with adaptation and without.
    """
    torch.set_num_threads(1)
    folder = checkpoint_folder("demo")
    ids = read_ids(HELD_OUT_PLAY, load_tokenizer(folder / "tokenizer.json"))
    layer = FastWeightsConfig(input_size=width, hidden_size=4 * width, output_size=width)
    backbone = BackboneConfig(width=width, layers=3, heads=width // 32, window=128)
    torch.manual_seed(seed)
    model = FWLModel(ModelConfig(2048, backbone, layer))
    initialize_steps(model)
    config = TrainingConfig(
        steps=updates, sequence_length=length, batch_size=1, seed=seed, **WAYS[way]
    )
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as beside:
        train(model, torch.from_numpy(ids), config, Path(beside) / "resume", rows.append, updates)
    last = rows[-max(updates // 4, 1) :]
    return {
        "seconds": statistics.median(row["seconds"] for row in rows),
        "peak MB": max(row["peak_memory_mb"] for row in rows),
        "loss": statistics.mean(row["loss"] for row in last),
        "adaptation off": statistics.mean(row["slow_loss"] for row in last),
    }


if __name__ == "__main__":
    typer.run(main)

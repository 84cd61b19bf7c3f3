"""`fwl-export train`: from texts and a tokenizer to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.options import JsonOption
from fwl_export.cli.terminal import note, print_json, progress_bar

# About so many lines of progress per training.
_LINES = 20


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="TOML file that describes the training.", show_default=False
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Train a model as a TOML file describes.

    A killed run resumes when the command is repeated, and ends bit for bit like an uninterrupted
    one. A minimal file, with paths relative to it:

      output = "runs/plays"           # for log.csv and the checkpoint
      texts = ["plays/*.txt"]
      tokenizer = "tokenizer.json"
      [model.backbone]                # or, to start from one: checkpoint = "demo"
      width = 192
      [training]
      steps = 2000

    docs/train.toml in the repository shows every key, and runs as it is.

    Example:
      fwl-export train plays.toml
    """
    from fwl_export.demo import checkpoint_folder
    from fwl_export.model.training_run import read_run_config, run_training

    run = read_run_config(config)
    if run.checkpoint is not None:
        run = replace(run, checkpoint=checkpoint_folder(str(run.checkpoint)))
    steps = run.training.steps
    last: dict[str, float] = {}
    with progress_bar("train", steps) as advance:

        def report(row: dict[str, float]) -> None:
            done = int(row["step"]) + 1
            advance(1 if last else done)  # a resumed run begins at its step
            last.update(row)
            if done % max(steps // _LINES, 1) == 0 or done == steps:
                note(_line(row, steps))

        folder = run_training(run, report, note)
    if json:
        print_json({"checkpoint": str(folder), "updates": steps, "last": last})
    else:
        print(f"wrote {folder}; its log is {folder.with_name('log.csv')}")


def _line(row: dict[str, float], steps: int) -> str:
    return (
        f"update {int(row['step']) + 1} of {steps}: loss {row['loss']:.4f}, adaptation off "
        f"{row['slow_loss']:.4f}, {row['seconds']:.2g} s, {row['peak_memory_mb']:.0f} MB"
    )

"""`fwl-export train`: texts and a tokenizer in, a checkpoint out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import JsonOption, print_json, progress_bar

_LINES = 20


def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the training.", show_default=False)],
    json: JsonOption = False,
) -> None:
    r"""Train a model as a TOML file says, or go on where it was interrupted.

    \b
    The file, with paths relative to it:
      output = "runs/plays"       # log.csv, resume file, checkpoint
      texts = ["plays/*.txt"]
      tokenizer = "tokenizer.json"
      [model.backbone]            # or: checkpoint = "demo", to start from
      width = 192
      [training]
      steps = 2000

    Every key: docs/train.toml of the repository, which runs as it is; their defaults:
    fwl_export/model/training_run.py, training.py and config.py.

    Example: fwl-export train plays.toml
    """
    from fwl_export.demo import checkpoint_folder
    from fwl_export.model.training_run import read_run_config, run_training

    run = read_run_config(config)
    if run.checkpoint is not None:
        run = replace(run, checkpoint=checkpoint_folder(str(run.checkpoint)))
    steps = run.training.steps
    rows: list[dict[str, float]] = []
    with progress_bar("train", steps) as advance:

        def report(row: dict[str, float]) -> None:
            done = int(row["step"]) + 1
            advance(1 if rows else done)
            rows[:] = [row]
            if done % max(steps // _LINES, 1) == 0 or done == steps:
                _say(
                    f"update {done} of {steps}: loss {row['loss']:.4f}, adaptation off "
                    f"{row['slow_loss']:.4f}, {row['seconds']:.2g} s, "
                    f"{row['peak_memory_mb']:.0f} MB"
                )

        folder = run_training(run, report, _say)
    last = rows[0] if rows else {}
    if json:
        print_json({"checkpoint": str(folder), "updates": steps, "last": last})
    else:
        print(f"wrote {folder}; its log is {folder.with_name('log.csv')}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

"""Measure how much the gain from adaptation varies between seeds, with short trainings.

python -m tools.seed_spread -o runs/seeds
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from fwl_export.adaptation import CHUNK, AdaptingReader, PlainReader, iterate_losses, perplexity
from fwl_export.files import replaced_file
from fwl_export.model.checkpoint import load_checkpoint
from tools.demo_data import TEST_PLAYS, encode, load_plays
from tools.train_demo import main as train_demo


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs and results.")],
    data: Annotated[Path, typer.Option(help="Folder for the plays; downloaded if missing.")] = Path(
        "runs/data"
    ),
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "1,2,3",
    steps: Annotated[int, typer.Option(help="Number of updates per training.")] = 200,
) -> None:
    """Train both models from each seed and write OUTPUT/results.json."""
    torch.set_num_threads(1)
    rows = []
    for seed in (int(part) for part in seeds.split(",")):
        row: dict[str, float] = {"seed": seed}
        for objective in ("plain", "fwl"):
            run = output / f"{objective}-{seed}"
            if not (run / "checkpoint").is_dir():
                train_demo(objective, run, data, steps, seed)
            row[objective] = read_test_plays(run / "checkpoint", data, objective == "fwl")
        row["ratio"] = row["fwl"] / row["plain"]
        print(row)
        rows.append(row)
    ratios = [row["ratio"] for row in rows]
    results = {
        "steps": steps,
        "rows": rows,
        "ratio_mean": statistics.mean(ratios),
        "ratio_standard_deviation": statistics.stdev(ratios) if len(ratios) > 1 else None,
    }
    with replaced_file(output / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def read_test_plays(checkpoint: Path, data: Path, adapt: bool) -> float:
    """Return the perplexity of the test plays, read in order as one stream."""
    loaded = load_checkpoint(checkpoint)
    plays = load_plays(data)
    tokens = torch.from_numpy(encode(loaded.tokenizer, [plays[name] for name in TEST_PLAYS]))
    reader = AdaptingReader(loaded.model) if adapt else PlainReader(loaded.model)
    return perplexity(np.concatenate(list(iterate_losses(reader, tokens, CHUNK))))


if __name__ == "__main__":
    typer.run(main)

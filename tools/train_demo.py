"""Train the demo model, or its plain counterpart, on Shakespeare's plays, on one CPU thread.

    python tools/train_demo.py --objective fwl   --run runs/fwl
    python tools/train_demo.py --objective plain --run runs/plain

Both runs see the same texts in the same order from the same initial weights. An interrupted run
resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.model.checkpoint import save_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.model.training import TrainingConfig, initialize_steps, train
from fwl_export.model.training_files import TrainingLog
from tools.demo_data import encode, load_plays, train_tokenizer, training_texts

MODEL = ModelConfig(
    vocab_size=2048,
    backbone=BackboneConfig(width=224, layers=3, heads=7, window=128),
    fast_weights=FastWeightsConfig(
        input_size=224, hidden_size=896, output_size=224, step_size_shape="input"
    ),
)


def main(
    objective: Annotated[str, typer.Option(help="fwl: adapt while training; plain: do not.")],
    run: Annotated[Path, typer.Option(help="Folder for the resume file, log and checkpoint.")],
    data: Annotated[Path, typer.Option(help="Folder for the plays; downloaded if missing.")] = Path(
        "runs/data"
    ),
    steps: Annotated[int, typer.Option(help="Number of updates.")] = 2000,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and the order of texts.")
    ] = 0,
) -> None:
    """Train one model and write its checkpoint to RUN/checkpoint."""
    if objective not in ("fwl", "plain"):
        raise typer.BadParameter(f"objective is {objective!r}; expected fwl or plain")
    torch.set_num_threads(1)
    run.mkdir(parents=True, exist_ok=True)
    texts = training_texts(load_plays(data))
    tokenizer = load_or_train_tokenizer(data, texts)
    tokens = torch.from_numpy(encode(tokenizer, texts))
    torch.manual_seed(seed)
    model = FWLModel(MODEL)
    initialize_steps(model)
    config = TrainingConfig(
        adapt=objective == "fwl", steps=steps, sequence_length=2048, batch_size=1, seed=seed
    )
    print(f"{objective}: {sum(p.numel() for p in model.parameters()):,} parameters, {config}")
    with _Log(run / "log.csv", steps, objective) as log:
        train(model, tokens, config, run / "resume.pt", log.add)
    save_checkpoint(run / "checkpoint", model, tokenizer)
    print(f"wrote {run / 'checkpoint'}")


def load_or_train_tokenizer(data: Path, texts: list[str]) -> Tokenizer:
    """Return the tokenizer of the training plays; train it if the data folder has none."""
    path = data / f"tokenizer-{MODEL.vocab_size}.json"
    if not path.exists():
        train_tokenizer(texts, MODEL.vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


class _Log:
    """Writes a CSV line per update and moves a progress bar."""

    def __init__(self, path: Path, steps: int, title: str) -> None:
        self._log = TrainingLog(path)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task(title, total=steps)
        self._title = title

    def __enter__(self) -> _Log:
        self._progress.start()
        return self

    def add(self, row: dict[str, float]) -> None:
        self._log.add(row)
        description = f"{self._title} loss {row['loss']:.3f}"
        self._progress.update(self._task, completed=row["step"] + 1, description=description)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._log.close()


if __name__ == "__main__":
    typer.run(main)

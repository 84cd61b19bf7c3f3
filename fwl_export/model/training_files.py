"""The files that a training run writes while it runs: the resume file and the log."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fwl_export.errors import CheckpointError, MissingDependencyError
from fwl_export.files import named_errors, replaced_file


def save_progress(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    config: Any,
    step: int,
    inputs: str = "",
) -> None:
    """Write all that training needs to resume: trained parameters, optimizer states, settings.

    If the process is killed while it writes, the old file stays.

    Args:
      path: The safetensors file to write.
      model: The model. Only parameters that require a gradient are saved; the others never change.
      optimizers: The optimizers, whose states must consist of tensors.
      config: The settings, a dataclass; training resumes only with equal ones.
      step: Number of updates done.
      inputs: The `fingerprint` of what training reads but does not change.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _trained(model).items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = tensor
    metadata = {"step": str(step), "config": _settings(config), "inputs": inputs}
    with replaced_file(path) as beside:
        save_file({n: t.contiguous() for n, t in tensors.items()}, beside, metadata)


def load_progress(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    config: Any,
    inputs: str = "",
) -> int:
    """Restore a model and its optimizers from a resume file.

    Args:
      path: The file that `save_progress` wrote.
      model: The model to restore, built and prepared as for a new run.
      optimizers: The optimizers to restore, in the same order.
      config: The settings of this run, a dataclass.
      inputs: The `fingerprint` of this run; "" is not compared, nor is that of an older file.

    Returns:
      The number of updates done.

    Raises:
      CheckpointError: The file cannot be read, or belongs to other settings, another model, other
        texts or another backbone.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it to start the training again"
        ) from None
    trained = _trained(model)
    found = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if metadata.get("config") != _settings(config) or shapes != {
        name: tensor.shape for name, tensor in trained.items()
    }:
        raise CheckpointError(
            f"{path} belongs to a run with other settings; train with the settings of that run to "
            "resume it, or remove the file to start again"
        )
    if inputs and metadata.get("inputs", inputs) != inputs:
        raise CheckpointError(
            f"{path} belongs to a run on other texts, or on another frozen backbone; train with "
            "those of that run to resume it, or remove the file to start again"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{number}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, _, key = name.removeprefix(prefix).partition(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["step"])


def fingerprint(model: nn.Module, tokens: Tensor) -> str:
    """Return a sha256 over what training reads but does not change: texts and frozen parameters.

    Args:
      model: The model, prepared for training.
      tokens: The training text, [N] int64.
    """
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _settings(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


class TrainingLog:
    """The log of a training run: a CSV file with a line per update, and TensorBoard's files.

    A resumed run begins a few updates before the last line of the log. The first update removes the
    lines that will be written again, so that every update has one line, and tells TensorBoard to
    hide its old values of these updates.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        """Prepare the log; the files are opened by the first `add`.

        Args:
          path: Path of the CSV file.
          tensorboard: Folder for TensorBoard's files; None writes none.

        Raises:
          MissingDependencyError: `tensorboard` is given, but TensorBoard is not installed.
        """
        self._path = path
        self._stream: io.TextIOWrapper | None = None
        self._board: Any = None
        self._board_folder = tensorboard
        self._writer = None if tensorboard is None else _summary_writer()

    def add(self, row: Mapping[str, float]) -> None:
        """Write the line of an update.

        Args:
          row: The values by column. Every row has the same columns, among them "step".
        """
        if self._stream is None:
            step = int(row["step"])
            self._stream = self._open([*row, "time"], step)
            if self._writer is not None:
                self._board = self._writer(str(self._board_folder), purge_step=step)
        values = [*(f"{value:.9g}" for value in row.values()), f"{time.time():.0f}"]
        with named_errors(self._path):
            csv.writer(self._stream).writerow(values)
            self._stream.flush()
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        if self._stream is not None:
            with named_errors(self._path):
                self._stream.close()
        if self._board is not None:
            self._board.close()

    def _open(self, names: list[str], step: int) -> io.TextIOWrapper:
        earlier: list[list[str]] = []
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))
            if rows and rows[0] != names:
                raise CheckpointError(
                    f"log {self._path} has the columns {', '.join(rows[0])}, but this training "
                    f"writes {', '.join(names)}; move the old log away"
                )
            # If the process was killed while it wrote a line, that line has too few columns.
            earlier = [r for r in rows[1:] if len(r) == len(names) and int(r[0]) < step]
        with replaced_file(self._path) as beside, beside.open("w", newline="") as stream:
            csv.writer(stream).writerows([names, *earlier])
        return self._path.open("a", newline="", encoding="utf-8")


def _summary_writer() -> Any:
    """Return TensorBoard's writer class."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorBoard's files need the package tensorboard, which cannot be imported "
            f"({error}); pip install 'fwl-export[tensorboard]', or leave `tensorboard` out of the "
            "config"
        ) from None
    return SummaryWriter

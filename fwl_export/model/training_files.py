"""What a training writes while it runs: the resume file and the log."""

from __future__ import annotations

import csv
import dataclasses
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
from fwl_export.files import replaced_file


def save_progress(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    config: Any,
    step: int,
) -> None:
    """Write all that training needs to go on: trained parameters, optimisers, settings.

    A process killed while writing leaves the file as it was.

    Args:
      path: of the file, safetensors.
      model: what does not require a gradient is not saved: it is as it was at the beginning.
      optimizers: their state must be tensors.
      config: a dataclass; training goes on with the same one only.
      step: updates done.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _trained(model).items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = tensor
    metadata = {"step": str(step), "config": _settings(config)}
    with replaced_file(path) as beside:
        save_file({n: t.contiguous() for n, t in tensors.items()}, beside, metadata)


def load_progress(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], config: Any
) -> int:
    """Put what `save_progress` wrote into model and optimisers; return the updates done.

    Raises:
      CheckpointError: the file is of other settings or another model, or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it to start again"
        ) from None
    trained = _trained(model)
    found = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if metadata.get("config") != _settings(config) or shapes != {
        name: tensor.shape for name, tensor in trained.items()
    }:
        raise CheckpointError(
            f"{path} is of a run with other settings; remove it to start again, or train with the "
            "settings it had"
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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _settings(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


class TrainingLog:
    """A line of a CSV file per update, and TensorBoard's files if wanted.

    A resumed training begins a few updates before the last line; the lines that it writes anew
    are dropped first, so that each update has one; TensorBoard is told to hide what it has of them.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        """Open the log with its first line.

        Args:
          path: of the CSV file.
          tensorboard: folder for TensorBoard's files, None = none.

        Raises:
          MissingDependencyError: TensorBoard is wanted and not installed.
        """
        self._path = path
        self._stream: io.TextIOWrapper | None = None
        self._board: Any = None
        self._board_folder = tensorboard
        self._writer = None if tensorboard is None else _summary_writer()

    def add(self, row: Mapping[str, float]) -> None:
        """Write the line of an update; every row has the same keys, "step" among them."""
        if self._stream is None:
            step = int(row["step"])
            self._stream = self._open([*row, "time"], step)
            if self._writer is not None:
                self._board = self._writer(str(self._board_folder), purge_step=step)
        values = [*(f"{value:.9g}" for value in row.values()), f"{time.time():.0f}"]
        csv.writer(self._stream).writerow(values)
        self._stream.flush()
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()

    def _open(self, names: list[str], step: int) -> io.TextIOWrapper:
        kept: list[list[str]] = []
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))
            if rows and rows[0] != names:
                raise CheckpointError(
                    f"{self._path} has the columns {', '.join(rows[0])}; this training writes "
                    f"{', '.join(names)}: move it away"
                )
            # A line that a kill cut off has too few columns.
            kept = [r for r in rows[1:] if len(r) == len(names) and int(r[0]) < step]
        with replaced_file(self._path) as beside, beside.open("w", newline="") as stream:
            csv.writer(stream).writerows([names, *kept])
        return self._path.open("a", newline="", encoding="utf-8")


def _summary_writer() -> Any:
    """Return TensorBoard's class of writers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorBoard's files need 'tensorboard', which cannot be imported ({error}); "
            "pip install 'fwl-export[tensorboard]', or leave `tensorboard` out of the config"
        ) from None
    return SummaryWriter

"""What checkpoints are read from, JSON and safetensors, with what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fwl_export.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ZeroWeights(TorchFunctionMode):
    """Within it modules are made with zeros for random weights: those that are loaded right after.

    Random numbers take several times as long as reading weights from a file.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Of tensors, and of torch.nn.init, which names its argument.
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return (torch.zeros if func is torch.randn else func)(*args, **kwargs)


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, without a copy as `isfinite` makes."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, as float32.

    Args:
      path: of the file.
      expected: a tensor of the right shape for every name that the file must have.

    Raises:
      CheckpointError: the file cannot be read, or a tensor is missing, unknown, of another
        shape, or not finite.
    """
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    _check_names(path, set(tensors), set(expected))
    for name, tensor in expected.items():
        _check_tensor(path, name, tensors[name], tensor)
    return tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); is it truncated? copy it again"
        ) from None


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors that config.json asks for, e.g. '{missing[0]}'; "
            "is it of another model?"
        )
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} tensors that config.json has no place for, e.g. "
            f"'{unknown[0]}'; is it of another model?"
        )


def _check_tensor(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{path}: '{name}' has shape {list(found.shape)}, but config.json says "
            f"{list(expected.shape)}"
        )
    if not all_finite(found):
        raise CheckpointError(f"{path}: '{name}' holds NaN or infinite values; train it again")
    positive = name.endswith("horizon")
    if positive and not (found > 0).all():
        raise CheckpointError(f"{path}: '{name}' is {found.item():g}; expected more than 0")

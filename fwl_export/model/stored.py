"""Read the tensors of a safetensors file; an error names the tensor and the fault."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwl_export.bundle import manifest
from fwl_export.errors import CheckpointError
from fwl_export.json_files import brief

CONFIG_FILE = "config.json"
WEIGHTS_FILE = manifest.WEIGHTS_FILE

# Numbers that a model may have beyond its file, and then be refused for the tensor that differs.
_SMALL = 1 << 22

_ALIGNMENT = 64  # in bytes, as PyTorch allocates: results may depend on it


class ZeroWeights(TorchFunctionMode):
    """Context in which new modules get zeros instead of random weights.

    Use it for weights that are loaded right afterwards: drawing random numbers takes several times
    as long as to read weights from a file.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Both the methods of tensors and the functions of torch.nn.init, which name their argument.
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter) and tensor.device.type == "cpu":
                tensor.data = _lazy_zeros(tensor)
                return tensor
            with torch.no_grad():
                return tensor.zero_()
        return (torch.zeros if func is torch.randn else func)(*args, **kwargs)


def _lazy_zeros(like: Tensor) -> Tensor:
    """Return zeros of a tensor's shape and type that take no memory before they are written."""
    size = like.numel() * like.element_size()
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(like.dtype).reshape(like.shape)


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, without the copy that `isfinite` makes."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_tensors(
    path: Path, expected: Mapping[str, Tensor], content: bytes | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32, after checking them.

    Args:
      path: Path of the file.
      expected: A tensor of the expected shape for every name that the file must have.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file cannot be read, or a tensor is missing, unknown, not finite, or has
        another shape.
    """
    tensors = {name: tensor.float() for name, tensor in load_tensors(path, content).items()}
    _check_names(path, set(tensors), set(expected))
    for name, tensor in expected.items():
        _check_tensor(path, name, tensors[name], tensor)
    return tensors


def check_size(path: Path, parameters: int) -> None:
    """Check that a model fits a safetensors file roughly, before memory is reserved for it.

    Args:
      path: Path of the file.
      parameters: Number of parameters of the model; the file may hold a shared one only once.

    Raises:
      CheckpointError: The file cannot be read, or holds far less than the model needs.
    """
    with _readable(path), safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    stored = sum(math.prod(shape) for shape in shapes)
    if parameters > 2 * stored + _SMALL:
        raise CheckpointError(
            f"{path} holds {stored} numbers, but {CONFIG_FILE} describes a model of {parameters}; "
            "expected both files from the same model"
        )


def load_tensors(path: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Args:
      path: Path of the file.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file cannot be read.
    """
    with _readable(path):
        return load_file(path) if content is None else load(content)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({brief(error)}); if it is truncated, copy it "
            "again"
        ) from None


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the tensors that {CONFIG_FILE} requires, e.g. "
            f"'{missing[0]}'; expected both files from the same model"
        )
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that {CONFIG_FILE} does not provide for ({len(unknown)}, e.g. "
            f"'{unknown[0]}'); expected both files from the same model"
        )


def _check_shape(path: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if list(found) != list(expected):
        raise CheckpointError(
            f"{path}: tensor '{name}' has shape {list(found)}, but {CONFIG_FILE} requires "
            f"{list(expected)}; expected both files from the same model"
        )


def _check_tensor(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    _check_shape(path, name, found.shape, expected.shape)
    if not all_finite(found):
        raise CheckpointError(
            f"{path}: tensor '{name}' holds NaN or infinite values; the training has diverged: "
            "take an earlier checkpoint, or train again with a lower learning rate"
        )
    positive = name.endswith("horizon")
    if positive and not (found > 0).all():
        raise CheckpointError(
            f"{path}: tensor '{name}' is {found.item():g}; expected a number of tokens above 0"
        )

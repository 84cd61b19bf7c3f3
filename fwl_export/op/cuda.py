"""Runs the GPU kernels of `plugins/kernels/gpu` as the PyTorch op, where they are available."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# An installed package contains the kernels; in the source tree they are beside the package. They
# are imported from nowhere else: the working directory may have a folder `plugins` of its own.
_INSTALLED = Path(__file__).parents[1] / "plugins_lib" / "gpu"
_PLUGINS = Path(__file__).parents[2] / "plugins"


def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels can run on a CUDA device; warns once if they cannot."""
    capability = torch.cuda.get_device_capability(device)
    return _launcher() is not None and _planned(capability) is not None


def linear_attention_update(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on the current stream. The caller has checked the arguments.

    Args:
      query: [B, T, Dk] read vectors; float32, float16 or bfloat16.
      key: [B, T, Dk] write keys, with query's dtype.
      value: [B, T, Dv] write values, with query's dtype.
      decay: [B, T] float32, in [0, 1].
      past_state: [B, Dk, Dv] float32.

    Returns:
      Output [B, T, Dv] and present state [B, Dk, Dv], both float32.
    """
    tensors = {
        "query": query.contiguous(),
        "key": key.contiguous(),
        "value": value.contiguous(),
        "decay": decay.contiguous(),
        "past_state": past_state.contiguous(),
    }
    tensors["output"] = torch.empty_like(tensors["value"], dtype=torch.float32)
    tensors["present_state"] = torch.empty_like(tensors["past_state"])
    steps = _kernel_module("plan").plan(
        *query.shape,
        value.shape[2],
        str(query.dtype).removeprefix("torch."),
        _planned(torch.cuda.get_device_capability(query.device)),
        aligned=all(tensor.data_ptr() % 16 == 0 for tensor in tensors.values()),
    )
    tensors["workspace"] = decay.new_empty(steps.workspace)
    with torch.cuda.device(query.device):
        _launcher().launch(steps, tensors)
    return tensors["output"], tensors["present_state"]


def _kernel_module(name: str) -> Any:
    """Import a module of plugins/kernels/gpu by its name there.

    Raises:
      ImportError: The folder is missing, or Python finds another folder of that name.
    """
    if (_INSTALLED / f"{name}.py").is_file():
        return importlib.import_module(f"fwl_export.plugins_lib.gpu.{name}")
    found = importlib.util.find_spec("plugins")
    if found is None or _PLUGINS not in map(Path, found.submodule_search_locations or ()):
        raise ImportError(f"Python does not find fwl-export's own folder {_PLUGINS.name}/")
    return importlib.import_module(f"plugins.kernels.gpu.{name}")


@functools.cache
def _launcher() -> Any:
    """Return the module that launches the kernels, or None after a warning that says why."""
    try:
        return _kernel_module("launch")
    except ImportError as error:
        warnings.warn(
            "fwl::LinearAttentionUpdate runs in plain PyTorch on CUDA, slower than with its own "
            f"kernels: {error}. They need the package 'triton' (`pip install triton`), and "
            "fwl-export either installed as a package or run from its source tree.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def _planned(capability: tuple[int, int]) -> int | None:
    """Return the compute capability whose plan to use: the device's own, or the next below.

    Returns None, after a warning, if the device is too old for the kernels.
    """
    known = _kernel_module("plan").MULTIPROCESSORS
    own = 10 * capability[0] + capability[1]
    if own >= min(known):
        return int(max(sm for sm in known if sm <= own))
    warnings.warn(
        "fwl::LinearAttentionUpdate runs in plain PyTorch on this GPU: its compute capability is "
        f"{capability[0]}.{capability[1]}, and its kernels need 7.5 or more.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None

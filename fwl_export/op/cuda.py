"""The GPU kernels of `plugins/kernels/gpu` behind the PyTorch op, where they can run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In an installed package the kernels are part of it; in fwl-export's source they lie beside it.
# Imported from nowhere else: a folder of that name in somebody's working directory is not ours.
_INSTALLED = Path(__file__).parents[1] / "plugins_lib" / "gpu"
_PLUGINS = Path(__file__).parents[2] / "plugins"


def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels run on a CUDA device; warns, once, if they do not."""
    capability = torch.cuda.get_device_capability(device)
    return _launcher() is not None and _planned(capability) is not None


def linear_attention_update(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on the current stream. Arguments are those of the op, checked.

    Args:
      query: [B, T, Dk] float32, float16 or bfloat16.
      key: [B, T, Dk] of query's type.
      value: [B, T, Dv] of query's type.
      decay: [B, T] float32.
      past_state: [B, Dk, Dv] float32.

    Returns:
      output [B, T, Dv] of query's type and present_state [B, Dk, Dv] float32.
    """
    tensors = {
        "query": query.contiguous(),
        "key": key.contiguous(),
        "value": value.contiguous(),
        "decay": decay.contiguous(),
        "past_state": past_state.contiguous(),
    }
    tensors["output"] = torch.empty_like(tensors["value"])
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
    """Import a module of plugins/kernels/gpu.

    Raises:
      ImportError: the folder is not there, or what Python finds by that name is another one.
    """
    if (_INSTALLED / f"{name}.py").is_file():
        return importlib.import_module(f"fwl_export.plugins_lib.gpu.{name}")
    found = importlib.util.find_spec("plugins")
    if found is None or _PLUGINS not in map(Path, found.submodule_search_locations or ()):
        raise ImportError(f"Python does not find fwl-export's own folder {_PLUGINS.name}/")
    return importlib.import_module(f"plugins.kernels.gpu.{name}")


@functools.cache
def _launcher() -> Any:
    """Return the module that launches kernels, or None after a warning that says why not."""
    try:
        return _kernel_module("launch")
    except ImportError as error:
        warnings.warn(
            "fwl::LinearAttentionUpdate runs in plain PyTorch on CUDA, slower than by its own "
            f"kernels: {error}. They need the package 'triton' (`pip install triton`), and "
            "fwl-export installed as a package or run from its source.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def _planned(capability: tuple[int, int]) -> int | None:
    """Return the compute capability whose plan fits a device: its own, or the one below."""
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

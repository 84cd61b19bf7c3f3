"""Turn the block of the paper's JAX or TensorFlow code into our Fast Weight Layer.

The code is that of Clark et al., EMNLP 2022 (fwl/jax/fwl.py, fwl/tf/fwl.py). Its two versions
differ. In TensorFlow, the dense biases have fast weights too, every tensor has its own step size,
and the norm has no epsilon. In JAX, the dense biases have no fast weights, every layer has one step
size, and the norm has Flax's epsilon.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fwl_export.bundle.config import FastWeightsConfig
from fwl_export.errors import CheckpointError
from fwl_export.importers.arrays import Arrays, read_jax, read_tensorflow
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.model.fwl_checkpoint import UNEMBEDDING, FastWeightsCheckpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.printable import one_line


class _Parameter(NamedTuple):
    """One of our parameters, and its names in the paper's code.

    Attributes:
      axes: The sizes of the source's array, a letter per axis: d input, h hidden, s output, V
        vocabulary.
      jax: The array's path in Flax parameters.
      keras: The array's path in a TensorFlow checkpoint, made of the attributes of Keras layers.
    """

    axes: str
    jax: str
    keras: str


_PARAMETERS = {
    "up_kernel": _Parameter("dh", "layers_0/Dense_0/kernel", "layers/0/kernel"),
    "up_bias": _Parameter("h", "layers_0/Dense_0/bias", "layers/0/bias"),
    "down_kernel": _Parameter("hs", "layers_2/Dense_0/kernel", "layers/2/kernel"),
    "down_bias": _Parameter("s", "layers_2/Dense_0/bias", "layers/2/bias"),
    "norm_scale": _Parameter("s", "layers_3/LayerNorm_0/scale", "layers/3/alpha"),
    "norm_bias": _Parameter("s", "layers_3/LayerNorm_0/bias", "layers/3/beta"),
    # Our unembedding is the transpose, [V, s].
    "unembed": _Parameter("sV", "unembed/kernel", "layers/4/unembed/kernel"),
    "unembed_bias": _Parameter("V", "unembed/bias", "layers/4/unembed/bias"),
}

_JAX_NAMES = {
    **{name: parameter.jax for name, parameter in _PARAMETERS.items()},
    # One step size per layer. Layer 1 is the activation, which has no weights.
    "steps.up": "step_size_0",
    "steps.down": "step_size_2",
    "steps.norm": "step_size_3",
}
_KERAS_NAMES = {
    **{name: parameter.keras for name, parameter in _PARAMETERS.items()},
    # One step size per tensor with fast weights; the unembedding has none.
    **{
        f"steps.{name}": f"{parameter.keras}_step_size"
        for name, parameter in _PARAMETERS.items()
        if not name.startswith("unembed")
    },
}
# Names in an .npz file that a user writes: ours, except for the transposed unembedding.
_FLAT_NAMES = {
    **{name: name.replace("steps.", "step_") for name in _KERAS_NAMES},
    "unembed": "unembed_kernel",
}


class _Framework(NamedTuple):
    """What a framework's block looks like.

    Attributes:
      title: The framework's name, for messages.
      read: Reads the arrays of a checkpoint.
      names: The naming schemes that checkpoints may have, our name to the source's.
      norm_epsilon: The epsilon in the norm's square root.
      settings: The fields of `FastWeightsConfig` that describe the block.
    """

    title: str
    read: Callable[[Path], Arrays]
    names: tuple[Mapping[str, str], ...]
    norm_epsilon: float
    settings: Mapping[str, Any]


_FRAMEWORKS = {
    "jax": _Framework(
        "JAX",
        read_jax,
        (_JAX_NAMES,),
        1e-6,  # the default of flax.linen.LayerNorm
        {"update_dense_bias": False, "step_sizes": "per_layer"},
    ),
    "tf": _Framework(
        "TensorFlow",
        read_tensorflow,
        (_KERAS_NAMES, _FLAT_NAMES),
        0.0,
        {"update_dense_bias": True, "step_sizes": "per_tensor"},
    ),
}


def import_block(
    framework: Literal["jax", "tf"],
    source: Path,
    loss_normalizer: float | None,
    norm_epsilon: float | None = None,
    prefix: str | None = None,
) -> FastWeightsCheckpoint:
    """Read the Fast Weight Layer of a checkpoint of the paper's code.

    Args:
      framework: The framework that wrote the checkpoint.
      source: Path of the checkpoint, see `read_jax` and `read_tensorflow`.
      loss_normalizer: N, the sum of the token weights of a training batch, by which the training
        code divides the loss. Checkpoints do not hold it; None is an error that explains it.
      norm_epsilon: The epsilon in the norm's square root; None takes that of the framework's code.
      prefix: Path of the block, for a checkpoint that has several; None finds the only one.

    Returns:
      The layer in the source's precision, float32 or float64. It has no unembedding if the source
      has none.

    Raises:
      CheckpointError: The checkpoint cannot be read or has no such block, or the block's arrays
        have shapes that do not fit or values that are not finite.
      ConfigError: A number is out of range.
    """
    if loss_normalizer is None:
        raise CheckpointError(
            "--loss-normalizer is missing. The training code divides the loss by the sum of the "
            "token weights of its batch, which the checkpoint does not hold. Give that sum: texts "
            "per batch (of one device) times tokens of weight 1 per text, e.g. 8 x 511 = 4088 for "
            "8 texts of 512 tokens, the last of which has weight 0"
        )
    kind = _FRAMEWORKS[framework]
    arrays = kind.read(source)
    names, place = _find_block(source, arrays, kind, prefix)
    absent = [n for n in UNEMBEDDING if place + names[n] not in arrays]
    wanted = {n: path for n, path in names.items() if len(absent) < 2 or n not in absent}
    tensors, sizes = _read_block(source, arrays, wanted, place)
    config = FastWeightsConfig(
        sizes["d"],
        sizes["h"],
        sizes["s"],
        norm_epsilon=kind.norm_epsilon if norm_epsilon is None else norm_epsilon,
        loss_normalizer=float(loss_normalizer),
        decay="none",
        **kind.settings,
    )
    return FastWeightsCheckpoint(config, tensors)


def with_backbone(block: FastWeightsCheckpoint, backbone: Checkpoint) -> FWLModel:
    """Return a model with an imported block on the backbone of a checkpoint.

    Args:
      block: The imported Fast Weight Layer.
      backbone: The checkpoint whose backbone to copy.

    Raises:
      CheckpointError: The block has no unembedding, or one for another vocabulary.
      ConfigError: The backbone's width differs from the block's input size.
    """
    if block.vocab_size != backbone.config.vocab_size:
        found = (
            "no unembedding"
            if block.vocab_size is None
            else f"an unembedding of {block.vocab_size} tokens"
        )
        raise CheckpointError(
            f"the block has {found}, but the backbone's vocabulary has "
            f"{backbone.config.vocab_size} tokens; give the backbone that the block was trained on"
        )
    config = dataclasses.replace(backbone.config, fast_weights=block.config)
    model = FWLModel(config)
    model.backbone.load_state_dict(backbone.model.backbone.state_dict())
    model.fast_weights.load_state_dict(dict(block.tensors))
    return model.eval().requires_grad_(False)


def _find_block(
    source: Path, arrays: Arrays, kind: _Framework, prefix: str | None
) -> tuple[Mapping[str, str], str]:
    """Return the naming scheme that the source uses, and the path of the block before its names."""
    found = [
        (names, path.removesuffix(names["up_kernel"]))
        for names in kind.names
        for path in arrays
        if f"/{path}".endswith("/" + names["up_kernel"])
    ]
    if prefix is not None:
        found = [(n, place) for n, place in found if place.rstrip("/") == prefix.rstrip("/")]
    else:  # an optimizer's averages have the same names
        found = [(n, p) for n, p in found if "opt_state" not in p.split("/")]
    if not found:
        expected = " or ".join(f"'{names['up_kernel']}'" for names in kind.names)
        where = "" if prefix is None else f" under '{prefix}'"
        shown = ", ".join(sorted(arrays)[:3]) or "nothing"
        raise CheckpointError(
            f"{source} has no block of the paper's {kind.title} code{where}: none of its "
            f"{len(arrays)} arrays has a path that ends with {expected}. "
            f"It holds e.g. {one_line(shown)}"
        )
    if len(found) > 1:
        places = " and ".join(sorted(f"'{place.rstrip('/')}'" for _, place in found))
        raise CheckpointError(
            f"{source} has several blocks, at {places}; choose one of these with --prefix"
        )
    return found[0]


def _read_block(
    source: Path, arrays: Arrays, names: Mapping[str, str], place: str
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read the arrays of a block.

    Args:
      source: Path of the checkpoint, for messages.
      arrays: The arrays of the checkpoint.
      names: The source's names of the wanted parameters, by ours.
      place: The path of the block, which precedes the names.

    Returns:
      Our tensors, and the sizes d, h, s and, with an unembedding, V.
    """
    sizes: dict[str, int] = {}
    tensors = {}
    for name, path in names.items():
        full = place + path
        if full not in arrays:
            raise CheckpointError(
                f"{source} has '{place}{names['up_kernel']}', but lacks '{full}' of the same "
                "block; expected a checkpoint of the paper's code"
            )
        array = arrays[full]()
        _check_array(f"{source}: '{full}'", array, _axes(name), sizes)
        kind = np.float64 if array.dtype == np.float64 else np.float32
        tensor = torch.from_numpy(np.array(array, dtype=kind))
        tensors[name] = tensor.T.contiguous() if name == "unembed" else tensor
    return tensors, sizes


def _axes(name: str) -> str:
    return _PARAMETERS[name].axes if name in _PARAMETERS else ""  # a step size is a scalar


def _check_array(where: str, array: npt.NDArray[Any], letters: str, sizes: dict[str, int]) -> None:
    """Check the type, the shape and the values of an array.

    Args:
      where: Names the array; begins the message.
      array: The array to check.
      letters: The expected axes, one letter each, see `_Parameter`.
      sizes: The size of every letter seen so far; the array's new letters are added.

    Raises:
      CheckpointError: The array holds other things than finite numbers, or its shape does not fit
        the sizes seen so far.
    """
    if array.dtype.kind not in "fiu":
        raise CheckpointError(f"{where} has type {array.dtype}; expected real numbers")
    fits = array.ndim == len(letters) and all(
        size == sizes.setdefault(letter, size)
        for letter, size in zip(letters, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(sizes.get(letter, "any")) for letter in letters)
        raise CheckpointError(
            f"{where} has shape {list(array.shape)}; expected [{expected}], from the block's other "
            "arrays"
        )
    if not math.prod(array.shape):
        raise CheckpointError(f"{where} is empty; expected the values of a parameter")
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{where} holds NaN or infinite values; the training has diverged: take an earlier "
            "checkpoint"
        )

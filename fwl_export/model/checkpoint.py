"""Checkpoints: a folder with config.json, model.safetensors and tokenizer.json.

Nothing in it can run code: JSON and safetensors only, never pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fwl_export.errors import CheckpointError
from fwl_export.files import replaced_folder
from fwl_export.model.config import ModelConfig
from fwl_export.model.language_model import FWLModel
from fwl_export.text import load_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer.

    Attributes:
      model: float32, in evaluation mode, on the CPU.
      tokenizer: of `config.vocab_size` entries.
    """

    model: FWLModel
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
      CheckpointError: a file is missing, truncated, or does not fit the config.
      ConfigError: config.json has an unknown key or a value out of range.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint '{folder}' is not a folder; expected one with config.json"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"checkpoint '{folder}' has no {name}; a checkpoint holds {CONFIG_FILE}, "
                f"{WEIGHTS_FILE} and {TOKENIZER_FILE}"
            )
    config = load_config(folder / CONFIG_FILE)
    model = FWLModel(config)
    model.load_state_dict(read_tensors(folder / WEIGHTS_FILE, model.state_dict()))
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE, config.vocab_size)
    return Checkpoint(model.eval().requires_grad_(False), tokenizer)


def load_config(path: Path) -> ModelConfig:
    """Read a config.json.

    Raises:
      CheckpointError: it is not JSON.
      ConfigError: it is not a model's config.
    """
    return ModelConfig.from_dict(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """Return the data of a JSON file.

    Raises:
      CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); was it cut off?") from None


def save_checkpoint(folder: Path, model: FWLModel, tokenizer: Tokenizer) -> None:
    """Write a checkpoint folder, all of it or nothing; an older one there is replaced."""
    with replaced_folder(folder) as beside:
        text = json.dumps(model.config.to_dict(), indent=2)
        (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, beside / WEIGHTS_FILE)
        tokenizer.save(str(beside / TOKENIZER_FILE))


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, as float32.

    Args:
      path: of the file.
      expected: a tensor of the right shape for every name that the file must have.

    Raises:
      CheckpointError: the file cannot be read, or a tensor is missing, unknown, of another
        shape, or not finite.
    """
    tensors = load_tensors(path)
    _check_names(path, set(tensors), set(expected))
    for name, tensor in expected.items():
        _check_tensor(path, name, tensors[name], tensor)
    return {name: tensor.float() for name, tensor in tensors.items()}


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
    if not torch.isfinite(found).all():
        raise CheckpointError(f"{path}: '{name}' holds NaN or infinite values; train it again")
    positive = name.endswith("horizon")
    if positive and not (found > 0).all():
        raise CheckpointError(f"{path}: '{name}' is {found.item():g}; expected more than 0")

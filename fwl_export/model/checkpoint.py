"""Read and write checkpoints: folders with config.json, model.safetensors and tokenizer.json.

Files that say more about text, such as a chat template, may stand beside tokenizer.json.

A checkpoint cannot run code when it is loaded: it holds only JSON and safetensors, never pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from fwl_export.bundle.config import HuggingFaceConfig, ModelConfig
from fwl_export.bundle.text_tokenizer import text_tokenizer
from fwl_export.bundle.tokenizer_facts import facts
from fwl_export.errors import CheckpointError
from fwl_export.files import check_output, finish_replacement, replaced_folder
from fwl_export.json_files import read_json
from fwl_export.model.backbones.decoder import Decoder
from fwl_export.model.backbones.huggingface import causal_model
from fwl_export.model.fast_weights import FastWeights
from fwl_export.model.language_model import FWLModel
from fwl_export.model.stored import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ZeroWeights,
    check_size,
    read_tensors,
)

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer.

    Attributes:
      model: The model, in float32, in evaluation mode and on the CPU.
      tokenizer: Its tokenizer.
    """

    model: FWLModel
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config


def load_checkpoint(folder: Path, read: Callable[[str], bytes] | None = None) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
      folder: Path of the folder.
      read: Function that returns the content of config.json, model.safetensors or tokenizer.json,
        such as one that checks hashes; no other file is read then. None reads the folder.

    Raises:
      CheckpointError: A file is missing, truncated, or does not fit the config.
      ConfigError: config.json has an unknown key or a value out of range.
    """
    if read is None:
        check_complete(folder)
    content: Callable[[str], bytes | None] = read or (lambda name: None)
    config = load_config(folder / CONFIG_FILE, content(CONFIG_FILE))
    check_size(folder / WEIGHTS_FILE, _parameters(config))
    with ZeroWeights():
        model = FWLModel(config)
    # Nothing else holds the file's content, nor the tensors: either takes the model's memory again.
    expected = model.stored_tensors()
    model.load_stored_tensors(read_tensors(folder / WEIGHTS_FILE, expected, content(WEIGHTS_FILE)))
    text = text_tokenizer(folder, config, content(TOKENIZER_FILE), {} if read else None)
    return Checkpoint(model.eval().requires_grad_(False), text.tokenizer)


def check_complete(folder: Path) -> None:
    """Check that a folder has the files of a checkpoint.

    Raises:
      CheckpointError: There is no such folder, or a file is missing.
    """
    if not folder.exists():
        finish_replacement(folder)  # whoever replaced it may have been killed meanwhile
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"checkpoint '{folder}' {found}; expected a folder with {CONFIG_FILE}, {WEIGHTS_FILE} "
            f"and {TOKENIZER_FILE}, as `fwl-export train` and `fwl-export import` write it"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"checkpoint '{folder}' has no {name}; a checkpoint holds {CONFIG_FILE}, "
                f"{WEIGHTS_FILE} and {TOKENIZER_FILE}"
            )


def load_config(path: Path, content: bytes | None = None) -> ModelConfig:
    """Read a model's config.json.

    Args:
      path: Path of the file.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file is not JSON.
      ConfigError: The file is not the configuration of a model.
    """
    return ModelConfig.from_dict(read_json(path, CheckpointError, content=content), str(path))


def _parameters(config: ModelConfig) -> int:
    """Return how many parameters a model will have, without memory for them."""
    with torch.device("meta"):
        backbone: nn.Module
        if isinstance(config.backbone, HuggingFaceConfig):
            backbone = causal_model(config.backbone.model)
        else:
            backbone = Decoder(config.backbone, config.vocab_size)
        layer = FastWeights(config.fast_weights, config.vocab_size)
    return sum(tensor.numel() for part in (backbone, layer) for tensor in part.parameters())


def save_checkpoint(folder: Path, model: FWLModel, tokenizer: Tokenizer) -> None:
    """Write a checkpoint folder, replacing an older one. On failure, nothing changes there.

    Args:
      folder: Path of the folder.
      model: The model.
      tokenizer: Its tokenizer. If it was read with `load_checkpoint`, the files that stood beside
        it, such as the chat template, are written too.
    """
    with replaced_folder(folder) as beside:
        text = json.dumps(model.config.to_dict(), indent=2)
        (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in model.stored_tensors().items()}
        save_file(tensors, beside / WEIGHTS_FILE)
        tokenizer.save(str(beside / TOKENIZER_FILE))
        for name, content in facts(tokenizer).files.items():
            (beside / name).write_bytes(content)


def check_checkpoint_output(folder: Path, force: bool) -> None:
    """Check that a checkpoint may be written to a folder; see `files.check_output`.

    Raises:
      OutputExistsError: The folder exists and `force` is off, or it is not a checkpoint.
    """
    check_output(folder, "a checkpoint", _is_checkpoint, force)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()

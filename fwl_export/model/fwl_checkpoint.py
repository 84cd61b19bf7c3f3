"""Checkpoints of a Fast Weight Layer alone: folders with config.json and model.safetensors.

The config has the keys `schema_version` and `fast_weights`. The tensors have the names of the
parameters of `FastWeights`. The unembedding may be absent; a model then uses its backbone's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fwl_export.bundle.config import OLD_SCHEMA, SCHEMA_VERSION, FastWeightsConfig, config_from_dict
from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.files import replaced_folder
from fwl_export.json_files import check_schema, read_json, shown
from fwl_export.model.fast_weights import FastWeights
from fwl_export.model.stored import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_tensors,
    read_tensors,
)

UNEMBEDDING = ("unembed", "unembed_bias")


@dataclass(frozen=True)
class FastWeightsCheckpoint:
    """The parameters of a Fast Weight Layer.

    Attributes:
      config: The layer's configuration.
      tensors: The parameters by their names in `FastWeights`: all of them, or all but the
        unembedding and its bias.
    """

    config: FastWeightsConfig
    tensors: Mapping[str, Tensor]

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens that the unembedding has; None if there is no unembedding."""
        return len(self.tensors["unembed"]) if "unembed" in self.tensors else None


def load_fast_weights(folder: Path) -> FastWeightsCheckpoint:
    """Read the folder of a layer alone, in float32.

    Raises:
      CheckpointError: A file is missing, truncated, or does not fit the config.
      ConfigError: config.json has an unknown key or a value out of range.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"'{folder}' has no {name}; expected the folder of a Fast Weight Layer, with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}, as `fwl-export import` writes it"
            )
    config = _read_config(folder / CONFIG_FILE)
    tensors = load_tensors(folder / WEIGHTS_FILE)
    unembed = tensors.get("unembed")
    rows = 1 if unembed is None or not unembed.ndim else len(unembed)
    expected = expected_tensors(config, rows)
    if not any(name in tensors for name in UNEMBEDDING):
        for name in UNEMBEDDING:
            del expected[name]
    return FastWeightsCheckpoint(config, read_tensors(folder / WEIGHTS_FILE, expected))


def save_fast_weights(folder: Path, checkpoint: FastWeightsCheckpoint) -> None:
    """Write the folder of a layer alone, in float32, replacing an older one."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "fast_weights": dataclasses.asdict(checkpoint.config),
    }
    with replaced_folder(folder) as beside:
        (beside / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        tensors = {name: t.float().contiguous() for name, t in checkpoint.tensors.items()}
        save_file(tensors, beside / WEIGHTS_FILE)


def expected_tensors(config: FastWeightsConfig, vocab_size: int) -> dict[str, Tensor]:
    """Return a meta tensor, with a shape but without memory, for each parameter of a layer."""
    with torch.device("meta"):
        return dict(FastWeights(config, vocab_size).state_dict())


def _read_config(path: Path) -> FastWeightsConfig:
    data = read_json(path, CheckpointError)
    if not isinstance(data, dict) or set(data) != {"schema_version", "fast_weights"}:
        found = shown(", ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__)
        raise ConfigError(
            f"{path}: expected an object with schema_version and fast_weights, got {found}; give "
            "the folder of a Fast Weight Layer alone, not the checkpoint of a whole model"
        )
    check_schema(data, SCHEMA_VERSION, str(path), ConfigError, OLD_SCHEMA)
    return config_from_dict(FastWeightsConfig, data["fast_weights"], str(path), "fast_weights.")

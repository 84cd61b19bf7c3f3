"""Run a training that a TOML file describes, from texts and a tokenizer to a checkpoint."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fwl_export.bundle.config import (
    BackboneConfig,
    FastWeightsConfig,
    ModelConfig,
    config_from_dict,
)
from fwl_export.bundle.tokenizer import load_tokenizer, read_ids
from fwl_export.errors import ConfigError
from fwl_export.json_files import read_bounded, shown
from fwl_export.model.checkpoint import check_checkpoint_output, load_checkpoint, save_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.model.training import TrainingConfig, initialize_steps, train
from fwl_export.model.training_files import TrainingLog

RESUME_FILE, LOG_FILE, CHECKPOINT_FOLDER = "resume.safetensors", "log.csv", "checkpoint"

_TABLES = ("model", "training")
_LARGEST_FILE = 1 << 18  # in bytes
# tomllib takes time with the square of the number of a key's parts, a.b.c and so on.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


@dataclass(frozen=True)
class RunConfig:
    """A training run, as its TOML file describes it; paths are relative to that file.

    Attributes:
      output: Folder of the run, for the resume file, the log, and in the end the checkpoint.
      texts: UTF-8 files, or patterns such as "plays/*.txt", whose files are read in order of their
        names.
      tokenizer: Path of a tokenizer.json; not allowed with `checkpoint`, which has its own.
      checkpoint: Checkpoint whose weights training starts from; None starts from random weights.
      save_every: Number of updates between two writes of the resume file.
      device: Device to train on, "cpu" or "cuda".
      tensorboard: Whether to write TensorBoard's files too.
      backbone: Backbone of a new model, the table [model.backbone]; missing keys have defaults.
      fast_weights: Fast Weight Layer of a new model, the table [model.fast_weights]; missing sizes
        are derived from the backbone.
      training: How to train, the table [training]; missing keys have defaults.
    """

    output: Path
    texts: tuple[str, ...]
    tokenizer: Path | None = None
    checkpoint: Path | None = None
    save_every: int = 50
    device: str = "cpu"
    tensorboard: bool = False
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fast_weights: FastWeightsConfig = field(default_factory=FastWeightsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; expected 1 or more")


_TYPES: dict[str, tuple[type, str]] = {
    "output": (str, "a path"),
    "texts": (list, "a list of files or patterns"),
    "tokenizer": (str, "a path"),
    "checkpoint": (str, "a path"),
    "save_every": (int, "a whole number"),
    "device": (str, '"cpu" or "cuda"'),
    "tensorboard": (bool, "true or false"),
}


def read_run_config(path: Path) -> RunConfig:
    """Read the TOML file of a training run.

    Raises:
      ConfigError: The file is not TOML, a key is unknown, missing or of the wrong type, or a value
        is out of range.
    """
    try:
        text = read_bounded(path, ConfigError, _LARGEST_FILE).decode()
        if _LONG_KEY.search(text):
            raise ValueError("a key has more than 32 parts")
        data = tomllib.loads(text)
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not TOML ({error})") from None
    known = {*_TYPES, *_TABLES}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"{path}: unknown key '{shown(unknown[0])[1:-1]}'; known keys: "
            f"{', '.join(sorted(known))}"
        )
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in _TYPES:
            continue
        kind, expected = _TYPES[key]
        if type(value) is not kind:
            raise ConfigError(f"{path}: '{key}' is {shown(value)}; expected {expected}")
        texts: list[Any] = value if isinstance(value, list) else [value]
        if any("\0" in str(text) for text in texts):
            raise ConfigError(f"{path}: '{key}' is {shown(value)}; expected no NUL in a path")
        # "demo" is not a path: it names the checkpoint that ships with the package.
        place = key in ("output", "tokenizer", "checkpoint") and value != "demo"
        values[key] = path.parent / str(value) if place else value
    for key in ("output", "texts"):
        if not values.get(key):
            raise ConfigError(f"{path}: key '{key}' is missing or empty")
    if wrong := [text for text in values["texts"] if not isinstance(text, str)]:
        raise ConfigError(f"{path}: 'texts' has {shown(wrong[0])}; expected files or patterns")
    values["texts"] = tuple(str(path.parent / str(text)) for text in values["texts"])
    _check_start(path, data)
    training = config_from_dict(
        TrainingConfig, data.get("training", {}), str(path), "training.", partial=True
    )
    return RunConfig(**values, **_model_tables(path, data), training=training)


def _check_start(path: Path, data: dict[str, Any]) -> None:
    if "checkpoint" in data and ("tokenizer" in data or "model" in data):
        raise ConfigError(
            f"{path}: a 'checkpoint' has its own tokenizer and model; remove either 'checkpoint', "
            "or 'tokenizer' and [model]"
        )
    if "checkpoint" not in data and "tokenizer" not in data:
        raise ConfigError(
            f"{path}: key 'tokenizer' is missing; give the path of a tokenizer.json, or a "
            "'checkpoint' to start from"
        )


def _model_tables(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return the configs of backbone and fast weights, with sizes to fit the backbone."""
    tables = data.get("model", {})
    if not isinstance(tables, dict) or (
        unknown := sorted(set(tables) - {"backbone", "fast_weights"})
    ):
        name = unknown[0] if isinstance(tables, dict) else tables
        raise ConfigError(
            f"{path}: 'model' has {shown(name)}; expected the tables [model.backbone] and "
            "[model.fast_weights]"
        )
    backbone = config_from_dict(
        BackboneConfig, tables.get("backbone", {}), str(path), "model.backbone.", partial=True
    )
    layer = tables.get("fast_weights", {})
    if isinstance(layer, dict):
        width = backbone.width
        sizes = {"input_size": width, "hidden_size": 4 * width, "output_size": width}
        layer = {**sizes, **layer}
    fast_weights = config_from_dict(
        FastWeightsConfig, layer, str(path), "model.fast_weights.", partial=True
    )
    return {"backbone": backbone, "fast_weights": fast_weights}


def run_training(
    config: RunConfig,
    report: Callable[[dict[str, float]], None] = lambda row: None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Train as the config says, and resume where an earlier run was interrupted.

    Args:
      config: The training run, see `read_run_config`.
      report: Called after every update, see `train`.
      say: Called with a line of text about what is being done.

    Returns:
      The folder of the new checkpoint.

    Raises:
      ConfigError, CheckpointError, TokenError, TrainingError: The config, a checkpoint, a text or
        the training cannot be used.
    """
    folder = config.output / CHECKPOINT_FOLDER
    check_checkpoint_output(folder, force=True)
    model, tokenizer = _start(config)
    tokens = _tokens(config, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{count:,} parameters, {len(tokens):,} tokens, {config.training.steps} updates")
    config.output.mkdir(parents=True, exist_ok=True)
    log = TrainingLog(
        config.output / LOG_FILE, config.output / "tensorboard" if config.tensorboard else None
    )

    def add(row: dict[str, float]) -> None:
        log.add(row)
        report(row)

    resume = config.output / RESUME_FILE
    try:
        train(model, tokens, config.training, resume, add, config.save_every)
    finally:
        log.close()
    save_checkpoint(folder, model.cpu(), tokenizer)
    return folder


def _start(config: RunConfig) -> tuple[FWLModel, Tokenizer]:
    """Return the model that training starts from, and its tokenizer."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device here; use 'cpu'")
    if config.device not in ("cpu", "cuda"):
        raise ConfigError(f"device is '{config.device}'; expected 'cpu' or 'cuda'")
    if config.checkpoint is not None:
        loaded = load_checkpoint(Path(config.checkpoint))
        return loaded.model.to(config.device), loaded.tokenizer
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    sizes = ModelConfig(tokenizer.get_vocab_size(), config.backbone, config.fast_weights)
    torch.manual_seed(config.training.seed)
    model = FWLModel(sizes)
    initialize_steps(model)
    return model.to(config.device), tokenizer


def _tokens(config: RunConfig, tokenizer: Tokenizer) -> Tensor:
    """Return the token ids of all texts, one after the other, [N] int64."""
    parts = []
    for pattern in config.texts:
        path = Path(pattern)
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        if not files:
            raise ConfigError(
                f"texts: no file matches '{pattern}'; patterns are relative to the TOML file"
            )
        parts += [torch.from_numpy(read_ids(file, tokenizer)) for file in files]
    return torch.cat(parts)

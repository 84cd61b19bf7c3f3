"""Run a training that a TOML file describes, from texts to a checkpoint.

It starts from random weights, from a checkpoint, or from a language model of Hugging Face that gets
a new Fast Weight Layer. Where there is no tokenizer, it makes one from the texts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fwl_export.bundle.config import (
    BackboneConfig,
    FastWeightsConfig,
    KeyValueError,
    ModelConfig,
    config_from_dict,
    dotted_keys,
    unknown_key,
)
from fwl_export.bundle.manifest import bundle_checkpoint
from fwl_export.bundle.tokenizer import load_tokenizer, read_ids
from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.files import replaced_file
from fwl_export.json_files import read_bounded, shown
from fwl_export.model import source
from fwl_export.model.backbones import HuggingFaceBackbone
from fwl_export.model.checkpoint import (
    TOKENIZER_FILE,
    check_checkpoint_output,
    load_checkpoint,
    save_checkpoint,
)
from fwl_export.model.fwl_checkpoint import UNEMBEDDING
from fwl_export.model.language_model import FWLModel
from fwl_export.model.new_layer import start_near_identity
from fwl_export.model.pretrained import backbone_tokenizer
from fwl_export.model.training import TrainingConfig, initialize_steps, train
from fwl_export.model.training_files import TrainingLog
from fwl_export.model.training_tokenizer import DEFAULT_SIZE, check_size, train_tokenizer

RESUME_FILE, LOG_FILE, CHECKPOINT_FOLDER = "resume.safetensors", "log.csv", "checkpoint"

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
      tokenizer: Path of a tokenizer.json; None makes one from the texts, unless `checkpoint` or
        `pretrained` brings one.
      vocab_size: Number of entries of the tokenizer that is made, `vocab_size` of the table
        [tokenizer].
      checkpoint: Checkpoint whose weights training starts from; None starts from random weights.
      pretrained: The key `backbone`: folder or GGUF file of a language model of Hugging Face, which
        gets a new Fast Weight Layer.
      context: Number of tokens that full attention of `pretrained` sees, as in `export`.
      slide: Whether `pretrained` reads on past the context, as in `export`.
      save_every: Number of updates between two writes of the resume file.
      device: Device to train on, "cpu" or "cuda".
      tensorboard: Whether to write TensorBoard's files too.
      backbone: Backbone of a new model, the table [model.backbone]; missing keys have defaults.
      fast_weights: Fast Weight Layer of a new model, the table [model.fast_weights]; missing sizes
        are derived from the backbone.
      layer: Keys of that table that the new layer of `pretrained` gets instead of its usual ones.
      training: How to train, the table [training]; missing keys have defaults.
    """

    output: Path
    texts: tuple[str, ...]
    tokenizer: Path | None = None
    vocab_size: int = DEFAULT_SIZE
    checkpoint: Path | None = None
    pretrained: Path | None = None
    context: int | None = None
    slide: bool = False
    save_every: int = 50
    device: str = "cpu"
    tensorboard: bool = False
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fast_weights: FastWeightsConfig = field(default_factory=FastWeightsConfig)
    layer: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; expected 1 or more")
        check_size(self.vocab_size)


_TYPES: dict[str, tuple[type, str]] = {
    "output": (str, "a path"),
    "texts": (list, "a list of files or patterns"),
    "tokenizer": (str, "a path"),
    "checkpoint": (str, "a path"),
    "backbone": (str, "the path of a language model of Hugging Face"),
    "context": (int, "a whole number"),
    "slide": (bool, "true or false"),
    "save_every": (int, "a whole number"),
    "device": (str, '"cpu" or "cuda"'),
    "tensorboard": (bool, "true or false"),
}
_PATHS = ("output", "tokenizer", "checkpoint", "backbone")
_MODEL_TABLES = {"backbone": BackboneConfig, "fast_weights": FastWeightsConfig}
# Defaults on a pretrained backbone, whose predictions a new layer starts from: the usual learning
# rate makes noise of them within a few updates.
_ON_PRETRAINED = {"train_backbone": False, "learning_rate": 1e-4}
_TOKENIZER_KEY = "tokenizer.vocab_size"
_KNOWN = (
    *_TYPES,
    _TOKENIZER_KEY,
    *(key for name, kind in _MODEL_TABLES.items() for key in dotted_keys(kind, f"model.{name}.")),
    *dotted_keys(TrainingConfig, "training."),
)


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
    for key in data:
        if key not in (*_TYPES, "model", "training"):
            raise unknown_key(str(path), key, _KNOWN)
    size = _tokenizer_size(path, data)
    values = {key: _value(path, key, data[key]) for key in _TYPES if key in data}
    for key in ("output", "texts"):
        if not values.get(key):
            raise ConfigError(f"{path}: key '{key}' is missing or empty")
    if wrong := [text for text in values["texts"] if not isinstance(text, str)]:
        raise ConfigError(f"{path}: 'texts' has {shown(wrong[0])}; expected files or patterns")
    values["texts"] = tuple(str(path.parent / str(text)) for text in values["texts"])
    _check_start(path, data)
    training = data.get("training", {})
    if isinstance(training, dict) and "backbone" in values:
        training = {**_ON_PRETRAINED, **training}
    values["training"] = config_from_dict(
        TrainingConfig, training, str(path), "training.", partial=True, known=_KNOWN
    )
    values |= size
    if "backbone" in values:
        values["pretrained"] = values.pop("backbone")
    try:
        return RunConfig(**values, **_model_tables(path, data))
    except ConfigError as error:
        named = str(error).startswith(str(path))
        raise (error if named else ConfigError(f"{path}: {error}")) from None


def _value(path: Path, key: str, value: Any) -> Any:
    """Return the value of a key at the top of the file, with paths relative to the file."""
    kind, expected = _TYPES[key]
    if isinstance(value, dict) and key in _MODEL_TABLES:
        raise ConfigError(
            f"{path}: '{key}' is a table; expected {expected}. The table of a new backbone is "
            f"[model.{key}]"
        )
    if type(value) is not kind:
        raise ConfigError(f"{path}: '{key}' is {shown(value)}; expected {expected}")
    texts: list[Any] = value if isinstance(value, list) else [value]
    if any("\0" in str(text) for text in texts):
        raise ConfigError(f"{path}: '{key}' is {shown(value)}; expected no NUL in a path")
    # "demo" is not a path: it names the checkpoint that ships with the package.
    place = key in _PATHS and (key, value) != ("checkpoint", "demo")
    return path.parent / str(value) if place else value


def _tokenizer_size(path: Path, data: dict[str, Any]) -> dict[str, int]:
    """Take the table [tokenizer] out of the data; return the size that it has, if any."""
    table = data.get("tokenizer")
    if not isinstance(table, dict):
        return {}
    del data["tokenizer"]
    for key in table:
        if key != "vocab_size":
            raise unknown_key(str(path), f"tokenizer.{key}", _KNOWN)
    for key in ("checkpoint", "backbone"):
        if key in data:
            raise ConfigError(
                f"{path}: [tokenizer] makes a new tokenizer, but the '{key}' has its own; remove "
                "one of the two"
            )
    size = table.get("vocab_size", DEFAULT_SIZE)
    if type(size) is not int:
        raise ConfigError(f"{path}: '{_TOKENIZER_KEY}' is {shown(size)}; expected a whole number")
    return {"vocab_size": size}


def _check_start(path: Path, data: dict[str, Any]) -> None:
    """Check that the keys that say what training starts from do not contradict each other."""
    if "checkpoint" in data and "backbone" in data:
        raise ConfigError(
            f"{path}: 'checkpoint' is a whole model, and 'backbone' one that gets a new Fast "
            "Weight Layer; remove one of the two"
        )
    if "checkpoint" in data and ("tokenizer" in data or "model" in data):
        raise ConfigError(
            f"{path}: a 'checkpoint' has its own tokenizer and model; remove either 'checkpoint', "
            "or 'tokenizer' and [model]"
        )
    model = data.get("model")
    if "backbone" in data and (
        "tokenizer" in data or (isinstance(model, dict) and "backbone" in model)
    ):
        raise ConfigError(
            f"{path}: the 'backbone' has its own tokenizer and sizes; remove either 'backbone', or "
            "'tokenizer' and [model.backbone]"
        )
    for key in ("context", "slide"):
        if key in data and "backbone" not in data:
            raise ConfigError(f"{path}: '{key}' needs a 'backbone' of Hugging Face")


def _model_tables(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return the configs of backbone and fast weights, with sizes to fit the backbone."""
    tables = data.get("model", {})
    if not isinstance(tables, dict):
        raise ConfigError(
            f"{path}: 'model' has {shown(tables)}; expected the tables [model.backbone] and "
            "[model.fast_weights]"
        )
    for key in tables:
        if key not in _MODEL_TABLES:
            raise unknown_key(str(path), f"model.{key}", _KNOWN)
    layer = tables.get("fast_weights", {})
    if "backbone" in data:
        _layer_config(path, layer)
        return {"layer": layer}
    backbone = config_from_dict(
        BackboneConfig,
        tables.get("backbone", {}),
        str(path),
        "model.backbone.",
        partial=True,
        known=_KNOWN,
    )
    if isinstance(layer, dict):
        width = backbone.width
        sizes = {"input_size": width, "hidden_size": 4 * width, "output_size": width}
        layer = {**sizes, **layer}
    fast_weights = _layer_config(path, layer)
    try:
        ModelConfig(1, backbone, fast_weights)
    except KeyValueError as error:
        raise error.within(str(path), "model.") from None
    return {"backbone": backbone, "fast_weights": fast_weights}


def _layer_config(path: Path, table: Any) -> FastWeightsConfig:
    return config_from_dict(
        FastWeightsConfig, table, str(path), "model.fast_weights.", partial=True, known=_KNOWN
    )


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
    _check_device(config.device)
    files = _files(config.texts)
    model, tokenizer = _start(config, files, say)
    _check_lengths(config, model)
    tokens = torch.cat([torch.from_numpy(read_ids(file, tokenizer)) for file in files])
    _say_sizes(config, model, tokens, say)
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


def _say_sizes(
    config: RunConfig, model: FWLModel, tokens: Tensor, say: Callable[[str], None]
) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    frozen = "" if config.training.train_backbone else ", the backbone frozen"
    say(f"{count:,} parameters{frozen}, {len(tokens):,} tokens, {config.training.steps} updates")


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is '{device}'; expected 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device here; use 'cpu'")


def _check_lengths(config: RunConfig, model: FWLModel) -> None:
    """Check that a backbone that cannot read without end can read one text of a batch."""
    limit = model.config.backbone.max_positions
    length = config.training.sequence_length
    if limit and length > limit:
        raise ConfigError(
            f"training.sequence_length is {length}, but this backbone reads at most {limit} "
            f"tokens; set it to {limit} or less"
        )


def _start(
    config: RunConfig, files: Sequence[Path], say: Callable[[str], None]
) -> tuple[FWLModel, Tokenizer]:
    """Return the model that training starts from, and its tokenizer."""
    if config.checkpoint is not None:
        loaded = load_checkpoint(_checkpoint(config.checkpoint))
        return loaded.model.to(config.device), loaded.tokenizer
    torch.manual_seed(config.training.seed)
    if config.pretrained is not None:
        say(f"reading the backbone '{config.pretrained}'")
        model, tokenizer = _with_new_layer(config, config.pretrained)
        return model.to(config.device), tokenizer
    tokenizer = _tokenizer(config, files, say)
    size = max(tokenizer.get_vocab().values(), default=0) + 1  # its ids may have gaps
    sizes = ModelConfig(size, config.backbone, config.fast_weights)
    model = FWLModel(sizes)
    initialize_steps(model)
    return model.to(config.device), tokenizer


def _checkpoint(path: Path) -> Path:
    """Return the folder of the checkpoint that a path leads to: its own, or a bundle's.

    Raises:
      CheckpointError: It is something else, or a bundle without its checkpoint.
    """
    found = source.what_is(path)
    if found.kind == source.CHECKPOINT:
        return path
    if found.kind == source.BUNDLE:
        return bundle_checkpoint(path)
    if found.kind in (source.HUGGING_FACE, source.GGUF):
        raise CheckpointError(
            f"'checkpoint' '{path}' {found.what}; to train a new one on it, write `backbone = ` in "
            "place of `checkpoint = `"
        )
    raise found.refusal("'checkpoint'", "expected a checkpoint, as `fwl-export train` writes it")


def _with_new_layer(config: RunConfig, path: Path) -> tuple[FWLModel, Tokenizer]:
    """Return a pretrained backbone with a new Fast Weight Layer, and its tokenizer."""
    found = source.what_is(path)
    if found.kind in (source.CHECKPOINT, source.BUNDLE):
        raise CheckpointError(
            f"'backbone' '{path}' {found.what}, which has its layer; to train it on, write "
            "`checkpoint = ` in place of `backbone = `"
        )
    if found.kind not in (source.HUGGING_FACE, source.GGUF):
        raise found.refusal("'backbone'", "expected a language model of Hugging Face")
    model = FWLModel.from_pretrained(path, None, config.context, config.slide)
    if config.layer:
        model = _with_other_layer(model, config.layer)
    return model, backbone_tokenizer(path, model)


def _with_other_layer(model: FWLModel, changes: Mapping[str, Any]) -> FWLModel:
    """Return a model with a new layer whose configuration has other values for some keys."""
    assert isinstance(model.backbone, HuggingFaceBackbone)
    layer = replace(model.config.fast_weights, **changes)
    other = FWLModel(replace(model.config, fast_weights=layer), model.backbone)
    try:
        with torch.no_grad():
            for name in UNEMBEDDING:
                other.get_parameter(f"fast_weights.{name}").copy_(
                    model.get_parameter(f"fast_weights.{name}")
                )
        start_near_identity(other.fast_weights, model.backbone)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None
    return other


def _tokenizer(config: RunConfig, files: Sequence[Path], say: Callable[[str], None]) -> Tokenizer:
    """Return the tokenizer of a new model: a file's, an earlier part of the run's, or a new one."""
    if config.tokenizer is not None:
        if not config.tokenizer.exists():
            raise ConfigError(
                f"'tokenizer' '{config.tokenizer}' does not exist; leave the key out to make a "
                "tokenizer from the texts"
            )
        return load_tokenizer(config.tokenizer)
    path = config.output / TOKENIZER_FILE
    # Before the first resume file, it is made again: the texts may have changed meanwhile.
    if path.is_file() and (config.output / RESUME_FILE).is_file():
        tokenizer = load_tokenizer(path)
        if (size := tokenizer.get_vocab_size()) != config.vocab_size:
            raise CheckpointError(
                f"'{path}' has {size} entries, but tokenizer.vocab_size is {config.vocab_size}; "
                f"train with {size} to resume the run, or remove '{config.output}' to start again"
            )
        return tokenizer
    tokenizer = train_tokenizer(files, config.vocab_size)
    config.output.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as beside:
        tokenizer.save(str(beside))
    say(f"made a tokenizer of {config.vocab_size} entries from the texts: {path}")
    return tokenizer


def _files(patterns: Sequence[str]) -> list[Path]:
    """Return the files of all patterns, those of each in order of their names."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        if not files:
            raise ConfigError(
                f"texts: no file matches '{pattern}'; patterns are relative to the TOML file"
            )
        found += files
    return found

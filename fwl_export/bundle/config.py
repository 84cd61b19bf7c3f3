"""Configuration of a Fast Weight Layer language model, as stored in a checkpoint's config.json.

It can express both published variants: the TensorFlow code (updates the biases of dense layers, has
six step sizes and no epsilon in the norm) and the JAX code (does not update these biases, has one
step size per layer, and uses the framework's epsilon).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fwl_export.errors import ConfigError
from fwl_export.json_files import check_schema, shown, typed

SCHEMA_VERSION = 1
OLD_SCHEMA = "write the file again or update fwl-export"

# Keys that were added to this schema later; without them a file means their defaults.
_ADDED_LATER = ("anchor_interval", "logit_softcap")

# No published model comes near these sizes; sizes beyond them would only exhaust memory or time.
_LARGEST = {
    "vocab_size": 1 << 24,
    **dict.fromkeys(("width", "input_size", "hidden_size", "output_size"), 1 << 20),
    "layers": 1 << 10,
    "heads": 1 << 16,
    "window": 1 << 24,
    "mlp_ratio": 1 << 10,
}
_LARGEST_FACTOR = 1e30
# Settings of transformers by which modules are made one after another, which takes time for each.
_COUNTS_MODULES = re.compile(r"^n(um)?_(\w+_)?(layer|expert|block)s?$")
_MOST_MODULES = 1 << 12
_LARGEST_POSITION = 1 << 40

# Names are taken for misspellings of each other from this similarity on, see `difflib`.
_ALIKE = 0.6
_LONGEST_NAME = 64

_Dataclass = typing.TypeVar("_Dataclass")


class KeyValueError(ConfigError):
    """A value of a configuration is out of range.

    Attributes:
      key: Name of its key, without that of the section.
      problem: What is wrong with it; follows the key in a sentence.
    """

    def __init__(self, section: str, key: str, problem: str) -> None:
        """Describe what is wrong.

        Args:
          section: Prefix of the key, such as "backbone.".
          key: See the attribute.
          problem: See the attribute.
        """
        super().__init__(f"{section}{key} {problem}")
        self.key = key
        self.problem = problem

    def within(self, source: str, section: str) -> ConfigError:
        """Return the error with the full name of the key in its file.

        Args:
          source: Name of the origin in the message, e.g. the file's path; "" names none.
          section: Prefix of the key there, such as "model.backbone.".
        """
        return ConfigError(f"{source}{': ' if source else ''}{section}{self.key} {self.problem}")


@dataclass(frozen=True)
class BackboneConfig:
    """A small decoder-only transformer with rotary positions and a sliding attention window.

    Attributes:
      type: Name of the backbone class that builds it, see `fwl_export.model.backbones`.
      width: Size of the hidden state.
      layers: Number of transformer blocks.
      heads: Number of attention heads; `width / heads` must be even, for rotary pairs.
      window: Attention window in tokens: a token attends to itself and `window - 1` before it.
      mlp_ratio: Size of a block's MLP relative to `width`.
      norm: Kind of norm before each sublayer and after the last block: "rms" or "layer".
      norm_epsilon: Number added to the mean square, or the variance, inside that norm.
      rotary_base: Base of the geometric series of rotary frequencies.
    """

    type: Literal["decoder"] = "decoder"
    width: int = 192
    layers: int = 4
    heads: int = 6
    window: int = 128
    mlp_ratio: int = 4
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    rotary_base: float = 10000.0

    def __post_init__(self) -> None:
        _positive(self, "width", "layers", "heads", "window", "mlp_ratio", "rotary_base")
        if not 0 <= self.norm_epsilon <= _LARGEST_FACTOR:
            raise _not_0_or_more(self, "norm_epsilon")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise KeyValueError(
                _section(self),
                "width",
                f"{self.width} divided by {self.heads} heads is {self.width / self.heads:g}; "
                "expected an even whole number",
            )

    @property
    def max_positions(self) -> int:
        """Tokens that a session may read in all: 0, since this backbone has no limit."""
        return 0


@dataclass(frozen=True)
class HuggingFaceConfig:
    """A decoder-only language model from Hugging Face's transformers, without its head.

    Attributes:
      type: Name of the backbone class, see `BackboneConfig`.
      width: Size of the hidden state that goes into the head.
      window: Attention window, in tokens, of layers with full attention: a token sees itself and
        `window - 1` before it. In a model without such layers, the largest sliding window.
      max_positions: Tokens that a session may read in all; 0 means no limit.
      tied: Whether the head shares the weights of the token embedding.
      model: Configuration of the model in transformers, as from `PretrainedConfig.to_dict`.
    """

    type: Literal["huggingface"]
    width: int
    window: int
    max_positions: int
    tied: bool
    model: dict[str, Any]

    def __post_init__(self) -> None:
        _positive(self, "width", "window")
        if not 0 <= self.max_positions <= _LARGEST_POSITION:
            raise _not_0_or_more(self, "max_positions", f", and at most {_LARGEST_POSITION}")
        if not isinstance(self.model.get("model_type"), str):
            raise ConfigError(
                "backbone.model has no model_type; expected a configuration of transformers"
            )
        check_module_counts(self.model, "backbone.model")


AnyBackboneConfig = BackboneConfig | HuggingFaceConfig


@dataclass(frozen=True)
class FastWeightsConfig:
    """The Fast Weight Layer (Clark et al., EMNLP 2022, section 3).

    Attributes:
      input_size: Size of the backbone's hidden state h.
      hidden_size: Number of columns of W1 and rows of W2.
      output_size: Size of z, the input of the unembedding.
      update_dense_bias: Whether the biases b1 and b2 learn too (TensorFlow: yes, JAX: no).
      step_sizes: Which step sizes there are: "per_tensor" (six) or "per_layer" (three: up, down,
        norm).
      step_size_shape: Shape of the kernels' step sizes: "scalar", or "input" for one value per
        input feature. The latter extends the paper; it only scales the query, which is free.
      norm_epsilon: Epsilon inside the layer norm's square root (TensorFlow: 0, JAX: 1e-6).
      loss_normalizer: The constant N of the loss, by which step sizes are divided.
      decay: How the sums of updates fade. "learned": by exp(-weight / horizon) per token, where
        the checkpoint holds the horizon, in tokens. "none": never, as in the paper.
      anchor_interval: Tokens between two anchors; 0 means none. With anchors, gradients are taken
        at the weights as of the last position divisible by this number, so that the model does not
        learn again what it has learned already. This extends the paper, as in mini-batch test-time
        training (arXiv 2407.04620). Without, gradients are taken at the slow weights, as in it.
      logit_softcap: Soft limit of the logits, softcap * tanh((z U + c) / softcap), as in Gemma 2;
        0 means none: z U + c.
    """

    input_size: int = 192
    hidden_size: int = 768
    output_size: int = 192
    update_dense_bias: bool = True
    step_sizes: Literal["per_tensor", "per_layer"] = "per_tensor"
    step_size_shape: Literal["scalar", "input"] = "scalar"
    norm_epsilon: float = 1e-6
    loss_normalizer: float = 1.0
    decay: Literal["learned", "none"] = "learned"
    anchor_interval: int = 0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "input_size", "hidden_size", "output_size", "loss_normalizer")
        if not 0 <= self.norm_epsilon <= _LARGEST_FACTOR:
            raise _not_0_or_more(self, "norm_epsilon")
        if not 0 <= self.anchor_interval <= _LARGEST_POSITION:
            raise _not_0_or_more(self, "anchor_interval")
        if not 0 <= self.logit_softcap <= _LARGEST_FACTOR:
            raise _not_0_or_more(self, "logit_softcap")
        if self.step_size_shape == "input" and self.step_sizes == "per_layer":
            raise KeyValueError(
                _section(self),
                "step_size_shape",
                "'input' needs step_sizes 'per_tensor': a kernel and a bias cannot share one step "
                "size per input feature",
            )


@dataclass(frozen=True)
class ModelConfig:
    """A language model: a backbone and, on top of it, a Fast Weight Layer.

    Attributes:
      vocab_size: Number of token ids, V.
      backbone: Configuration of the network below the Fast Weight Layer.
      fast_weights: Configuration of the Fast Weight Layer.
    """

    vocab_size: int = 2048
    backbone: AnyBackboneConfig = field(default_factory=BackboneConfig)
    fast_weights: FastWeightsConfig = field(default_factory=FastWeightsConfig)

    def __post_init__(self) -> None:
        _positive(self, "vocab_size")
        if self.fast_weights.input_size != self.backbone.width:
            raise KeyValueError(
                "",
                "fast_weights.input_size",
                f"is {self.fast_weights.input_size}, but the backbone's width is "
                f"{self.backbone.width}; they must be equal",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as data for JSON, with its schema version."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Any, source: str = "config") -> ModelConfig:
        """Read what `to_dict` wrote.

        Args:
          data: Parsed JSON.
          source: Name of its origin in error messages, e.g. the file's path.

        Raises:
          ConfigError: A key is unknown or missing, a value has the wrong type or is out of range,
            or the schema version is not the one that this version of fwl-export reads.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected a JSON object, got {type(data).__name__}")
        check_schema(data, SCHEMA_VERSION, source, ConfigError, OLD_SCHEMA)
        values = {key: value for key, value in data.items() if key != "schema_version"}
        return _build(cls, values, source, "", dotted_keys(cls))


def different_key(config: ModelConfig, other: ModelConfig) -> tuple[str, Any, Any] | None:
    """Return the first key in which two configurations differ and its two values, or None.

    Args:
      config: A configuration, whose value comes first.
      other: Another configuration.
    """
    first, second = (_flat(dataclasses.asdict(each), "") for each in (config, other))
    for key in (*first, *second):
        if first.get(key) != second.get(key):
            return key, first.get(key), second.get(key)
    return None


def _flat(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return nested mappings as one, with the keys' full names."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def check_module_counts(model: Mapping[str, Any], source: str) -> None:
    """Check that a configuration of transformers asks for no endless number of layers or experts.

    Args:
      model: Configuration of the model in transformers, which may have configurations inside.
      source: Name of its origin in error messages.

    Raises:
      ConfigError: It asks for more than any model has.
    """
    for key, value in model.items():
        if isinstance(value, dict):
            check_module_counts(value, f"{source}.{key}")
        elif _COUNTS_MODULES.search(key) and isinstance(value, int) and value > _MOST_MODULES:
            raise ConfigError(f"{source}.{key} is {value}; expected at most {_MOST_MODULES}")


def config_from_dict(
    cls: type[_Dataclass],
    data: Any,
    source: str,
    prefix: str,
    partial: bool = False,
    known: Collection[str] = (),
) -> _Dataclass:
    """Build a part of a configuration, e.g. `FastWeightsConfig`, from parsed JSON or TOML.

    Args:
      cls: Dataclass of the part.
      data: Mapping with the part's keys.
      source: Name of its origin in error messages, e.g. the file's path.
      prefix: Prefix of the part's keys in error messages, e.g. "fast_weights.".
      partial: Whether missing keys take their defaults, instead of being an error.
      known: Full names of all keys of the file, see `unknown_key`; default: those of the part.

    Raises:
      ConfigError: See `ModelConfig.from_dict`.
    """
    return _build(cls, data, source, prefix, known or dotted_keys(cls, prefix), partial)


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Return the full names of all keys of a configuration, such as "backbone.width".

    Args:
      cls: Dataclass of the configuration.
      prefix: Prefix of all names.
    """
    names: dict[str, None] = {}
    for key, hint in typing.get_type_hints(cls).items():
        parts = typing.get_args(hint) if hint == AnyBackboneConfig else (hint,)
        for part in parts:
            is_part = dataclasses.is_dataclass(part)
            inner = dotted_keys(typing.cast(type, part), f"{prefix}{key}.") if is_part else []
            names |= dict.fromkeys(inner or [f"{prefix}{key}"])
    return list(names)


def unknown_key(source: str, key: str, known: Collection[str]) -> ConfigError:
    """Return the error for a key that does not exist; it names the one that may be meant.

    Args:
      source: Name of the key's origin in the message, e.g. the file's path.
      key: Full name of the key, such as "training.stepz".
      known: Full names of all keys of the file. One of another section may be meant too.
    """
    section, _, name = key.rpartition(".")
    here = {
        k.removeprefix(f"{section}." if section else "").partition(".")[0]
        for k in known
        if not section or k.startswith(f"{section}.")
    }
    meant = _nearest(section, name.lower().replace("-", "_")[:_LONGEST_NAME], known)
    guess = f"did you mean '{meant}'? Known keys" if meant else "known keys"
    return ConfigError(
        f"{source}: unknown key '{shown(key)[1:-1]}'; {guess}: {', '.join(sorted(here))}"
    )


def _nearest(section: str, name: str, known: Collection[str]) -> str:
    """Return the full name of the key that is most like a name, preferably of a section, or ""."""

    def likeness(key: str) -> tuple[float, bool]:
        its_section, _, its_name = key.rpartition(".")
        is_short_for = name == "".join(word[0] for word in its_name.split("_"))  # lr: learning_rate
        alike = difflib.SequenceMatcher(None, name, its_name).ratio()
        return max(alike, _ALIKE * is_short_for), its_section == section

    best = max(known, key=likeness, default="")
    return best if best and likeness(best)[0] >= _ALIKE else ""


def _build(
    cls: type[_Dataclass],
    data: Any,
    source: str,
    prefix: str,
    known: Collection[str],
    partial: bool = False,
) -> _Dataclass:
    """Build a configuration dataclass from parsed JSON, checking every key and type."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: '{prefix.rstrip('.')}' must be an object, got {shown(data)}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise unknown_key(source, f"{prefix}{key}", known)
    parts: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for key, hint in hints.items():
        if key not in data and (partial or key in _ADDED_LATER):
            continue
        if key not in data:
            raise ConfigError(f"{source}: key '{prefix}{key}' is missing")
        part = _backbone_class(data[key], source) if hint == AnyBackboneConfig else hint
        if dataclasses.is_dataclass(part):
            parts[key] = _build(
                typing.cast(type, part), data[key], source, f"{prefix}{key}.", known, partial
            )
        else:
            scalars[key] = hint
    kind = typing.TypedDict(cls.__name__, scalars, total=False)  # type: ignore[misc] # the class's
    values = typed(data, kind, source, ConfigError, prefix=prefix)
    try:
        return cls(**values, **parts)
    except KeyValueError as error:
        raise error.within(source, prefix) from None


def _backbone_class(data: Any, source: str) -> type[AnyBackboneConfig]:
    kinds = {"decoder": BackboneConfig, "huggingface": HuggingFaceConfig}
    kind = data.get("type", "decoder") if isinstance(data, dict) else "decoder"
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(
            f"{source}: 'backbone.type' is {shown(kind)}; expected {' or '.join(map(repr, kinds))}"
        )
    return kinds[kind]


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value, largest = getattr(config, name), _LARGEST.get(name, _LARGEST_FACTOR)
        if not 0 < value <= largest:
            expected = "more than 0" if not value > 0 else f"at most {largest}"
            raise KeyValueError(_section(config), name, f"is {shown(value)}; expected {expected}")


def _not_0_or_more(config: Any, name: str, more: str = "") -> KeyValueError:
    problem = f"is {getattr(config, name)}; expected 0 or more{more}"
    return KeyValueError(_section(config), name, problem)


def _section(config: Any) -> str:
    """Return the prefix that the keys of a part have in a config.json."""
    if isinstance(config, ModelConfig):
        return ""
    return "fast_weights." if isinstance(config, FastWeightsConfig) else "backbone."

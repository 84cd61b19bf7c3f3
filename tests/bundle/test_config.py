"""Configurations: a round trip through JSON, and errors that name the wrong key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.errors import ConfigError


def changed(path: str, value: Any) -> dict[str, Any]:
    data = ModelConfig().to_dict()
    *sections, key = path.split(".")
    inner = data
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return data


def test_round_trip() -> None:
    config = ModelConfig(64, BackboneConfig(width=16, heads=2), FastWeightsConfig(16, 32, 12))
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "vocab_sise",
            3,
            "unknown key 'vocab_sise'; did you mean 'vocab_size'? Known keys: backbone, fast_weig",
        ),
        ("backbone.with", 3, "unknown key 'backbone.with'; did you mean 'backbone.width'?"),
        ("hidden_size", 3, "unknown key 'hidden_size'; did you mean 'fast_weights.hidden_size'?"),
        ("qwxz", 3, "unknown key 'qwxz'; known keys: backbone, fast_weights, vocab_size"),
        ("vocab_size", "2048", "'vocab_size' is '2048'; expected int"),
        ("vocab_size", 0, "config.json: vocab_size is 0; expected more than 0"),
        ("backbone.width", 0, "config.json: backbone.width is 0; expected more than 0"),
        ("vocab_size", True, "expected int"),
        ("backbone.norm", "batch", "'backbone.norm' is 'batch'; expected 'rms' or 'layer'"),
        ("backbone.heads", 5, "192 divided by 5 heads is 38.4; expected an even whole number"),
        ("backbone", 3, "'backbone' must be an object, got 3"),
        ("fast_weights.input_size", 191, "input_size is 191, but the backbone's width is 192"),
        ("fast_weights.norm_epsilon", -1.0, "norm_epsilon is -1.0; expected 0 or more"),
        ("fast_weights.loss_normalizer", 0.0, "loss_normalizer is 0.0; expected more than 0"),
        ("schema_version", 2, "schema_version is 2, but this fwl-export reads 1"),
    ],
)
def test_a_wrong_value_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig.from_dict(changed(path, value), "config.json")


def test_a_missing_key_is_named() -> None:
    data = ModelConfig().to_dict()
    del data["fast_weights"]["decay"]
    with pytest.raises(ConfigError, match=r"config: key 'fast_weights\.decay' is missing"):
        ModelConfig.from_dict(data)


def test_a_step_per_feature_needs_a_step_per_tensor() -> None:
    with pytest.raises(ConfigError, match="needs step_sizes 'per_tensor'"):
        FastWeightsConfig(step_size_shape="input", step_sizes="per_layer")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_something_other_than_an_object(data: Any) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        ModelConfig.from_dict(data)


def test_a_file_without_an_anchor_interval_has_no_anchors() -> None:
    data = ModelConfig().to_dict()
    del data["fast_weights"]["anchor_interval"]
    assert ModelConfig.from_dict(data).fast_weights.anchor_interval == 0


def test_an_anchor_interval_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="anchor_interval is -1; expected 0 or more"):
        FastWeightsConfig(anchor_interval=-1)

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.model.fwl_checkpoint import (
    FastWeightsCheckpoint,
    load_fast_weights,
    save_fast_weights,
)
from tests.bundles import VOCABULARY, tiny_model, write_checkpoint


def checkpoint() -> FastWeightsCheckpoint:
    layer = tiny_model().fast_weights
    return FastWeightsCheckpoint(layer.config, layer.state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_fast_weights(tmp_path / "layer", checkpoint())
    return tmp_path / "layer"


def fails(folder: Path, message: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        load_fast_weights(folder)


def without_unembedding() -> FastWeightsCheckpoint:
    whole = checkpoint()
    kept = {n: t for n, t in whole.tensors.items() if not n.startswith("unembed")}
    return FastWeightsCheckpoint(whole.config, kept)


@pytest.mark.parametrize(
    ("saved", "vocabulary"), [(checkpoint, VOCABULARY), (without_unembedding, None)]
)
def test_round_trip(tmp_path: Path, saved, vocabulary: int | None) -> None:
    save_fast_weights(tmp_path / "layer", saved())
    loaded = load_fast_weights(tmp_path / "layer")
    assert loaded.config == saved().config
    assert loaded.vocab_size == vocabulary
    assert set(loaded.tensors) == set(saved().tensors)
    for name, tensor in saved().tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fails(folder, f"has no {name}; expected the folder of a Fast Weight Layer, with")


def test_tensors_that_do_not_fit(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "unembed_bias"}, path)
    fails(folder, "lacks 1 of the tensors that config.json requires, e.g. 'unembed_bias'")
    save_file({**tensors, "unembed": torch.zeros(VOCABULARY, 15)}, path)
    fails(folder, "'unembed' has shape [64, 15], but config.json requires [64, 16]")
    save_file({**tensors, "down_bias": torch.full((16,), torch.inf)}, path)
    fails(folder, "'down_bias' holds NaN or infinite values")


def test_a_config_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    fails(
        write_checkpoint(tmp_path / "whole"),
        "folder of a Fast Weight Layer alone",
        ConfigError,
    )
    path = folder / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "schema_version": 99}))
    fails(folder, "schema_version is 99, but this fwl-export reads", ConfigError)
    del data["fast_weights"]["hidden_size"]
    path.write_text(json.dumps(data))
    fails(folder, "key 'fast_weights.hidden_size' is missing", ConfigError)

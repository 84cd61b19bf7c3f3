from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.model.checkpoint import load_checkpoint, save_checkpoint
from tests.bundles import tiny_model, tiny_tokenizer, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def fails(folder: Path, message: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        load_checkpoint(folder)


def test_round_trip(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer.encode("AB").ids == [33, 34]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fails(folder, f"has no {name}; a checkpoint holds config.json, model.safetensors and")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    fails(
        tmp_path / "nothing",
        "does not exist; expected a folder with config.json",
    )


@pytest.mark.parametrize("size", [0, 5, 100, 3000, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(folder, "if it is truncated, copy it again")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_truncated_json(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    fails(folder, "is not JSON" if name == "config.json" else "is not a tokenizer file")


def test_an_unknown_config_key(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "dropout": 0.1}))
    fails(folder, "config.json: unknown key 'dropout'", ConfigError)


def test_a_tokenizer_of_another_size(folder: Path) -> None:
    tiny_tokenizer(90).save(str(folder / "tokenizer.json"))
    fails(
        folder, "has 90 entries, of which 26 have ids of 64 and more, but the model's ids end at 63"
    )


def test_weights_that_do_not_fit(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "fast_weights.up_bias"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    fails(folder, f"lacks 1 of the tensors that config.json requires, e.g. '{name}'")
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    fails(folder, "holds tensors that config.json does not provide for (1, e.g. 'extra')")
    save_file({**tensors, name: torch.zeros(31)}, path)
    fails(folder, f"'{name}' has shape [31], but config.json requires [32]")
    save_file({**tensors, name: torch.full((32,), np.nan)}, path)
    fails(folder, f"'{name}' holds NaN or infinite values")
    save_file({**tensors, "fast_weights.horizon": torch.tensor(0.0)}, path)
    fails(folder, "'fast_weights.horizon' is 0; expected a number of tokens above 0")


def test_a_failed_write_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fwl_export.model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, tiny_model(1), tiny_tokenizer())
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_what_else_the_model_says_about_text_is_carried_on(folder: Path, tmp_path: Path) -> None:
    contents = {
        "tokenizer_config.json": {"eos_token": "A", "model_max_length": 10**30},
        "generation_config.json": {"eos_token_id": [3, 4]},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "notes.txt").write_text("not carried on")
    loaded = load_checkpoint(folder)
    save_checkpoint(tmp_path / "again", loaded.model, loaded.tokenizer)
    names = {"config.json", "model.safetensors", "tokenizer.json", *contents, "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in (*contents, "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    (folder / "generation_config.json").write_text("[")
    fails(folder, "generation_config.json is not JSON")

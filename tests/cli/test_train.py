"""`fwl-export train` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bundles import tiny_tokenizer
from tests.cli.run import run

CONFIG = """
output = "run"
texts = ["text.txt"]
tokenizer = "tokenizer.json"
[model.backbone]
width = 16
heads = 2
layers = 1
[training]
steps = 4
sequence_length = 20
"""


def test_train_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("THE QUICK BROWN FOX. " * 5)
    (tmp_path / "train.toml").write_text(CONFIG)
    result = run(capsys, "train", tmp_path / "train.toml", "--json")
    assert result.code == 0, result.err
    assert "105 tokens, 4 updates" in result.err
    assert "update 4 of 4: loss " in result.err
    data = json.loads(result.out)
    assert data["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    assert data["last"]["step"] == 3
    again = run(capsys, "train", tmp_path / "train.toml")
    assert again.code == 0
    assert "wrote" in again.out
    (tmp_path / "train.toml").write_text(CONFIG + 'seed = "a"\n')
    result = run(capsys, "train", tmp_path / "train.toml")
    assert result.code == 1
    assert "error: " in result.err
    assert "'training.seed' is 'a'; expected int" in result.err
    assert "No such file" in run(capsys, "train", tmp_path / "none.toml").err


def test_a_run_without_a_tokenizer_and_with_a_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.replace('tokenizer = "tokenizer.json"\n', "")
    (tmp_path / "text.txt").write_text("the quick brown fox, the lazy dog. " * 30)
    (tmp_path / "train.toml").write_text(text)
    result = run(capsys, "train", tmp_path / "train.toml")
    assert result.code == 1
    assert "repeat too little for a tokenizer of 2048 entries" in result.err
    (tmp_path / "train.toml").write_text(text + "[tokenizer]\nvocab_size = 270\n")
    result = run(capsys, "train", tmp_path / "train.toml")
    assert result.code == 0, result.err
    assert f"made a tokenizer of 270 entries from the texts: {tmp_path}/run/token" in result.err
    (tmp_path / "train.toml").write_text("sequence_length = 20\n" + text)
    result = run(capsys, "train", tmp_path / "train.toml")
    assert result.code == 1
    assert "unknown key 'sequence_length'; did you mean 'training.sequence_length'?" in result.err

"""`fwl-export import`: the layer alone, and on a backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.fwl_checkpoint import load_fast_weights
from tests.bundles import write_checkpoint
from tests.cli.run import run
from tests.importers.test_paper import jax_tree

DATA = Path(__file__).parents[1] / "data" / "importers"


@pytest.mark.parametrize(
    ("framework", "source"), [("jax", "jax.msgpack"), ("jax", "jax_orbax"), ("tf", "tf_checkpoint")]
)
def test_import_of_the_layer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], framework: str, source: str
) -> None:
    command = ("import", framework, DATA / source, "-o", tmp_path / "out")
    result = run(capsys, *command)
    assert result.code == 1
    assert result.err.count("\n") == 2
    assert "error: --loss-normalizer is missing" in result.err
    assert not (tmp_path / "out").exists()
    result = run(capsys, *command, "--loss-normalizer", 40)
    assert result.code == 0, result.err
    assert "Fast Weight Layer alone, 6 to 20 to 5,\na 17-entry unembedding" in result.out
    assert load_fast_weights(tmp_path / "out").vocab_size == 17
    assert "pass --force" in run(capsys, *command, "--loss-normalizer", 40).err
    assert run(capsys, *command, "--loss-normalizer", 40, "--force").code == 0


def test_import_on_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", **jax_tree())
    base = write_checkpoint(tmp_path / "base")
    command = ("import", "jax", tmp_path / "a.npz", "--loss-normalizer", 40, "--backbone", base)
    result = run(capsys, *command, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "on the backbone of" in result.out
    assert load_checkpoint(tmp_path / "out").config.fast_weights.hidden_size == 12
    result = run(capsys, *command, "-o", tmp_path, "--force")
    assert result.code == 1
    assert "exists and is not a checkpoint; choose another name" in result.err


@pytest.mark.parametrize("arguments", [[], ["jax"], ["tf"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    result = run(capsys, "import", *arguments, "--help")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 80
    assert not arguments or f"Example:\n    fwl-export import {arguments[0]}" in result.out

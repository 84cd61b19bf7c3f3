"""A bundle is compared with weights that its receiver trusts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fwl_export.bundle.manifest import read_bundle
from fwl_export.errors import BundleError, CheckpointError
from fwl_export.export import export_bundle
from fwl_export.model.pretrained import join_checkpoint
from fwl_export.parity import check_bundle
from fwl_export.parity.trusted import same_tokenizer, with_trusted_weights
from tests.backbones import tiny_pretrained, write_backbone, write_layer
from tests.bundles import ANCHORED, tiny_tokenizer, without_checkpoint, write_checkpoint
from tests.parity import faults

OPTIONS = {"tokens": 40, "cases": "text", "candidates": "onnxruntime"}


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, 130)


def test_a_forged_bundle_is_right_by_its_own_weights_only(
    tiny_bundle: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    """The forger has changed a weight everywhere, and writes hashes that fit."""
    name = "fast_weights.up_kernel"
    changes = faults.weight("up_kernel", (3, 5), added=0.1)
    bundle = faults.broken_bundle(tiny_bundle, tmp_path / "forged", changes)
    weights = bundle.checkpoint / "model.safetensors"
    tensors = load_file(weights)
    tensors[name][3, 5] += 0.1
    save_file(tensors, weights)
    bundle = bundle.add_files(["checkpoint/model.safetensors"])
    assert check_bundle(bundle, ids, **OPTIONS).passed
    report = check_bundle(with_trusted_weights(bundle, tiny_bundle), ids, **OPTIONS)
    assert report.status == "outside"


def test_a_bundle_without_a_checkpoint(tiny_bundle: Path, ids: np.ndarray, tmp_path: Path) -> None:
    mine = tiny_bundle / "checkpoint"
    bundle = read_bundle(without_checkpoint(tiny_bundle, tmp_path / "bare"))
    with pytest.raises(BundleError, match="also takes --checkpoint FOLDER, or a recorded trace"):
        check_bundle(bundle, ids, **OPTIONS)
    for source in (mine, tiny_bundle):  # a checkpoint, and a bundle that is trusted
        trusted = with_trusted_weights(bundle, source)
        assert check_bundle(trusted, ids, **OPTIONS).passed
        assert same_tokenizer(trusted)
    assert not (bundle.folder / "checkpoint").exists()


def test_weights_that_change_meanwhile_are_refused(
    tiny_bundle: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(tiny_bundle / "checkpoint", tmp_path / "mine"))
    trusted = with_trusted_weights(read_bundle(tiny_bundle), mine)
    write_checkpoint(mine, seed=1)
    with pytest.raises(BundleError, match="was changed or truncated"):
        check_bundle(trusted, ids, **OPTIONS)


def test_another_configuration_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    other = write_checkpoint(tmp_path / "anchored", config=ANCHORED)
    layer = write_layer(tmp_path / "layer", tiny_pretrained("Llama"))
    llama = write_backbone(tmp_path / "llama", "Llama")
    for path, message in (
        (
            other,
            "is not of this bundle's model: fast_weights.anchor_interval is 12, but 0 in",
        ),
        (layer, "is a Fast Weight Layer alone"),
        (llama, "is a language model of Hugging Face, but the bundle's backbone is a decoder"),
        (tmp_path / "none", "--checkpoint '{}' does not exist; expected a folder with config.json"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message.replace("{}", str(path)))):
            with_trusted_weights(bundle, path, scratch=tmp_path / "scratch")
    with pytest.raises(CheckpointError, match="--fwl needs a language model of Hugging Face as"):
        with_trusted_weights(bundle, tiny_bundle / "checkpoint", layer)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2, sliding layers"])
def test_a_language_model_and_its_layer(name: str, ids: np.ndarray, tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone", name)
    layer = write_layer(tmp_path / "layer", tiny_pretrained(name))
    options = {} if name == "Mistral" else {"context": 60, "slide": "Qwen2" in name}
    join_checkpoint(backbone, layer, tmp_path / "joined", **options)
    bundle = export_bundle(
        tmp_path / "joined", tmp_path / "bundle", include_checkpoint=False, max_tokens=16
    )
    trusted = with_trusted_weights(bundle, backbone, layer, tmp_path / "scratch")
    assert check_bundle(trusted, ids, **OPTIONS).passed


def test_another_tokenizer_is_noticed(tiny_bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(tiny_bundle / "checkpoint", tmp_path / "mine"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([" "])
    tokenizer.save(str(mine / "tokenizer.json"))
    assert not same_tokenizer(with_trusted_weights(read_bundle(tiny_bundle), mine))

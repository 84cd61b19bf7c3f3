"""Tiny random checkpoints and bundles for tests."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.bundle.manifest import read_bundle, write_manifest
from fwl_export.export import export_bundle
from fwl_export.model.checkpoint import save_checkpoint
from fwl_export.model.language_model import FWLModel

VOCABULARY = 64
MAX_TOKENS = 16

TINY = ModelConfig(
    VOCABULARY,
    BackboneConfig(width=16, layers=2, heads=2, window=8),
    FastWeightsConfig(input_size=16, hidden_size=32, output_size=16),
)


# The interval is not a multiple of MAX_TOKENS, so calls end at varying distances from an anchor.
ANCHORED = dataclasses.replace(
    TINY, fast_weights=dataclasses.replace(TINY.fast_weights, anchor_interval=12)
)

# As small, but called as the demo model is: in calls of up to 256 tokens, with anchors, a window
# and ring buffers of the same sizes, so that the same calls of a check reach the same places.
CALLED_AS_THE_DEMO = ModelConfig(
    2048,
    dataclasses.replace(TINY.backbone, window=128),
    dataclasses.replace(TINY.fast_weights, anchor_interval=256),
)


def tiny_tokenizer(size: int = VOCABULARY) -> Tokenizer:
    """Return a tokenizer whose tokens are the `size` ASCII characters that start with the space."""
    vocabulary = {chr(32 + i): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def tiny_model(seed: int = 0, config: ModelConfig = TINY) -> FWLModel:
    """Return a random model whose fast weights clearly change its logits."""
    torch.manual_seed(seed)
    model = FWLModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn_like(parameter) * 0.25)
    for step in model.fast_weights.steps.values():
        step.fill_(0.05)
    model.fast_weights.horizon.fill_(30.0)
    return model


def write_checkpoint(folder: Path, seed: int = 0, config: ModelConfig = TINY) -> Path:
    """Write a tiny checkpoint and return its folder."""
    save_checkpoint(folder, tiny_model(seed, config), tiny_tokenizer(config.vocab_size))
    return folder


def write_bundle(
    folder: Path, checkpoint: Path, precision: str = "fp32", max_tokens: int = MAX_TOKENS
) -> Path:
    """Export a checkpoint to a tiny bundle and return its folder. This takes some seconds."""
    export_bundle(checkpoint, folder, precision=precision, max_tokens=max_tokens)
    return folder


def shared_bundle(base: Path, precision: str, config: ModelConfig = TINY) -> Path:
    """Return a tiny bundle in `base`. Test processes share it; the first one to ask writes it."""
    name = f"{'tiny' if config is TINY else 'anchored'}-{precision}"
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not folder.exists():
            checkpoint = write_checkpoint(base / f"checkpoint-{name}", config=config)
            write_bundle(folder, checkpoint, precision)
    return folder


def as_hub_cache(folder: Path, repository: Path, revision: str = "rev") -> Path:
    """Lay out a folder as a snapshot in the Hugging Face cache, where every file is a link.

    Args:
      folder: Folder to copy.
      repository: Folder of the repository in the cache; made if it is not there.
      revision: Name of the snapshot.

    Returns:
      The folder of the snapshot.
    """
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    blobs.mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            blob = blobs / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def without_checkpoint(bundle: Path, folder: Path) -> Path:
    """Copy a bundle as `export --no-checkpoint` writes it, and return the copy's folder."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("checkpoint"))
    manifest = read_bundle(bundle).manifest
    files = {n: e for n, e in manifest.files.items() if not n.startswith("checkpoint/")}
    write_manifest(folder, dataclasses.replace(manifest, files=files).to_dict())
    return folder

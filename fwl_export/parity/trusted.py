"""A bundle whose PyTorch weights come from a folder that the receiver trusts.

Whoever sends a bundle can change its weights in the ONNX file and in its checkpoint alike, and
write hashes that fit. Compared with the weights of the bundle, such a bundle is right. Compared
with weights from elsewhere, it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fwl_export.bundle.config import HuggingFaceConfig, different_key
from fwl_export.bundle.manifest import (
    CHECKPOINT_FOLDER,
    TOKENIZER_FILE,
    Bundle,
    bundle_checkpoint,
    describe_file,
)
from fwl_export.bundle.tokenizer import load_tokenizer
from fwl_export.demo import checkpoint_folder
from fwl_export.errors import CheckpointError
from fwl_export.json_files import shown
from fwl_export.model import source
from fwl_export.model.checkpoint import check_complete, load_config
from fwl_export.model.pretrained import join_checkpoint
from fwl_export.model.stored import CONFIG_FILE, WEIGHTS_FILE

_INSIDE = f"{CHECKPOINT_FOLDER}/"


class TrustedBundle(Bundle):
    """A bundle with the checkpoint of another folder in place of its own, if it has one."""

    def __init__(self, bundle: Bundle, checkpoint: Path) -> None:
        """Combine a bundle and a checkpoint; see `with_trusted_weights`.

        Args:
          bundle: Bundle to check.
          checkpoint: Folder of the checkpoint, whose files are hashed now.
        """
        files = {n: e for n, e in bundle.manifest.files.items() if not n.startswith(_INSIDE)}
        for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
            files[f"{_INSIDE}{name}"] = describe_file(checkpoint / name)
        super().__init__(bundle.folder, replace(bundle.manifest, files=files))
        self._checkpoint = checkpoint

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint's folder."""
        return self._checkpoint

    def _listed(self, name: str) -> tuple[Path, Mapping[str, Any]]:
        if name in self.manifest.files and name.startswith(_INSIDE):
            return self._checkpoint / name.removeprefix(_INSIDE), self.manifest.files[name]
        return super()._listed(name)


def with_trusted_weights(
    bundle: Bundle, path: Path, layer: Path | None = None, scratch: Path | None = None
) -> TrustedBundle:
    """Return the bundle with weights that the receiver trusts, for `check_bundle`.

    Args:
      bundle: Bundle to check; it may have been exported without its checkpoint.
      path: Folder of a checkpoint, or "demo"; a bundle that is trusted; or a language model of
        Hugging Face.
      layer: Folder of the Fast Weight Layer on that language model; None means a new one, as
        `export --backbone` without `--fwl` makes it.
      scratch: Folder for the checkpoint that a language model and a layer are joined to.

    Raises:
      CheckpointError, ConfigError: The weights cannot be read, or belong to a model of another
        configuration; the message names the key that differs.
    """
    path = checkpoint_folder(str(path))
    found = source.what_is(path)
    is_backbone = found.kind in (source.HUGGING_FACE, source.GGUF)
    if layer is not None and not is_backbone:
        raise CheckpointError(
            f"--fwl needs a language model of Hugging Face as --checkpoint, but '{path}' "
            f"{found.what}; leave out --fwl"
        )
    if is_backbone and scratch is not None:
        checkpoint = _joined(bundle, path, layer, scratch / CHECKPOINT_FOLDER)
    elif found.kind == source.BUNDLE:
        checkpoint = bundle_checkpoint(path)
    elif found.kind == source.CHECKPOINT:
        check_complete(path)
        checkpoint = path
    else:
        raise found.refusal("--checkpoint", source.EXPECTED)
    config = load_config(checkpoint / CONFIG_FILE)
    if difference := different_key(config, bundle.manifest.config):
        key, theirs, ours = difference
        raise CheckpointError(
            f"--checkpoint '{path}' is not of this bundle's model: {key} is {shown(theirs)}, but "
            f"{shown(ours)} in the bundle; give the checkpoint that the bundle was exported from"
        )
    return TrustedBundle(bundle, checkpoint)


def same_tokenizer(bundle: TrustedBundle) -> bool:
    """Return whether the bundle's tokenizer is that of its trusted checkpoint."""
    own = load_tokenizer(bundle.folder / TOKENIZER_FILE, content=bundle.read_file(TOKENIZER_FILE))
    trusted = load_tokenizer(bundle.checkpoint / TOKENIZER_FILE)
    return own.to_str() == trusted.to_str()


def _joined(bundle: Bundle, path: Path, layer: Path | None, folder: Path) -> Path:
    """Join a backbone and a layer with the context that the bundle's model has."""
    backbone = bundle.manifest.config.backbone
    if not isinstance(backbone, HuggingFaceConfig):
        raise CheckpointError(
            f"--checkpoint '{path}' is a language model of Hugging Face, but the bundle's backbone "
            f"is a {backbone.type}; give the checkpoint that the bundle was exported from"
        )
    without_end = backbone.window == backbone.model.get("sliding_window")
    context = None if without_end else backbone.window
    slide = context is not None and not backbone.max_positions
    join_checkpoint(path, layer, folder, context, slide)
    return folder

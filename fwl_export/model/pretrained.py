"""Join a Hugging Face backbone and a Fast Weight Layer into one checkpoint folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from fwl_export.bundle.text_tokenizer import text_tokenizer
from fwl_export.errors import CheckpointError
from fwl_export.model.backbones.gguf import is_gguf, save_gguf_tokenizer
from fwl_export.model.checkpoint import TOKENIZER_FILE, save_checkpoint
from fwl_export.model.language_model import FWLModel


def join_checkpoint(
    backbone: Path,
    fast_weights: Path | None,
    folder: Path,
    context: int | None = None,
    slide: bool = False,
) -> FWLModel:
    """Write a checkpoint folder that `load_checkpoint` reads.

    Args:
      backbone: Folder with config.json, safetensors and tokenizer.json; or a GGUF file.
      fast_weights: Folder of a Fast Weight Layer, see `fwl_checkpoint`; None for a new one, see
        `new_layer`.
      folder: Folder to write.
      context: Number of tokens that full attention sees, see `FWLModel.from_pretrained`.
      slide: Whether to read on past the context, see `FWLModel.from_pretrained`.

    Returns:
      The joined model.

    Raises:
      CheckpointError, ConfigError, MissingDependencyError: As in `FWLModel.from_pretrained`; or the
        backbone has no tokenizer that fits.
    """
    model = FWLModel.from_pretrained(backbone, fast_weights, context, slide)
    save_checkpoint(folder, model, backbone_tokenizer(backbone, model))
    return model


def backbone_tokenizer(backbone: Path, model: FWLModel) -> Tokenizer:
    """Return the tokenizer of a backbone.

    Args:
      backbone: Folder of the backbone, or its GGUF file.
      model: The model with this backbone.

    Raises:
      CheckpointError: There is no tokenizer, or it does not fit.
    """
    with tokenizer_folder(backbone) as folder:
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"backbone '{backbone}' has no {TOKENIZER_FILE}; write it with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
            )
        return text_tokenizer(folder, model.config).tokenizer


@contextlib.contextmanager
def tokenizer_folder(backbone: Path) -> Iterator[Path]:
    """Context with the folder that holds a backbone's tokenizer.json, if it has one.

    Args:
      backbone: Folder of the backbone, or its GGUF file, whose tokenizer is written to a temporary
        folder.
    """
    if not is_gguf(backbone):
        yield backbone
        return
    with tempfile.TemporaryDirectory() as folder:
        save_gguf_tokenizer(backbone, Path(folder))
        yield Path(folder)

"""One checkpoint folder out of a Hugging Face backbone and a Fast Weight Layer."""

from __future__ import annotations

from pathlib import Path

from fwl_export.bundle.tokenizer import load_tokenizer
from fwl_export.errors import CheckpointError
from fwl_export.model.checkpoint import TOKENIZER_FILE, save_checkpoint
from fwl_export.model.language_model import FWLModel


def join_checkpoint(
    backbone: Path,
    fast_weights: Path,
    folder: Path,
    context: int | None = None,
    slide: bool = False,
) -> FWLModel:
    """Write a checkpoint folder that holds everything, as `load_checkpoint` reads it.

    Args:
      backbone: folder with config.json, safetensors and tokenizer.json.
      fast_weights: folder of a layer (see `fwl_checkpoint`).
      folder: where to write.
      context: see `FWLModel.from_pretrained`.
      slide: see there.

    Raises:
      CheckpointError, ConfigError, MissingDependencyError: see there.
    """
    model = FWLModel.from_pretrained(backbone, fast_weights, context, slide)
    path = backbone / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"backbone '{backbone}' has no {TOKENIZER_FILE}; write it with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
        )
    tokenizer = load_tokenizer(path, model.config.vocab_size, padded=True)
    save_checkpoint(folder, model, tokenizer)
    return model

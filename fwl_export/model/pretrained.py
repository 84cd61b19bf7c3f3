"""Join a Hugging Face backbone and a Fast Weight Layer into one checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from fwl_export.bundle.text_tokenizer import text_tokenizer
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
    """Write a checkpoint folder that `load_checkpoint` reads.

    Args:
      backbone: Folder with config.json, safetensors and tokenizer.json.
      fast_weights: Folder of a Fast Weight Layer, see `fwl_checkpoint`.
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
    path = backbone / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"backbone '{backbone}' has no {TOKENIZER_FILE}; write it with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers"
        )
    text = text_tokenizer(backbone, model.config)
    save_checkpoint(folder, model, text.tokenizer, text.files)
    return model

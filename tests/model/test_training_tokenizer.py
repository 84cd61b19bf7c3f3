"""Tokenizers made from texts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export.demo import HELD_OUT_PLAY
from fwl_export.errors import ConfigError, TokenError
from fwl_export.model.training_tokenizer import train_tokenizer


def test_every_text_comes_back_and_common_words_are_one_token() -> None:
    tokenizer = train_tokenizer([HELD_OUT_PLAY], 1024)
    assert tokenizer.get_vocab_size() == 1024
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))
    for text in (HELD_OUT_PLAY.read_text(), " x", "", "\r\n\t\0 Ærø 漢字 🎭\u200b"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(" the king").ids) == 2
    assert len(tokenizer.encode("\x00\x01\x02").ids) == 3


def test_the_same_texts_give_the_same_tokenizer_in_any_process() -> None:
    """Words are counted in hash maps, whose order differs from process to process."""
    code = (
        "from fwl_export.model.training_tokenizer import train_tokenizer\n"
        "from fwl_export.demo import HELD_OUT_PLAY\n"
        "import hashlib\n"
        "print(hashlib.sha256(train_tokenizer([HELD_OUT_PLAY], 700).to_str().encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(found) == 1


def test_too_little_text_for_the_size_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 10)
    with pytest.raises(
        TokenError, match=r"repeat too little for .* 2048 entries: they give 26\d\."
    ):
        train_tokenizer([tmp_path / "a.txt"])
    with pytest.raises(
        ConfigError, match="vocab_size is 255; expected 256, one entry for each byte"
    ):
        train_tokenizer([tmp_path / "a.txt"], 255)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenError, match="cannot read"):
        train_tokenizer([tmp_path / "b.txt"])

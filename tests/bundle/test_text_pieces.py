"""Long texts in windows: the ids are those of the whole text, wherever it is cut."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator

import pytest
from tokenizers import Encoding, Tokenizer

from fwl_export.bundle import text_pieces
from fwl_export.bundle.text_pieces import token_pieces
from fwl_export.demo import HELD_OUT_PLAY
from tests.tokenizers_in_the_wild import STYLES, as_json

PLAY = HELD_OUT_PLAY.read_text(encoding="utf-8")[:30_000]
_RANDOM = random.Random(1)

# In most of these, a cut at any byte, character, line or space changes tokens.
TEXTS = {
    "play": PLAY,
    "one line without spaces": "".join(PLAY.split()),
    "one character": "a" * 20_001,
    "digits": "".join(_RANDOM.choices("0123456789", k=20_000)),
    "blank lines": "\n" * 9000 + "x" + " " * 9000,
    "emoji": "🙂é€" * 6000,
    "rules": ("-" * 700 + "\r\n") * 25,
    "Chinese": "".join(_RANDOM.choices("中文字漢語的一是不了人我在有他", k=15_000)),
    "control tokens": "a</s><s> <|endoftext|> [SEP]" * 700,
    "short": "the king",
    "empty": "",
}


def _grouped_from_the_right() -> str:
    """Return a tokenizer that groups digits by three from the end of a number, however long."""
    data = json.loads(as_json("gpt2"))
    pattern = {"Regex": r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bytes_["use_regex"] = False
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    return json.dumps(data)


class Counting:
    """Tokenizes, and counts the characters that it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text: str) -> Encoding:
        self.characters += len(text)
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "_WINDOW", 4099)


@pytest.fixture(params=[*STYLES, "grouped from the right"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name: str = request.param
    return Tokenizer.from_str(as_json(name) if name in STYLES else _grouped_from_the_right())


def _until(pieces: Iterator[list[int]], most: int) -> list[int]:
    found: list[int] = []
    for piece in pieces:
        found += piece
        if most and len(found) >= most:
            break
    return found


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_windows_give_the_ids_of_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert _until(token_pieces(Counting(tokenizer), io.StringIO(text).read), 0) == whole
    for most in (1, 300):
        found = _until(token_pieces(Counting(tokenizer), io.StringIO(text).read, most), most)
        assert found[:most] == whole[:most]


def test_few_tokens_of_a_long_text_take_a_short_window() -> None:
    for style in ("gpt2", "llama2", "t5", "gemma"):
        counting = Counting(Tokenizer.from_str(as_json(style)))
        text = io.StringIO(PLAY * 40)
        assert len(_until(token_pieces(counting, text.read, 100), 100)) >= 100
        assert counting.characters < 10_000
        assert text.tell() < 20_000


def test_windows_overlap_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "_WINDOW", 60_013)
    counting = Counting(Tokenizer.from_str(as_json("llama2")))
    text = PLAY * 20
    _until(token_pieces(counting, io.StringIO(text).read), 0)
    assert counting.characters < 1.5 * len(text)

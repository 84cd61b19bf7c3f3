from __future__ import annotations

import numpy as np

from tools.demo_data import (
    TEST_PLAYS,
    VALIDATION_PLAYS,
    clean,
    encode,
    train_tokenizer,
    training_texts,
)


def test_clean_drops_the_header_and_repeated_blank_lines() -> None:
    raw = "KING LEAR\n\nby William Shakespeare\n\n\n\nACT I.  \n\n\nLear.\nYes.\n\n"
    assert clean(raw.replace("\n", "\r\n")) == "ACT I.\n\nLear.\nYes.\n"


def test_clean_keeps_a_text_without_header() -> None:
    assert clean("ACT I.\n\nLear.\n") == "ACT I.\n\nLear.\n"


def test_held_out_plays_are_not_trained_on() -> None:
    plays = {name: name for name in ("hamlet", "macbeth", *TEST_PLAYS, *VALIDATION_PLAYS)}
    assert training_texts(plays) == ["hamlet", "macbeth"]
    assert not set(TEST_PLAYS) & set(VALIDATION_PLAYS)


def test_the_tokenizer_loses_nothing() -> None:
    text = "Enter LEAR,\n  with a café; exit.\n"
    tokenizer = train_tokenizer([text] * 20, 300)
    ids = encode(tokenizer, [text, "ü"])
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids.tolist()) == text + "ü"

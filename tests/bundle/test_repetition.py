"""Texts of repeated tokens: which tokens are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from fwl_export.bundle.repetition import COUNT, Repetition, repeated_tokens, repetitions

TEXT = np.repeat(np.arange(20), np.arange(20, 0, -1))  # 0 is most frequent, 19 is rarest


def tokenizer(*tokens: str, special: str = "") -> Tokenizer:
    """Return a tokenizer that knows some characters, and takes the longest of them first."""
    merged = [t for t in tokens if len(t) == 2]
    vocabulary = {token: number for number, token in enumerate(["?", *tokens])}
    made = Tokenizer(models.BPE(vocabulary, [(t[0], t[1]) for t in merged], unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated") if not merged else None
    if special:
        made.add_special_tokens([AddedToken(special, special=True)])
    return made


def test_tokens_are_those_that_such_a_text_consists_of() -> None:
    found = repeated_tokens(tokenizer("\n", "-", "--", "0", " ", special="<|end|>"))
    assert found == {"newline": 1, "dash": 3, "digit": 4, "space": 5, "control token": 6}


def test_a_tokenizer_without_such_tokens_is_no_error() -> None:
    assert repeated_tokens(Tokenizer(models.WordLevel({}, unk_token="?"))) == {}


def test_texts_are_different_and_begin_with_what_matters_most() -> None:
    found = repetitions({"newline": 7, "dash": 8, "digit": 9, "control token": 50}, TEXT, 64)
    assert len(found) == len({text.ids for text in found}) == COUNT
    names = [text.name for text in found]
    assert names[:4] == ["newline", "dash", "most frequent token", "two tokens in turn"]
    by_name = {text.name: text.ids for text in found}
    assert by_name["most frequent token"] == (0,)
    assert by_name["two tokens in turn"] == (0, 7)
    assert by_name["control token"] == (50,)
    assert by_name["rarest token"] == (63,)
    assert by_name["rare token of the text"] == (19,)


def test_without_a_tokenizer_frequency_decides() -> None:
    found = [text.ids for text in repetitions({}, TEXT)]
    assert found[:3] == [(0,), (0, 1), (19,)]
    assert len(set(found)) == COUNT


def test_without_a_text_the_vocabulary_is_searched() -> None:
    found = repetitions({"newline": 7}, np.zeros(0, np.int64), 100)
    assert len({text.ids for text in found}) == COUNT
    assert (7,) in [text.ids for text in found]


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
def test_a_small_vocabulary_repeats_itself(vocabulary: int) -> None:
    found = repetitions({"newline": 7}, np.zeros(4, np.int64), vocabulary)
    assert len(found) == COUNT
    assert all(token < vocabulary for text in found for token in text.ids)


def test_a_text_goes_on_where_it_ended() -> None:
    text = Repetition("two tokens in turn", (3, 5))
    assert text.read(0, 3).tolist() == [3, 5, 3]
    assert text.read(3, 2).tolist() == [5, 3]

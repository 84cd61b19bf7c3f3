"""The text API compared with `generate` of transformers, on the logits of one plain model.

A model with fast weights learns while it writes, and transformers knows no such thing. What both
define alike is what happens to logits: processors, greedy choice, ends, stop strings, decoding.
"""

from __future__ import annotations

import functools
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from fwl_export import Sampler
from fwl_export.bundle.text_tokenizer import TextTokenizer
from fwl_export.runtimes import TextSession
from tests.runtimes.scripted import byte_tokenizer, scripted, sentencepiece_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
PROMPTS = ["the king", "ab", "Exit, pursued by a bear. "]


@functools.cache
def llama(vocab_size: int) -> LlamaForCausalLM:
    """Return a random model whose greedy texts vary, and end now and then."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).double()


def ours(tokenizer: TextTokenizer) -> TextSession:
    """Return a session whose model is the Llama."""
    model = llama(tokenizer.vocab_size)

    def script(read: list[int]) -> np.ndarray:
        logits: np.ndarray = model(torch.tensor([read])).logits[0, -1].numpy()
        return logits.astype(np.float32)

    return scripted(script, tokenizer)


def theirs(tokenizer: TextTokenizer, prompt: str, **settings: Any) -> list[int]:
    """Return the new tokens that transformers generates."""
    ids = torch.tensor([tokenizer.encode(prompt, start=True).tolist()])
    output = llama(tokenizer.vocab_size).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=sorted(tokenizer.end_ids),
        tokenizer=hugging_face(tokenizer),
        **settings,
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


def unprintable(tokenizer: TextTokenizer) -> list[int]:
    """Return the tokens that are no letters, since a random model writes no valid UTF-8."""
    names = [tokenizer.tokenizer.id_to_token(token) for token in range(tokenizer.vocab_size)]
    letters = {name for name in names if name.strip("▁").isascii() and len(name) < 5}
    kept = {token for token, name in enumerate(names) if name in letters} | tokenizer.end_ids
    return sorted(set(range(tokenizer.vocab_size)) - kept)


def hugging_face(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer, clean_up_tokenization_spaces=False
    )


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "repetition penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "forbidden": ({"forbidden": range(60, 90)}, {"suppress_tokens": list(range(60, 90))}),
    "bias": (
        {"logit_bias": {70: 3.0, 75: -3.0}},
        {"sequence_bias": {(70,): 3.0, (75,): -3.0}},
    ),
    "all": (
        {"repetition_penalty": 2.0, "forbidden": [68, 69], "logit_bias": {70: 2.0}},
        {"repetition_penalty": 2.0, "suppress_tokens": [68, 69], "sequence_bias": {(70,): 2.0}},
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_are_those_of_transformers(
    name: str, settings: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    tokenizer = TOKENIZERS[name]
    expected = [theirs(tokenizer, prompt, max_new_tokens=25, **settings[1]) for prompt in PROMPTS]
    options: Any = {"max_tokens": 25, "sampler": Sampler(**settings[0])}
    assert [ours(tokenizer).generate(prompt, **options).tokens for prompt in PROMPTS] == expected
    assert [each.tokens for each in ours(tokenizer).generate(PROMPTS, **options)] == expected
    assert len({tuple(each) for each in expected}) == len(PROMPTS)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_end_token_ends_it_as_in_transformers(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    end, never = next(iter(tokenizer.end_ids)), unprintable(tokenizer)
    sampler = Sampler(logit_bias={end: 3.0}, forbidden=never)
    for least in (0, 4):
        found = ours(tokenizer).generate(
            PROMPTS[0], max_tokens=25, min_tokens=least, sampler=sampler
        )
        expected = theirs(
            tokenizer,
            PROMPTS[0],
            max_new_tokens=25,
            min_new_tokens=least,
            sequence_bias={(end,): 3.0},
            suppress_tokens=never,
        )
        assert found.tokens == expected
        assert found.text == hugging_face(tokenizer).decode(
            [*tokenizer.encode(PROMPTS[0], start=True), *expected], skip_special_tokens=True
        ).removeprefix(PROMPTS[0])
        assert len(found.tokens) > least


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_strings_end_it_as_in_transformers(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    never = [*unprintable(tokenizer), *tokenizer.end_ids]
    sampler = Sampler(forbidden=never)
    free = ours(tokenizer).generate(PROMPTS[0], max_tokens=40, sampler=sampler).text
    assert len(free) > 20
    for start in range(1, len(free) - 3, 5):
        stop = [free[start : start + 3], "NEVER"]
        settings: Any = {"stop_strings": stop, "suppress_tokens": never}
        tokens = theirs(tokenizer, PROMPTS[0], max_new_tokens=40, **settings)
        found = ours(tokenizer).generate(PROMPTS[0], max_tokens=40, stop=stop, sampler=sampler)
        assert found.finish_reason == "stop"
        assert found.tokens == tokens
        prompt = tokenizer.encode(PROMPTS[0], start=True).tolist()
        decode = functools.partial(hugging_face(tokenizer).decode, skip_special_tokens=True)
        theirs_text = decode([*prompt, *tokens])[len(decode(prompt)) :]
        assert theirs_text.startswith(found.text + stop[0])
        assert stop[0] not in found.text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stream_says_what_that_of_transformers_says(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    wrapped = hugging_face(tokenizer)
    streamer = TextIteratorStreamer(wrapped, skip_prompt=False, skip_special_tokens=True)
    ids = torch.tensor([tokenizer.encode(PROMPTS[0], start=True).tolist()])
    never = unprintable(tokenizer)
    settings = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": never}
    writing = Thread(
        target=llama(tokenizer.vocab_size).generate,
        args=(ids,),
        kwargs=settings | {"attention_mask": torch.ones_like(ids), "streamer": streamer},
    )
    writing.start()
    expected = "".join(streamer)
    writing.join()
    options: Any = {"max_tokens": 40, "ignore_end": True, "sampler": Sampler(forbidden=never)}
    found = "".join(ours(tokenizer).stream(PROMPTS[0], **options))
    assert PROMPTS[0] + found == expected

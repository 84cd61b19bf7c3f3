"""Tokenizers built in the styles of published models, small enough to train in a test."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fwl_export.demo import HELD_OUT_PLAY

_SIZE = 600
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _text() -> list[str]:
    return HELD_OUT_PLAY.read_text(encoding="utf-8")[:40_000].splitlines(keepends=True)


def _template(tokenizer: Tokenizer, template: str, *names: str) -> None:
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _llama(legacy: bool) -> Tokenizer:
    """Llama 1 and 2: SentencePiece BPE with bytes; the old form prepends in the normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=["<unk>", "<s>", "</s>", *_BYTES], show_progress=False
    )
    words = (f" {word}" for line in _text() for word in line.split())
    tokenizer.train_from_iterator(words, trainer)
    if legacy:
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _template(tokenizer, "<s> $A", "<s>")
    return tokenizer


def llama2() -> Tokenizer:
    return _without_special_bytes(_llama(legacy=False))


def llama1() -> Tokenizer:
    return _without_special_bytes(_llama(legacy=True))


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Let the bytes be ordinary entries of the vocabulary, as in published models."""
    import json

    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [each for each in data["added_tokens"] if each["id"] < 3]
    return Tokenizer.from_str(json.dumps(data))


def _byte_level(names: list[str], pattern: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def gpt2() -> Tokenizer:
    """GPT-2: bytes, one token that ends and begins texts, nothing put in front."""
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def llama3() -> Tokenizer:
    """Llama 3: bytes behind a pattern, merges ignored for whole words, a beginning token."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = _byte_level(names, pattern)
    tokenizer.model.ignore_merges = True
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[(names[0], tokenizer.token_to_id(names[0]))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


def qwen() -> Tokenizer:
    """Qwen: NFC, bytes, no beginning token, tokens of its chats that are not called special."""
    tokenizer = _byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def roberta() -> Tokenizer:
    """RoBERTa: bytes with a space in front, and tokens around the text."""
    tokenizer = _byte_level(["<s>", "</s>", "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))
    )
    return tokenizer


def gemma() -> Tokenizer:
    """Gemma: SentencePiece BPE without a space in front, runs of line breaks as tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=[*names, *_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer = _without_special_bytes(tokenizer)
    tokenizer.add_special_tokens(["<unk>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (2, 3)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _template(tokenizer, "<bos> $A", "<bos>")
    return tokenizer


def t5() -> Tokenizer:
    """T5: Unigram, an end token behind the text, characters unknown to it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=_SIZE,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    _template(tokenizer, "$A </s>", "</s>")
    return tokenizer


def bert() -> Tokenizer:
    """BERT: words in lower case and their pieces, with tokens around the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=_SIZE, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    return tokenizer


STYLES: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (llama1, llama2, llama3, gpt2, gemma, qwen, t5, bert, roberta)
}


@functools.cache
def as_json(style: str) -> str:
    """Return the tokenizer.json of a style."""
    return STYLES[style]().to_str()

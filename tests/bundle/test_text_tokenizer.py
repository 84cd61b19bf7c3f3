"""Reading text as transformers does, whatever a tokenizer.json carries beside its vocabulary."""

from __future__ import annotations

import dataclasses
import json
import random
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from fwl_export.bundle.config import HuggingFaceConfig, ModelConfig
from fwl_export.bundle.text_tokenizer import (
    OPTIONAL_FILES,
    TextTokenizer,
    bundle_text_tokenizer,
    text_tokenizer,
)
from fwl_export.bundle.tokenizer import encode, load_tokenizer, read_ids
from fwl_export.bundle.tokenizer_facts import TextWarning, facts, template_ids
from fwl_export.errors import CheckpointError, TokenError
from tests.bundles import TINY
from tests.tokenizers_in_the_wild import STYLES, as_json

TEXTS = (
    "The king of this",
    " a space in front and two  inside ",
    "two lines\r\nand\n\n\nmore\ttabs",
    "café naïve ﬁ 🙂🙂 中文 e\u0301",
    "control </s> tokens <s> in <|endoftext|> text [SEP] <bos><|eot_id|> <|im_end|>",
    "</s>",
    "12345678 -- ------------",
    "",
)


def write(folder: Path, tokenizer: str | Tokenizer, **files: Any) -> Path:
    """Write tokenizer.json, and other files by their names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, content in files.items():
        if name == "chat_template":
            (folder / "chat_template.jinja").write_text(content, encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def model(vocab_size: int, **settings: Any) -> ModelConfig:
    """Return the configuration of a model from transformers."""
    backbone = HuggingFaceConfig(
        "huggingface", TINY.backbone.width, 8, 0, False, {"model_type": "llama", **settings}
    )
    return dataclasses.replace(TINY, vocab_size=vocab_size, backbone=backbone)


def opened(folder: Path, vocab_size: int = 700, **settings: Any) -> TextTokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        return text_tokenizer(folder, model(vocab_size, **settings))


def quiet(tokenizer: TextTokenizer, text: str, start: bool, special: bool) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        return tokenizer.encode(text, start=start, special=special).tolist()


def theirs(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").exists():
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_ids_are_those_of_transformers(style: str, tmp_path: Path) -> None:
    folder = write(tmp_path, as_json(style))
    ours, reference = opened(folder), theirs(folder)
    before, after = map(list, template_ids(ours.tokenizer))
    for text in TEXTS:
        inner = reference(text, add_special_tokens=False).input_ids
        assert quiet(ours, text, start=False, special=True) == inner
        whole = reference(text).input_ids
        assert whole == before + inner + after
        expected = inner if inner[: len(before)] == before else before + inner
        assert quiet(ours, text, start=True, special=True) == expected


def test_control_tokens_in_a_text_are_text(style: str, tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, as_json(style)))
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    unknown = getattr(tokenizer.tokenizer.model, "unk_token", "<unk>")
    control = {key for key, each in added.items() if each.special and each.content != unknown}
    for text in (*TEXTS, *(token.content for token in added.values())):
        ids = quiet(tokenizer, text, start=False, special=False)
        assert control.isdisjoint(ids), text
        if facts(tokenizer.tokenizer).unknown_id not in ids and style != "bert":
            expected = unicodedata.normalize("NFC", text) if style == "qwen" else text
            assert tokenizer.decode(ids).strip() == expected.strip() or style == "t5"
        # The same bytes are read as the same tokens by whatever reads only plain text.
        assert encode_quietly(text, tokenizer.tokenizer) == ids


def encode_quietly(text: str, tokenizer: Tokenizer) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        return encode(text, tokenizer, start=False).tolist()


def test_plain_text_without_control_tokens_is_the_same_either_way(
    style: str, tmp_path: Path
) -> None:
    tokenizer = opened(write(tmp_path, as_json(style)))
    for text in TEXTS[:4]:
        plain, special = (quiet(tokenizer, text, False, each) for each in (False, True))
        assert plain == special


@pytest.mark.parametrize(
    "name", ["llama1", "llama2", "llama3", "gpt2", "gemma", "qwen", "t5", "roberta"]
)
def test_decoding_in_a_stream_is_decoding_at_once(name: str, tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, as_json(name)))
    prompts = ["The king of", " and ", "🙂", "", "of\n"]
    texts = [" the queen, café", "🙂🙂 x", "s </s> t", "\n\n a", "  two  spaces ", "中文"]
    for prompt in prompts:
        before = quiet(tokenizer, prompt, True, False)
        for text in texts:
            ids = quiet(tokenizer, text, False, True)
            if facts(tokenizer.tokenizer).unknown_id in ids:
                continue
            decoder = tokenizer.decoder(before)
            found = "".join(map(decoder.add, ids)) + decoder.finish()
            whole, begun = tokenizer.decode([*before, *ids]), tokenizer.decode(before)
            if begun or not before:
                assert begun + found == whole
            else:  # a single space is no text, but a space between texts
                assert found.strip() == whole.strip()


@pytest.mark.parametrize("name", STYLES)
def test_any_tokens_can_be_decoded_in_a_stream(name: str, tmp_path: Path) -> None:
    """Random tokens: bytes that are no characters, control tokens, ids without a token."""
    tokenizer = opened(write(tmp_path, as_json(name)))
    rng = random.Random(0)
    for _ in range(30):
        ids = [rng.randrange(650) for _ in range(60)]
        decoder = tokenizer.decoder(ids[:20])
        parts = [decoder.add(token) for token in ids[20:]] + [decoder.finish()]
        assert all(len(part) < 100 for part in parts)
        assert "".join(parts)


def test_bytes_that_never_become_a_character_are_shown(tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, as_json("llama2")))
    byte = tokenizer.tokenizer.token_to_id
    decoder = tokenizer.decoder()
    text = "".join(decoder.add(byte("<0x80>")) for _ in range(1000))
    assert len(text) > 900
    euro = [byte(name) for name in ("<0xE2>", "<0x82>", "<0xAC>")]
    decoder = tokenizer.decoder()
    assert [decoder.add(token) for token in euro] == ["", "", "€"]
    # A byte behind it makes the library decode all four as one run of bytes, which is no text.
    assert (
        decoder.add(byte("<0x80>")) + decoder.add(byte("▁the")) + decoder.finish() == "\ufffd the"
    )
    decoder = tokenizer.decoder()
    assert [decoder.add(token) for token in euro[:2]] + [decoder.finish()] == ["", "", "\ufffd"]
    decoder = tokenizer.decoder(before=euro[:2])  # a text that goes on inside a character
    assert decoder.add(euro[2]) == "€"


def test_what_is_stored_beside_the_vocabulary_changes_nothing(style: str, tmp_path: Path) -> None:
    expected = opened(write(tmp_path / "plain", as_json(style)))
    changed = Tokenizer.from_str(as_json(style))
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    data = json.loads(changed.to_str())
    if data["model"]["type"] == "BPE":
        data["model"]["dropout"] = 0.9
    tokenizer = opened(write(tmp_path / "changed", json.dumps(data)))
    for text in TEXTS:
        for start in (True, False):
            ids = quiet(tokenizer, text, start, False)
            assert ids == quiet(expected, text, start, False)
            assert ids == quiet(tokenizer, text, start, False)  # also the second time


def test_one_beginning_and_no_end(style: str, tmp_path: Path) -> None:
    tokenizer = opened(write(tmp_path, as_json(style)))
    before, after = template_ids(tokenizer.tokenizer)
    assert tokenizer.bos_id == (before[0] if before else None)
    assert tokenizer.end_ids >= set(after)
    ids = quiet(tokenizer, "the king", True, False)
    assert ids == [*before, *quiet(tokenizer, "the king", False, False)]
    if before:
        name = tokenizer.tokenizer.id_to_token(before[0])
        written = quiet(tokenizer, f"{name}the king", True, True)
        assert written.count(before[0]) == 1
    path = tmp_path / "text.txt"
    path.write_text("the king")
    raw = load_tokenizer(tmp_path / "tokenizer.json")
    assert read_ids(path, raw).tolist() == read_ids(path, tokenizer).tolist() == ids
    assert read_ids(path, raw, start=False).tolist() == ids[len(before) :]


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}


def test_the_beginning_that_the_settings_ask_for(tmp_path: Path) -> None:
    plain = Tokenizer.from_str(as_json("gpt2"))
    settings = {**CONFIG, "bos_token": "<|endoftext|>", "add_bos_token": True}
    tokenizer = opened(write(tmp_path, plain, tokenizer_config=settings))
    bos = plain.token_to_id("<|endoftext|>")
    assert tokenizer.bos_id == bos
    assert tokenizer.encode("a", start=True).tolist() == [bos, *plain.encode("a").ids]
    assert tokenizer.encode("a", start=False).tolist() == plain.encode("a").ids
    # The tokenizer alone, as a checkpoint stores it, says the same.
    alone = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    assert encode("a", alone).tolist() == [bos, *plain.encode("a").ids]
    settings["add_bos_token"] = False
    assert opened(write(tmp_path, plain, tokenizer_config=settings)).bos_id is None


def test_a_beginning_of_several_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(as_json("llama3"))
    names = ["<|begin_of_text|>", "<|start_header_id|>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(names)} $A", special_tokens=list(zip(names, ids, strict=True))
    )
    found = opened(write(tmp_path, tokenizer))
    assert found.start_ids == tuple(ids)
    assert found.encode("".join(names) + "x", start=True, special=True).tolist()[:3] != [
        *ids,
        ids[0],
    ]


def test_a_template_that_is_not_around_one_text_is_refused(tmp_path: Path) -> None:
    data = json.loads(as_json("llama3"))
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    with pytest.raises(CheckpointError, match="contains the text 2 times; expected once"):
        opened(write(tmp_path, json.dumps(data)))


def test_tokens_that_only_the_settings_have(tmp_path: Path) -> None:
    """tokenizer_config.json can add tokens and name control tokens, as transformers reads it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    entry = {"content": "<|turn|>", **flags, "special": True}
    settings = {**CONFIG, "added_tokens_decoder": {"601": entry}, "eos_token": "<|turn|>"}
    folder = write(tmp_path, as_json("gpt2"), tokenizer_config=settings)
    tokenizer, reference = opened(folder), theirs(folder)
    for text in ("a<|turn|> b", "<|turn|>"):
        assert (
            tokenizer.encode(text, start=True, special=True).tolist() == reference(text).input_ids
        )
        assert 601 not in tokenizer.encode(text, start=True)
    assert tokenizer.end_ids == {600, 601}
    assert tokenizer.special_tokens == {"eos_token": "<|turn|>"}
    settings["added_tokens_decoder"] = {"640": entry}
    write(tmp_path, as_json("gpt2"), tokenizer_config=settings)
    with pytest.raises(
        CheckpointError, match=r"'<\|turn\|>' is token '640', but by tokenizer.json"
    ):
        opened(folder)


def test_an_end_token_that_is_not_called_special(tmp_path: Path) -> None:
    plain = Tokenizer.from_str(as_json("gpt2"))
    plain.add_tokens([AddedToken("<|end_turn|>", normalized=False, special=False)])
    settings = {**CONFIG, "eos_token": {"content": "<|end_turn|>", "__type": "AddedToken"}}
    folder = write(tmp_path, plain, tokenizer_config=settings)
    tokenizer, reference = opened(folder), theirs(folder)
    ids = reference("a <|end_turn|> b").input_ids
    assert tokenizer.encode("a <|end_turn|> b", start=True, special=True).tolist() == ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == "a  b"
    assert 601 in tokenizer.end_ids
    assert 601 not in tokenizer.encode("a <|end_turn|> b", start=True)


def test_ends_from_every_file_that_names_them(tmp_path: Path) -> None:
    folder = write(tmp_path, as_json("llama3"), generation_config={"eos_token_id": [7, 602]})
    tokenizer = opened(folder, eos_token_id=[9])
    names = {"<|end_of_text|>", "<|eot_id|>"}
    assert tokenizer.end_ids == {7, 602, 9, *map(tokenizer.tokenizer.token_to_id, names)}
    assert opened(write(tmp_path / "b", as_json("t5")), eos_token_id=None).end_ids == {1}
    assert opened(write(tmp_path / "c", as_json("qwen")), eos_token_id=3).end_ids == {3, 600, 602}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config": {"chat_template": "one"}, "chat_template": "two\n"}, "two\n"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "tool_use", "template": "three"},
                        {"name": "default", "template": "four"},
                    ]
                }
            },
            "four",
        ),
    ],
)
def test_the_chat_template(tmp_path: Path, files: Mapping[str, Any], expected: str | None) -> None:
    folder = write(tmp_path, as_json("gpt2"), **files)
    assert opened(folder).chat_template == expected


def test_tokens_of_the_chat_template_are_control_tokens(tmp_path: Path) -> None:
    template = "<think>{{ messages[0].content }}"
    tokenizer = opened(write(tmp_path, as_json("qwen"), chat_template=template))
    number = tokenizer.tokenizer.token_to_id("<think>")
    assert number in tokenizer.encode("a<think>b", start=True, special=True)
    assert number not in tokenizer.encode("a<think>b", start=True)
    assert tokenizer.decode([number]) == "<think>"  # but an answer shows it
    ordinary = opened(write(tmp_path / "without", as_json("qwen")))
    assert number in ordinary.encode("a<think>b", start=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config.json: it is \[\]; expected an object"),
        ({"tokenizer_config": {"add_bos_token": 3}}, "'add_bos_token' is 3; expected"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, "'.*content' is missing"),
        ({"generation_config": {"eos_token_id": "x"}}, "generation_config.json: 'eos_token_id'"),
        ({"generation_config": {"eos_token_id": ["x"]}}, "generation_config.json: 'eos_token_id'"),
        ({"tokenizer_config": {"chat_template": 3}}, "'chat_template' is 3; expected"),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "'?chat_template"),
        ({"tokenizer_config": {"bos_token": {"x": 3}}}, r"'\[bos_token\].content' is missing"),
    ],
)
def test_malformed_settings(tmp_path: Path, files: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(write(tmp_path, as_json("gpt2"), **files))


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path, as_json("gpt2"))
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8 text"):
        opened(folder)


def test_vocabularies_by_their_largest_id(tmp_path: Path) -> None:
    folder = write(tmp_path, as_json("gpt2"))  # 601 entries
    padded = opened(folder, 640)
    assert padded.unused_ids.tolist() == list(range(601, 640))
    assert opened(folder, 601).unused_ids.tolist() == []
    smaller = opened(folder, 600)  # <|endoftext|> was added after training
    assert smaller.encode("a <|endoftext|>", start=True).max() < 600
    with pytest.raises(TokenError, match=r"contains '<\|endoftext\|>', which is token 600 of the"):
        smaller.encode("a <|endoftext|>", start=True, special=True)
    with pytest.raises(CheckpointError, match="of which 101 have ids of 500 and more"):
        opened(folder, 500)
    text = tmp_path / "text"
    text.write_text("a <|endoftext|> b")
    with pytest.raises(TokenError, match="which is token 600"):
        read_ids(text, smaller, special=True)


def test_a_gap_in_the_vocabulary(tmp_path: Path) -> None:
    data = json.loads(as_json("llama2"))
    vocabulary = data["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 630
    tokenizer = opened(write(tmp_path, json.dumps(data)), 631)
    assert tokenizer.unused_ids.tolist() == list(range(599, 630))
    assert tokenizer.decoder().add(605) == ""
    beyond = opened(write(tmp_path, json.dumps(data)), 600)
    with pytest.raises(
        TokenError, match="which is token 630 of the tokenizer, but the model's ids"
    ):
        beyond.encode(last.replace("▁", " ") * 3, start=False)


def test_unknown_characters_are_told_once(tmp_path: Path) -> None:
    tokenizer = text_tokenizer(write(tmp_path, as_json("t5")), model(600))
    with pytest.warns(TextWarning, match="has no token for '🙂' and reads it as '<unk>'"):
        tokenizer.encode("the 🙂 king", start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode("the 🙂 king", start=True)
    dropping = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    dropping.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = text_tokenizer(write(tmp_path, dropping), model(3))
    with pytest.warns(TextWarning, match="has no token for 'cé' and leaves it out"):
        assert tokenizer.encode("ab caé", start=True).tolist() == [2, 0]
    bytes_ = Tokenizer(models.BPE({"Ġ": 0, "a": 1}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = text_tokenizer(write(tmp_path, bytes_), model(3))
    with pytest.warns(TextWarning, match="has no token for 'b' and leaves it out"):
        tokenizer.encode("a ab", start=True)


@pytest.mark.parametrize("name", ["llama1", "llama3", "gpt2", "gemma", "qwen", "roberta"])
def test_nothing_is_told_of_a_text_that_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    tokenizer = text_tokenizer(write(tmp_path, as_json(name)), model(700))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in TEXTS:
            tokenizer.encode(text, start=True)


def test_the_space_in_front_that_gpt2_settings_ask_for(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    folder = write(tmp_path, as_json("gpt2"), tokenizer_config=settings)
    tokenizer, reference = opened(folder), theirs(folder)
    for text in TEXTS[:4]:
        assert quiet(tokenizer, text, True, True) == reference(text).input_ids


def test_an_older_bundle_has_none_of_the_files(tiny_bundle: Path) -> None:
    from fwl_export import read_bundle

    bundle = read_bundle(tiny_bundle)
    assert not set(OPTIONAL_FILES) & set(bundle.manifest.files)
    tokenizer = bundle_text_tokenizer(bundle)
    assert (tokenizer.bos_id, tokenizer.end_ids, tokenizer.chat_template) == (
        None,
        frozenset(),
        None,
    )
    assert tokenizer.special_tokens == {}
    ids = tokenizer.encode("A B", start=True)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == "A   B"  # a tokenizer without a decoder puts spaces between


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_spaces_that_the_settings_want_removed(name: str, tmp_path: Path) -> None:
    folder = write(
        tmp_path, as_json(name), tokenizer_config={**CONFIG, "clean_up_tokenization_spaces": True}
    )
    tokenizer, reference = opened(folder), theirs(folder)
    text = "the king , he 's not there . do n't ' go ' ! the queen ' s man"
    ids = quiet(tokenizer, text, False, False)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    for split in range(len(ids)):
        decoder = tokenizer.decoder()
        parts = [decoder.add(token) for token in ids[:split]] + [decoder.finish()]
        assert "".join(parts) == tokenizer.decode(ids[:split])


def test_bpe_keeps_its_spaces(tmp_path: Path) -> None:
    folder = write(
        tmp_path, as_json("gpt2"), tokenizer_config={"clean_up_tokenization_spaces": True}
    )
    tokenizer = opened(folder)
    assert tokenizer.decode(tokenizer.encode("a . b", start=True)) == "a . b"


def test_control_tokens_that_merges_or_whole_words_would_lead_to(tmp_path: Path) -> None:
    merged = Tokenizer(
        models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, [("<", "s"), ("<s", ">")])
    )
    merged.add_special_tokens(["<s>"])
    whole = Tokenizer(models.BPE({"<": 0, "s": 1, ">": 2, "<s>": 3}, [], ignore_merges=True))
    whole.add_special_tokens(["<s>"])
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "<s>": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>"])
    for number, (tokenizer, expected) in enumerate(
        [(merged, [3, 2]), (whole, [0, 1, 2]), (words, [0])]
    ):
        found = opened(write(tmp_path / str(number), tokenizer), 5)
        assert quiet(found, "<s>", True, True) == [tokenizer.token_to_id("<s>")]
        assert quiet(found, "<s>", True, False) == expected


def test_a_beginning_that_the_model_does_not_know(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(as_json("gpt2"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 600)]
    )
    folder = write(tmp_path, tokenizer)
    with pytest.raises(CheckpointError, match="puts token 600 in front of a text, but the model's"):
        opened(folder, 600)

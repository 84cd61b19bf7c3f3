"""Texts on the command line: standard input, control tokens, few tokens, other encodings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from fwl_export import open_session, read_bundle
from fwl_export.bundle import text_pieces
from fwl_export.bundle.manifest import describe_file, write_manifest
from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
from fwl_export.cli.texts import typed_text
from tests.cli.run import run

TEXT = "THE QUICK BROWN FOX"


def replace_tokenizer(bundle: Path, tokenizer: Tokenizer, **files: object) -> None:
    """Give a bundle another tokenizer.json, and other JSON files by their names."""
    tokenizer.save(str(bundle / "tokenizer.json"))
    names = ["tokenizer.json"]
    for name, content in files.items():
        names.append(f"{name}.json")
        (bundle / names[-1]).write_text(json.dumps(content))
    data = json.loads((bundle / "manifest.json").read_text())
    data["files"] |= {name: describe_file(bundle / name) for name in names}
    write_manifest(bundle, data)


@pytest.fixture
def with_beginning(own_bundle: Path) -> Path:
    """A bundle whose token "[" begins a text, and whose "]" is a control token and ends one."""
    tokenizer = Tokenizer.from_file(str(own_bundle / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in "[]"])
    settings = {"bos_token": "[", "eos_token": "]", "add_bos_token": True}
    replace_tokenizer(own_bundle, tokenizer, tokenizer_config=settings)
    return own_bundle


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_standard_input_is_a_file(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standard_input(monkeypatch, b"\xef\xbb\xbf" + TEXT.encode())
    result = run(capsys, "score", tiny_bundle, "-")
    assert result.code == 0, result.err
    assert result.out.startswith(f"standard input: {len(TEXT) - 1} tokens scored")
    standard_input(monkeypatch, TEXT.encode("utf-16"))
    result = run(capsys, "read", tiny_bundle, "-", "-o", tmp_path / "state")
    assert result.code == 1
    assert "cannot read standard input as text: it is UTF-16" in result.err
    assert not (tmp_path / "state").exists()


def test_one_beginning_per_session(
    with_beginning: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, state = tmp_path / "text", tmp_path / "state"
    text.write_text(TEXT)
    for count in (len(TEXT) + 1, len(TEXT)):  # a fresh session, then one that has read
        options = ("--state", state) if state.exists() else ()
        result = run(capsys, "read", with_beginning, text, "-o", state, "--json", *options)
        assert json.loads(result.out)["read"] == count, result.err
    tokenizer = bundle_text_tokenizer(read_bundle(with_beginning))
    session = open_session(with_beginning)
    session.feed(tokenizer.encode(TEXT, start=True))
    session.feed(tokenizer.encode(TEXT, start=False))
    loaded = open_session(with_beginning)
    loaded.load_state(state)
    for name, array in session.state.items():
        assert (loaded.state[name] == array).all(), name
    result = run(capsys, "score", with_beginning, text, "--json")
    assert json.loads(result.out)["tokens"] == len(TEXT)


def test_control_tokens_are_text_unless_asked(
    with_beginning: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("[A B")
    counts = []
    for options in ((), ("--special",)):
        result = run(capsys, "score", with_beginning, tmp_path / "text", "--json", *options)
        counts.append(json.loads(result.out)["tokens"])
    assert counts == [4, 3]  # the beginning that is put in front; the one that the text has


@pytest.mark.parametrize("verb", ["read", "score"])
def test_too_little_and_too_much_text(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    text = tmp_path / "text"
    end = ("-o", tmp_path / "state") if verb == "read" else ()
    for content, count in (("", 0), ("A", 1)):
        text.write_text(content)
        result = run(capsys, verb, tiny_bundle, text, *end)
        assert result.code == 1
        assert f"'{text}' has {count} tokens; expected 2 or more" in result.err


def test_score_needs_two_tokens(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    result = run(capsys, "score", tiny_bundle, tmp_path / "text", "--tokens", 1)
    assert result.code == 1
    assert "--tokens is 1, but the first token is not scored" in result.err
    result = run(capsys, "score", tiny_bundle, tmp_path / "text", "--tokens", 2)
    assert result.out.startswith("text: 1 token scored")
    assert run(capsys, "score", tiny_bundle, tmp_path / "text", "--tokens", -1).code == 2


def test_few_tokens_of_a_long_file_are_quick(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more than a window is tokenized: what comes later may even be no text."""
    (tmp_path / "text").write_bytes(TEXT.encode() * 200_000 + b"\xff")
    sizes = []
    pieces = text_pieces.token_pieces

    def counted(tokenize: object, read: object, most: int = 0) -> object:
        def counting(text: str) -> object:
            sizes.append(len(text))
            return tokenize(text)  # type: ignore[operator] # a function

        return pieces(counting, read, most)  # type: ignore[arg-type] # functions

    monkeypatch.setattr("fwl_export.bundle.tokenizer.token_pieces", counted)
    result = run(capsys, "score", tiny_bundle, tmp_path / "text", "--tokens", 20)
    assert result.code == 0, result.err
    assert "19 tokens scored" in result.out
    assert sum(sizes) < 10_000


def test_unknown_characters_are_shown_as_a_warning(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("A é B É")
    result = run(capsys, "score", tiny_bundle, tmp_path / "text")
    assert result.err.count("warning: the tokenizer has no token for 'é' and reads it as ' '") == 1
    assert "TextWarning" not in result.err
    assert run(capsys, "score", tiny_bundle, tmp_path / "text", "-q").err == ""


def test_a_token_that_the_model_does_not_know(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_file(str(own_bundle / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    replace_tokenizer(own_bundle, tokenizer)
    (tmp_path / "text").write_text("A <pad> B")
    assert run(capsys, "score", own_bundle, tmp_path / "text").code == 0
    result = run(capsys, "score", own_bundle, tmp_path / "text", "--special")
    assert result.code == 1
    assert "the text contains '<pad>', which is token 64 of the tokenizer" in result.err


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_output_that_is_not_utf8(
    tiny_bundle: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    text = tmp_path / "tëxt 🙂.txt"
    text.write_text(TEXT, encoding="utf-8")
    main = "import sys; from fwl_export.cli.main import main; sys.exit(main())"
    commands = [
        ["read", tiny_bundle, text, "-o", tmp_path / "état"],
        ["score", tiny_bundle, text],
        ["generate", tiny_bundle, "--prompt", "café 🙂", "--max-new", "2"],
        ["generate", tiny_bundle, "--prompt", "café 🙂", "--max-new", "2", "--json"],
    ]
    for command in commands:
        words = [os.fsencode(str(word)) for word in [sys.executable, "-c", main, *command]]
        done = subprocess.run(words, env=os.environ | settings, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


def test_a_prompt_that_the_locale_could_not_decode() -> None:
    assert typed_text("café") == "café"
    assert typed_text("café 🙂".encode().decode("ascii", "surrogateescape")) == "café 🙂"
    assert typed_text("\udc80") == "\udc80"  # no text: the tokenizer says so

"""`fwl-export compare-adaptation`: output, files, and what a user can do wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from tests.bundles import TINY, tiny_model, tiny_tokenizer, write_checkpoint
from tests.cli.run import run

VERB = "compare-adaptation"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("THE QUICK BROWN FOX. " * 70)
    return path


def test_tables_and_files_are_written(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    options = ("--tuning-tokens", 200, "--segments", "32", "-o", folder)
    result = run(capsys, VERB, checkpoint, text, *options)
    assert result.code == 0, result.err
    for words in ("standard inference", "FWL, adapting", "dynamic evaluation, RMS, every 32"):
        assert words in result.out
    assert "expected embedding, p U^T" in result.out
    assert "reading in all ways" in result.err
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "results.md",
        "adaptation.png",
        "adaptation.svg",
    }
    written = json.loads((folder / "results.json").read_text())
    assert written["tokens"] == 1270
    assert set(written["methods"]) == {"standard", "adapting", "sgd", "rms"}
    again = run(capsys, VERB, checkpoint, text, "-o", folder)
    assert again.code == 1
    assert "is a comparison; choose another name or pass --force" in again.err
    other = run(capsys, VERB, checkpoint, text, "-o", text.parent, "--force")
    assert other.code == 1
    assert "exists and is not a comparison; choose another name" in other.err
    assert text.exists()


def test_a_shape_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY.to_dict()))
    result = run(capsys, VERB, "--shape", config, "--json")
    assert result.code == 0, result.err
    counted = json.loads(result.out)["flops_per_token"]
    assert counted["adapting, T = 1"]["fast logits, z' U"] == 2 * 16 * 64
    shown = run(capsys, VERB, "--shape", config)
    assert "fast logits, z' U" in shown.out
    wrong = run(capsys, VERB, "--shape", "gpt9")
    assert wrong.code == 1
    assert "gpt9" in wrong.err


def test_other_vocabularies_are_refused(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fwl_export.model.checkpoint import save_checkpoint

    larger = dataclasses.replace(TINY, vocab_size=70)
    save_checkpoint(tmp_path / "larger", tiny_model(config=larger), tiny_tokenizer(70))
    result = run(capsys, VERB, checkpoint, text, "--plain", tmp_path / "larger")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "vocabularies of 64 and 70 entries, so their perplexities cannot be" in result.err


def test_without_matplotlib_the_extra_is_named_before_any_work(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(capsys, VERB, checkpoint, tmp_path / "none.txt", "-o", tmp_path / "out")
    assert result.code == 1
    assert "plots need matplotlib, which is not installed; pip install 'fwl-export[plots]'" in (
        result.err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{checkpoint}", "{folder}/none.txt"), 1, "cannot read"),
        (("{checkpoint}", "{text}", "--max-tokens", "500"), 1, "leave 500 tokens to read"),
        (("{folder}/none", "{text}"), 1, "does not exist; expected a folder with"),
        (("{checkpoint}", "{text}", "--segments", "100"), 1, "expected divisors of 256"),
        (("{checkpoint}", "{text}", "--segments", "x"), 2, "expected numbers such as"),
        (("{checkpoint}",), 2, "at least one text file"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    checkpoint: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"checkpoint": checkpoint, "text": text, "folder": text.parent}
    result = run(capsys, VERB, *(argument.format(**places) for argument in arguments))
    assert result.code == code, result.err
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err

"""The verbs as a user meets them: what they print, and how they fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export import __version__
from fwl_export.cli.main import VERBS
from tests.bundles import MAX_TOKENS, write_checkpoint
from tests.cli.run import run

TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG. " * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_help_is_there_with_an_example_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (verb.__name__.replace("_", "-") for verb in VERBS):
        result = run(capsys, name, "--help")
        assert result.code == 0
        assert f"fwl-export {name}" in re.sub(r"^Usage:.*", "", result.out)
        assert max(map(len, result.out.splitlines())) <= 80, name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version").out.strip() == __version__


def test_a_wrong_command_line_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["exprot"], ["score"], ["score", "a", "b", "--tokenz", "1"]):
        result = run(capsys, *arguments)
        assert result.code == 2
        assert "Traceback" not in result.err


def test_export_and_refusal_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    arguments = ("export", checkpoint, "-o", tmp_path / "out", "--max-tokens", MAX_TOKENS)
    result = run(capsys, *arguments)
    assert result.code == 0, result.err
    assert "fp32, opset 20, 2 fast-weight updates" in result.out
    result = run(capsys, *arguments)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "pass --force to replace it" in result.err


def test_export_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "export", tmp_path / "nothing", "-o", tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert "does not exist; expected a folder with config.json" in result.err
    result = run(capsys, "export", "demo", "-o", tmp_path / "out", "--precision", "fp8")
    assert result.code == 1
    assert "precision is 'fp8'; expected fp32 or fp16" in result.err


def test_score_prints_both_perplexities(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "score", tiny_bundle, text, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["tokens"] == len(TEXT) - 1
    assert data["perplexity"]["adapting"] != data["perplexity"]["adaptation_off"]
    assert data["tokens_per_second"]["adapting"] > 0
    result = run(capsys, "score", tiny_bundle, text, "--tokens", "50", "--runtime", "torch")
    assert "49 tokens scored, torch" in result.out


def test_score_equals_the_parallel_form(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from tests.bundles import tiny_model, tiny_tokenizer

    ids = torch.tensor([tiny_tokenizer().encode(TEXT).ids])
    fast, slow = tiny_model()(ids[:, :-1], ids[:, 1:])
    data = json.loads(run(capsys, "score", tiny_bundle, text, "--json").out)
    for name, logits in (("adapting", fast), ("adaptation_off", slow)):
        expected = cross_entropy(logits[0], ids[0, 1:]).exp().item()
        # Two float32 programs; a perplexity has the relative error of the mean loss.
        assert data["perplexity"][name] == pytest.approx(expected, rel=1e-5, abs=0)


def test_generate_is_reproducible(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*more: str) -> str:
        result = run(capsys, "generate", tiny_bundle, "--prompt", "THE", "--max-new", "40", *more)
        assert result.code == 0, result.err
        return result.out

    assert generate("--seed", "1") == generate("--seed", "1")
    assert generate("--seed", "1") != generate("--seed", "2")
    assert generate("--temperature", "0") == generate("--temperature", "0", "--seed", "5")
    assert generate("--seed", "1").startswith("THE")
    assert generate("--temperature", "0") != generate("--temperature", "0", "--read", str(text))
    assert generate("--temperature", "0") != generate("--temperature", "0", "--no-learn")


def test_inspect_lists_state_files_and_ops(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "inspect", tiny_bundle).out
    assert "fast.up.kernel" in out
    assert "model.onnx.data" in out
    assert "fwl::LinearAttentionUpdate 2" in out
    lines = [line for line in out.splitlines() if str(tiny_bundle) not in line]
    assert max(map(len, lines)) <= 80
    data = json.loads(run(capsys, "inspect", tiny_bundle, "--json").out)
    assert data["ops"]["fwl::LinearAttentionUpdate"] == 2
    assert data["engines"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"\xff\xfe", "cannot read"), (b"", "has 0 tokens; expected 2")],
)
def test_an_unusable_text(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    result = run(capsys, "score", tiny_bundle, path)
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_unusable_prompt_or_runtime(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "generate", tiny_bundle, "--prompt", "")
    assert "the prompt is empty" in result.err
    result = run(capsys, "generate", tiny_bundle, "--prompt", "A", "--runtime", "jax")
    assert "runtime 'jax' is unknown; expected onnxruntime, tensorrt, torch" in result.err
    result = run(capsys, "generate", tmp_path, "--prompt", "A")
    assert "is not a bundle" in result.err
    assert result.code == 1


def test_a_bug_shows_its_traceback_and_a_full_disk_does_not(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.onnx")

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fwl_export.bundle.manifest.read_bundle", full)
    result = run(capsys, "inspect", tiny_bundle)
    assert (result.code, result.err) == (1, "error: No space left on device: 'model.onnx'\n")
    monkeypatch.setattr("fwl_export.bundle.manifest.read_bundle", bug)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "inspect", tiny_bundle)


def test_help_answers_without_loading_what_it_does_not_need() -> None:
    code = (
        "import sys; sys.argv = ['fwl-export', '--help']\n"
        "from fwl_export.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnx', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_text_is_read_once_and_answered_from(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "manual.txt"
    text.write_text("a state")  # so short that its factors are smaller
    state = tmp_path / "manual.state"
    result = run(capsys, "read", tiny_bundle, text, "-o", state, "--compress", "lowrank")
    assert result.code == 0, result.err
    assert max(len(line) for line in result.out.splitlines() if str(state) not in line) <= 80
    quiet = run(capsys, "read", tiny_bundle, text, "-o", tmp_path / "b", "--json")
    read = json.loads(quiet.out)
    assert read["tokens"] == [read["read"]]
    assert read["file_bytes"] > state.stat().st_size > 0
    arguments = ("generate", tiny_bundle, "--prompt", "a row", "--max-new", "6", "--seed", "1")
    answers = [
        run(capsys, *arguments, *more).out
        for more in (("--state", tmp_path / "b"), ("--read", text), ())
    ]
    assert answers[0] == answers[1] != answers[2]
    on = run(capsys, "score", tiny_bundle, text, "--state", state, "--json")
    fresh = run(capsys, "score", tiny_bundle, text, "--json")
    assert json.loads(on.out)["perplexity"] != json.loads(fresh.out)["perplexity"]


def test_a_state_that_cannot_be_used(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "a.state"
    state.write_text("no state")
    result = run(capsys, "generate", tiny_bundle, "--prompt", "a", "--state", state)
    assert (result.code, "is not a state file" in result.err) == (1, True)
    result = run(capsys, "read", tiny_bundle, state, "-o", tmp_path / "b", "--compress", "zip")
    assert (result.code, "--compress is 'zip'" in result.err) == (1, True)
    assert not (tmp_path / "b").exists()

"""`fwl-export precision` as a user meets it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.cli.precision import _checkpoint_of, _next_step
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.precision.policy import PrecisionPolicy, parts, read_policy, write_policy
from tests.cli.run import run

TEXT = "EXIT, PURSUED BY A BEAR. "

FEW = ("--tokens", 8, "--confirm-tokens", 8)
WIDE = ("--max-kl", 1, "--max-perplexity-increase", 1, "--max-state-error", 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(TEXT)
    return path


def test_a_policy_is_found_written_and_printed(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "policy.json"
    options = ("--target", "bf16", "--text", text, "-o", target, *FEW, *WIDE)
    result = run(capsys, "precision", tiny_bundle, *options)
    assert result.code == 0, result.err
    policy = read_policy(target)
    assert policy.target == "bf16"
    assert not policy.excluded
    for name in policy.quantized:
        assert name in result.out
    assert f"wrote {target}" in result.out
    assert "`export` takes no bf16 policy" in result.out
    again = run(capsys, "precision", tiny_bundle, *options, "--json")
    assert json.loads(again.out) == json.loads(target.read_text())


def test_an_unknown_target_is_refused_in_one_sentence(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "policy.json"
    result = run(capsys, "precision", tiny_bundle, "--target", "fp4", "-o", target, "--text", text)
    assert result.code == 1
    assert result.err.splitlines() == ["error: target is 'fp4'; expected fp16 or bf16 or int8w"]
    assert not target.exists()


def test_the_command_that_is_printed_for_a_bundle_works(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny bundle has calls of up to 16 tokens, which are not the usual number."""
    policy = tmp_path / "my policy.json"
    checkpoint = _checkpoint_of(str(tiny_bundle))
    names = tuple(parts(load_checkpoint(checkpoint).model, "fp16"))
    write_policy(policy, PrecisionPolicy("fp16", names, ()))
    printed = _next_step("fp16", str(tiny_bundle), checkpoint, policy)
    words = shlex.split(printed.removeprefix("next: "))
    assert words[-2:] == ["--max-tokens", "16"]
    words[words.index("BUNDLE")] = str(tmp_path / "bundle")
    result = run(capsys, *words[1:])
    assert result.code == 0, result.err
    assert read_bundle(tmp_path / "bundle").manifest.max_tokens == 16


def test_a_language_model_without_a_layer_is_no_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run(capsys, "precision", tmp_path)
    assert result.code == 1
    assert "without a Fast Weight Layer; export it, and give the bundle" in result.err

"""Bundles with Hugging Face backbones: ONNX Runtime computes what PyTorch does, up to their end."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.engines import build_engines
from fwl_export.errors import TokenError
from fwl_export.export import export_bundle
from fwl_export.model.checkpoint import save_checkpoint
from fwl_export.parity import check_bundle
from fwl_export.runtimes import open_session
from fwl_export.runtimes.text import score_ids
from tests.backbones import (
    LIMIT,
    VOCABULARY,
    tiny_pretrained,
    write_backbone,
    write_layer,
)
from tests.bundles import tiny_tokenizer
from tests.cli.run import run
from tests.tolerances import assert_close

MAX_TOKENS = 16


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, count)


def exported(folder: Path, name: str, precision: str = "fp32") -> Bundle:
    save_checkpoint(folder / "checkpoint", tiny_pretrained(name), tiny_tokenizer(VOCABULARY - 3))
    return export_bundle(
        folder / "checkpoint", folder / "bundle", precision=precision, max_tokens=MAX_TOKENS
    )


def assert_checked(bundle: Bundle, tokens: int) -> None:
    report = check_bundle(bundle, random_ids(tokens + 1), tokens)
    assert report.passed, report.problems()


@pytest.mark.slow
def test_absolute_positions_end_in_every_runtime(tmp_path: Path) -> None:
    bundle = exported(tmp_path, "GPT-2")
    assert_checked(bundle, 2 * LIMIT)  # as far as the model goes
    ids = random_ids(LIMIT + 1)
    results = []
    for runtime in ("onnxruntime", "torch"):
        session = open_session(bundle, runtime, batch=2)
        session.feed(np.stack([ids[:90], ids[:90]]), lengths=[90, 3])
        message = "row 0 has read 90 tokens and would read 7 more, but this model reads at most 96"
        with pytest.raises(TokenError, match=message):
            session.feed(np.stack([ids[90:97], ids[3:10]]))
        assert session.positions == [90, 3]
        results.append(session.feed(np.stack([ids[90:96], ids[3:9]])))
        session.reset([0])
        session.feed(np.stack([ids[:7], ids[9:16]]))
    assert_close("runtime.float32", *results)
    other = session.another()
    with pytest.raises(TokenError, match=re.escape("(`--tokens 97`)")):
        score_ids(other, random_ids(LIMIT + 2))
    assert score_ids(other, ids).tokens == LIMIT
    (engine,) = build_engines(bundle, sms=[89], plugin="none", max_batch=2)
    assert (engine.sm, engine.precision) == (89, "fp32")


@pytest.mark.slow
def test_a_sliding_window_reads_without_end(tmp_path: Path) -> None:
    assert_checked(exported(tmp_path, "Mistral"), 5 * LIMIT)


@pytest.mark.slow
def test_a_backbone_in_float16(tmp_path: Path) -> None:
    bundle = exported(tmp_path, "Llama", "fp16")
    assert_checked(bundle, LIMIT)
    assert {s.dtype for s in bundle.manifest.state if s.name.startswith("cache")} == {"float16"}


@pytest.mark.slow
def test_export_of_a_backbone_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = write_backbone(tmp_path / "backbone", "Gemma 2")
    layer = write_layer(tmp_path / "layer", tiny_pretrained("Gemma 2"))
    both = ("export", "--backbone", backbone, "--fwl", layer, "-o", tmp_path / "out")
    result = run(capsys, *both, "--context", 40, "--max-tokens", MAX_TOKENS)
    assert result.code == 0, result.err
    assert result.out.endswith("a session ends after 40 tokens\n")
    bundle = read_bundle(tmp_path / "out")
    assert_checked(bundle, 40)
    config = bundle.manifest.config
    assert (config.fast_weights.logit_softcap, config.backbone.max_positions) == (3.0, 40)
    embeddings = VOCABULARY * 16 * 4
    assert (bundle.folder / "model.onnx.data").stat().st_size < tensors_of(bundle) + embeddings
    shown = run(capsys, "inspect", tmp_path / "out").out
    assert "gemma2 (Hugging Face), width 16, window 40 (ends at 40), vocabulary 64" in shown


def tensors_of(bundle: Bundle) -> int:
    return (bundle.folder / "checkpoint" / "model.safetensors").stat().st_size


def test_refusals_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = write_backbone(tmp_path / "backbone", "GPT-2")
    layer = write_layer(tmp_path / "layer", tiny_pretrained("GPT-2"))
    both = ("export", "--backbone", backbone, "--fwl", layer, "-o", tmp_path / "out")
    capsys.readouterr()  # drop what transformers prints when it saves
    result = run(capsys, *both, "--context", LIMIT + 1)
    assert (result.code, result.out) == (1, "")
    errors = [line for line in result.err.splitlines() if not line.startswith("export: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: context is 97, but this gpt2 model was made for 96 tokens")
    result = run(capsys, "export", "--backbone", tmp_path / "no", "--fwl", layer, "-o", backbone)
    assert result.code == 1
    assert "exists and is not a bundle" in result.err
    for arguments in (
        ["-o", "out"],
        ["demo", "--fwl", "x", "-o", "out"],
        ["demo", "--backbone", "x", "--fwl", "y", "-o", "out"],
    ):
        assert run(capsys, "export", *arguments).code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "layer"]

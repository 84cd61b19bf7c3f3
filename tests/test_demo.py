"""What ships: the checkpoint, its model card, and the play that was held out of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fwl_export import demo
from fwl_export.adaptation import CHUNK, AdaptingReader, PlainReader, iterate_losses, perplexity
from fwl_export.bundle.tokenizer import read_ids
from fwl_export.model.checkpoint import load_checkpoint
from tests.bundles import write_checkpoint
from tests.cli.run import run


def test_the_checkpoint_is_small_and_has_a_card() -> None:
    files = {path.name: path.stat().st_size for path in demo.CHECKPOINT.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) <= 16e6
    assert sum(p.numel() for p in load_checkpoint(demo.CHECKPOINT).model.parameters()) >= 3_000_000


def test_adaptation_lowers_the_perplexity_of_the_held_out_play() -> None:
    loaded = load_checkpoint(demo.CHECKPOINT)
    tokens = torch.from_numpy(read_ids(demo.HELD_OUT_PLAY, loaded.tokenizer)[:4097])
    found = {
        name: perplexity(np.concatenate(list(iterate_losses(reader, tokens, CHUNK))))
        for name, reader in (
            ("adapting", AdaptingReader(loaded.model)),
            ("off", PlainReader(loaded.model)),
        )
    }
    assert found["adapting"] < 0.8 * found["off"]


@pytest.mark.slow
def test_the_demo_exports_builds_checks_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    play = tmp_path / "play.txt"
    play.write_text("ONCE MORE UNTO THE BREACH, DEAR FRIENDS. " * 60)
    monkeypatch.setattr(demo, "CHECKPOINT", write_checkpoint(tmp_path / "checkpoint"))
    monkeypatch.setattr(demo, "HELD_OUT_PLAY", play)
    result = run(capsys, "demo", "-o", tmp_path / "bundle", "--sm", "89")
    assert result.code == 0, result.err
    assert "[4/4] fwl-export score" in result.out
    summary = result.out.partition("Summary")[2]
    assert "engines   1 TensorRT-RTX" in summary
    assert "adapting" in summary
    assert "within budget" in result.out
    assert len(list((tmp_path / "bundle" / "engines").glob("rtx-*-sm89-fp32.engine"))) == 1

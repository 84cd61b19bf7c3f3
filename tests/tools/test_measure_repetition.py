"""The tool that reads single tokens hundreds of times, in half precision and in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fwl_export.export import export_bundle
from fwl_export.model.checkpoint import save_checkpoint
from tests.bundles import tiny_tokenizer
from tests.model.models import VOCABULARY, small_model
from tools import measure_repetition

LARGEST = 65504  # of float16


@pytest.fixture(scope="module")
def fresh_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in fp16 that forgets nothing, and whose sums exceed what float16 holds."""
    folder = tmp_path_factory.mktemp("repetition")
    model = small_model("tensorflow").float()
    model.backbone.norm.weight *= 100
    for step in model.fast_weights.steps.values():
        step.mul_(1e-3)
    save_checkpoint(folder / "checkpoint", model, tiny_tokenizer(VOCABULARY))
    export_bundle(folder / "checkpoint", folder / "bundle", precision="fp16", max_tokens=64)
    return folder / "bundle"


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_no_token_breaks_a_model_in_half_precision(
    fresh_bundle: Path, runtime: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--tokens", "32", "--repeats", "256", "--rows", "32", "--runtime", runtime]
    assert measure_repetition.main([str(fresh_bundle), *asked]) == 0
    *_, summary, line = capsys.readouterr().out.splitlines()
    assert summary == "0 of 32 not finite"
    tokens = json.loads(line)["tokens"]
    assert len(tokens) == 32
    assert max(token["largest_sum"] for token in tokens) > LARGEST
    # Rounding to 11 bits; the repeated token has a log-probability of size 4.
    assert max(token["nats"] for token in tokens) < 0.03


def test_what_is_not_finite_is_counted(
    fresh_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = measure_repetition.TorchRunner.run

    def broken(self, call, past, present):
        logits = np.array(run(self, call, past, present))
        if self.streaming.model.fast_weights.unembed.dtype == torch.float16:
            logits[1, 33] = np.nan
        return logits

    monkeypatch.setattr(measure_repetition.TorchRunner, "run", broken)
    asked = ["--tokens", "2", "--repeats", "40", "--rows", "2", "--runtime", "torch"]
    assert measure_repetition.main([str(fresh_bundle), *asked]) == 1
    table = capsys.readouterr().out
    assert "until 33" in table
    assert "1 of 2 not finite" in table

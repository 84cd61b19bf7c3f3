"""The search for the parts that must stay in float32."""

from __future__ import annotations

import numpy as np
import pytest

from fwl_export.errors import ConfigError
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.parity.precision_search import Explorer, Limits
from tests.bundles import MAX_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer


def explorer(limits: Limits) -> Explorer:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 100)
    model = tiny_model()
    # Too large for float16: this weight, and the activations that it gives to the next product.
    model.backbone.get_submodule("blocks.1.up").weight[0, 0] = 1e6
    model.backbone.get_submodule("blocks.1.down").weight[:, 0] = 0.0
    return Explorer(Checkpoint(model, tiny_tokenizer()), ids, "fp16", limits, MAX_TOKENS)


def test_only_the_parts_that_break_are_excluded() -> None:
    found = explorer(Limits(1e-2, 1e-1, 0.5)).search(tokens=24, confirm_tokens=32)
    assert found.everything.failure
    assert found.policy.excluded == ["backbone.blocks.1.up", "backbone.blocks.1.down"]
    assert found.confirmed["PyTorch"].use(Limits(1e-2, 1e-1, 0.5)) <= 1
    assert set(found.policy.measured["lowered_alone"]) == set(found.alone)


def test_limits_below_float32_itself_are_refused() -> None:
    with pytest.raises(ConfigError, match="even float32 is outside the limits"):
        explorer(Limits(1e-30, 1e-30, 1e-30)).search(tokens=16, confirm_tokens=16)

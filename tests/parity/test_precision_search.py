"""The search for the parts that must stay in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fwl_export.errors import ConfigError
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.parity.precision_search import Explorer, Limits
from fwl_export.precision.policy import PrecisionPolicy
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


def test_what_is_recommended_passes_check() -> None:
    """Parts are excluded until the check passes; what it tried is in the policy."""
    wide = Limits(1e9, 1e9, 1e9)
    ranked: list[int] = []

    def checked(policy: PrecisionPolicy) -> Any:
        ranked.append(len(policy.excluded))
        passes = len(ranked) == 3
        candidate = SimpleNamespace(name="onnxruntime", use=0.5, not_finite=None)
        return SimpleNamespace(
            passed=passes,
            candidates=[candidate],
            coverage={"rows": [1, 8]},
            problems=lambda: ["onnxruntime failed in case 'far'"],
        )

    found = explorer(wide).search(tokens=16, confirm_tokens=16, check_policy=checked)
    assert ranked == [ranked[0], ranked[0] + 1, ranked[0] + 2]
    assert len(found.policy.excluded) == ranked[-1]
    assert found.policy.measured["check"] == {
        "uses": {"onnxruntime": 0.5},
        "coverage": {"rows": [1, 8]},
    }


def test_a_model_that_fails_check_in_float32_is_refused() -> None:
    failing = SimpleNamespace(
        passed=False, problems=lambda: ["it is wrong in case 'far'"], candidates=[]
    )
    with pytest.raises(ConfigError, match="even float32 fails `check`: it is wrong in case 'far'"):
        explorer(Limits(1e9, 1e9, 1e9)).search(16, 16, check_policy=lambda policy: failing)

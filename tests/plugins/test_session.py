"""A whole model with libfwl_ort gives the logits and the state of the model without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from tests.bundles import VOCABULARY
from tests.tolerances import assert_close


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_plugin_agrees_with_the_function_body(
    ort_library: Path, tiny_bundle: Path, tiny_bundle_fp16: Path, precision: str
) -> None:
    bundle = tiny_bundle if precision == "fp32" else tiny_bundle_fp16
    row = "runtime.float32" if precision == "fp32" else "runtime.float16"
    ours, body = (
        open_session(bundle, batch=3, threads=2, plugin=plugin) for plugin in (ort_library, "none")
    )
    rng = np.random.default_rng(0)
    for lengths in ([5, 5, 5], [1, 0, 1], [16, 3, 0], [1, 1, 1]):
        tokens = rng.integers(0, VOCABULARY, (3, max(lengths)))
        assert_close(
            row, ours.feed(tokens, lengths=lengths), body.feed(tokens, lengths=lengths), "logits"
        )
    for name, array in ours.state.items():
        assert_close(row, array, body.state[name], name)

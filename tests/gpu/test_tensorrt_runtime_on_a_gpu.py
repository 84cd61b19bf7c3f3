"""Sessions that run engines built on this machine for its own GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.bundle.manifest import read_bundle
from fwl_export.engines import VARIANTS, build_engines, probe_variant, query_driver
from fwl_export.plugins import TENSORRT, find_plugin
from fwl_export.runtimes import Session
from tests.bundles import VOCABULARY
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

CALLS = ([5, 5], [1, 1], [1, 0], [1, 1], [40, 9], [1, 1], [1, 1], [1, 1])


def engine(bundle: Path, variant: str, **options: Any) -> None:
    """Build an engine for this GPU, or skip with the reason why that is impossible."""
    (device, *_) = query_driver().devices
    probe = probe_variant(variant)
    if device.sm not in probe.sms:
        pytest.skip(probe.reason or f"{VARIANTS[variant].title} has no SM{device.sm}")
    if options and find_plugin(TENSORRT) is None:
        pytest.skip(f"{TENSORRT} is not built; run `make plugins`")
    build_engines(read_bundle(bundle), variant, [device.sm], **{"plugin": "none", **options})


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def assert_same(found: Session, expected: Session, precision: str = "float32") -> None:
    for call, lengths in enumerate(CALLS):
        tokens = ids(2, max(lengths), seed=call)
        a, b = (session.feed(tokens, lengths=lengths) for session in (found, expected))
        assert_close(f"runtime.{precision}", a, b)
    if precision == "float32":
        for name, array in expected.state.items():
            assert_close("runtime.float32", found.state[name], array, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"plugin": "required"}, {"plugin": "required", "in_place_state": True}],
    ids=["body", "plugin", "in_place"],
)
def test_equals_onnxruntime(
    own_bundle: Path, variant: str, cuda_graph: bool, options: dict[str, Any]
) -> None:
    engine(own_bundle, variant, **options)
    session = open_session(own_bundle, "tensorrt", 2, variant=variant, cuda_graph=cuda_graph)
    assert_same(session, open_session(own_bundle, batch=2))
    captured = [each._graphs for each in session._runner._contexts.values()]  # type: ignore[attr-defined]
    assert any(captured) == cuda_graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_files_between_runtimes(own_bundle: Path, tmp_path: Path, variant: str) -> None:
    engine(own_bundle, variant)
    text, path = ids(60), tmp_path / "text.state"
    expected = open_session(own_bundle).feed(text, last_only=True)
    for names in (("tensorrt", "onnxruntime"), ("onnxruntime", "tensorrt"), ("torch", "tensorrt")):
        reader, session = (open_session(own_bundle, name) for name in names)
        reader.feed(text[:37])
        reader.save_state(path)
        session.load_state(path)
        assert_close("runtime.float32", session.feed(text[37:], last_only=True), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fork_reset_and_other_sessions(own_bundle: Path, variant: str) -> None:
    engine(own_bundle, variant)
    session = open_session(own_bundle, "tensorrt", 2)
    fresh = session.feed(ids(2, 20))
    session.fork(0, [1])
    text = np.tile(ids(5), (2, 1))
    a, b = session.feed(text)
    np.testing.assert_array_equal(a, b)
    session.reset()
    np.testing.assert_array_equal(session.feed(ids(2, 20)), fresh)
    np.testing.assert_array_equal(session.another(2).feed(ids(2, 20)), fresh)

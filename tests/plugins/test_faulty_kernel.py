"""`check` and `bisect` find a kernel that ignores its last tile, compiled from the real sources."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fwl_export.bisect import bisect_bundle
from fwl_export.bundle.manifest import read_bundle
from fwl_export.parity import check_bundle
from fwl_export.parity.candidates import Candidate
from fwl_export.runtimes import open_session
from tests.bundles import VOCABULARY
from tests.parity.planted import KERNEL_FAULT, ROWS, TABLE
from tests.plugins.builds import PLUGINS, run

TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)
TOKENS = 120
UPDATE = "fwl::LinearAttentionUpdate"

# The loops over the rows of the state in a call of few tokens: whole tiles, then other rows.
CHANGES = {
    "row + kSweepRows <= block.row_end; row += kSweepRows": (
        "row + kSweepRows < block.row_end; row += kSweepRows"
    ),
    "for (; row < block.row_end; ++row)": "for (; row < 0; ++row)",
}


@pytest.fixture(scope="module")
def faulty_library(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libfwl_ort whose loop over the tiles of the state's rows ends one tile too early."""
    sources = tmp_path_factory.mktemp("faulty")
    for name in ("kernels", "onnxruntime"):
        shutil.copytree(PLUGINS / name, sources / name)
    shutil.copy(PLUGINS / "op_spec.h", sources)
    kernel = sources / "kernels" / "cpu" / "kernels.inl"
    text = kernel.read_text()
    for right, wrong in CHANGES.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    kernel.write_text(text)
    cache = (libraries / "CMakeCache.txt").read_text()
    headers = re.search(r"^FWL_ONNXRUNTIME_INCLUDE_DIR:\w+=(.+)$", cache, re.MULTILINE)
    assert headers is not None
    library = sources / "libfaulty.so"
    cpu = sources / "kernels" / "cpu"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    files = [cpu / "linear_attention_update.cpp", cpu / "portable.cpp"]
    files += [sources / "onnxruntime" / name for name in ("operator.cpp", "library.cpp")]
    run("c++", *flags, "-I", sources, "-isystem", headers[1], *files, "-o", library)
    return library


def test_it_is_caught_and_located(faulty_library: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert KERNEL_FAULT in TABLE.read_text(encoding="utf-8")
    bundle = read_bundle(tiny_bundle)
    session = open_session(bundle, batch=ROWS, threads=1, plugin=faulty_library)
    report = check_bundle(bundle, TEXT, TOKENS, candidates={"faulty": session}, cases="text")
    (candidate,) = report.to_dict()["candidates"]
    assert candidate["status"] == "outside"
    outside = {
        tensor["name"]
        for run in candidate["runs"]
        for tensor in run["tensors"]
        if tensor["use"] is None or tensor["use"] > 1
    }
    assert "fast.up.kernel" in outside

    candidate = Candidate("faulty", "onnxruntime", {"plugin": faulty_library})
    found = bisect_bundle(bundle, TEXT, candidate, TOKENS, reproducer=tmp_path / "repro")
    assert found.finding is not None
    assert (found.finding.op_type, found.finding.module) == (UPDATE, "fast_weights.fast/learned")
    assert found.finding.fault == "runtime", found.to_text()
    assert list(found.finding.nodes) == [found.finding.node]
    assert found.reproduces
    assert bisect_bundle(bundle, TEXT, "onnxruntime:no-plugin", 30).finding is None

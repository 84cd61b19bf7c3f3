"""libfwl's readers survive random files: no crash, no hang, no allocation of a gigabyte.

For a longer search set FWL_FUZZ_INPUTS, the number of files for each reader. With Clang, build with
-DFWL_FUZZ=ON, and run the programs in `fuzz/` with libFuzzer's options.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export import open_session
from fwl_export.bundle.state_file import COMPRESSIONS
from tests.plugins.builds import built

INPUTS = os.environ.get("FWL_FUZZ_INPUTS", "10000")
TARGETS = ("state", "manifest", "onnx", "engine")
COLUMNS = ("target", "inputs", "refused", "accepted", "crashes", "hangs", "peak_mib")


@pytest.fixture(scope="module")
def fuzzers(builds: Path) -> Path:
    """The folder of the fuzzers."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the driver needs GCC's sanitizers on Linux")
    options = ("ONNXRUNTIME=OFF", "GPU=OFF", "TENSORRT=OFF", "FUZZ=ON")
    compiler = "-DCMAKE_CXX_COMPILER=g++"
    definitions = (f"-DFWL_{option}" for option in options)
    targets = [f"fuzz_{target}" for target in TARGETS]
    return built(builds, "fuzz", compiler, *definitions, targets=targets) / "fuzz"


@pytest.fixture
def found(tiny_bundle: Path, tmp_path: Path) -> dict[str, list[Path]]:
    """Real files that the readers are to meet, besides the seeds of the fuzzers."""
    session = open_session(tiny_bundle, plugin="none", threads=1)
    session.feed([1, 2, 3])
    states = [tmp_path / kind for kind in COMPRESSIONS]
    for path in states:
        session.save_state(path, compress=path.name)
    return {
        "state": states,
        "manifest": [tiny_bundle / "manifest.json"],
        "onnx": [tiny_bundle / "model.onnx"],
        "engine": [],
    }


@pytest.mark.parametrize("target", TARGETS)
def test_readers_survive(
    fuzzers: Path, found: dict[str, list[Path]], tmp_path: Path, target: str
) -> None:
    done = subprocess.run(
        [fuzzers / f"fuzz_{target}", "--inputs", INPUTS, *found[target]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)
    print(*(f"{name} {row[name]}" for name in COLUMNS), sep=", ")
    assert row["inputs"] == int(INPUTS) + len(found[target])
    assert row["refused"] > row["inputs"] / 2
    assert row["accepted"] > row["inputs"] / 200
    assert row["peak_mib"] < 1024


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crash", "heap-buffer-overflow"),
        ("hang", "it hangs"),
        ("memory", "exceeds maximum supported size"),
    ],
)
def test_a_fuzzer_notices(fuzzers: Path, tmp_path: Path, kind: str, message: str) -> None:
    done = subprocess.run(
        [fuzzers / "fuzz_state", "--inputs", "3", "--fail", kind],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert (tmp_path / "crash-fuzz_state").stat().st_size > 0

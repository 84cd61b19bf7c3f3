"""Loading and exporting take memory in proportion to the weights, without needless copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.model.checkpoint import save_checkpoint
from fwl_export.model.language_model import FWLModel
from tests.bundles import tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_VOCABULARY, _WIDTH = 50_000, 256

_SCRIPT = """
import sys
from pathlib import Path
import torch
from fwl_export.export.trace import export_onnx
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.precision.policy import in_precision

def high() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = high()
    result = action()
    return result, high() - before

folder = Path(sys.argv[1])
load_checkpoint(folder / "small")  # what is imported and allocated only once

read = lambda name: (folder / "large" / name).read_bytes()
loaded, one = peak(lambda: load_checkpoint(folder / "large", read).model)
double, two = peak(lambda: in_precision(loaded, "fp64"))
same, three = peak(lambda: in_precision(loaded, "fp32"))
del double, same
export_onnx(load_checkpoint(folder / "small").model, folder / "small.onnx", "fp32", 4, 20)
_, four = peak(lambda: export_onnx(loaded, folder / "large.onnx", "fp32", 4, 20))
print(one, two, three, four)
"""


def write_model(folder: Path, vocabulary: int, width: int) -> int:
    """Write a checkpoint; returns the bytes of its weights."""
    backbone = BackboneConfig(width=width, layers=1, heads=1, window=8)
    config = ModelConfig(vocabulary, backbone, FastWeightsConfig(width, width, width))
    save_checkpoint(folder, FWLModel(config), tiny_tokenizer(vocabulary))
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_weights_are_in_memory_once_or_twice(tmp_path: Path) -> None:
    write_model(tmp_path / "small", 64, 16)
    weights = write_model(tmp_path / "large", _VOCABULARY, _WIDTH)
    assert weights > 100e6
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    load, double, same, export = (int(number) / weights for number in found[-4:])
    # Each of the two large tensors is half of the weights.
    assert load < 2.8, "the file's content, and its tensors or the model; one tensor more"
    assert double < 2.3, "the float64 copy, and one parameter in float32"
    assert same < 0.1, "a float32 model shares its weights"
    assert export < 1.3, "weights go to the file one by one; the largest may be copied"

"""Show one wrong tensor: run the nodes in repro.onnx and compare with what was expected.

Run it with `python repro.py`, or, if the nodes need a library of custom operators, with
`python repro.py LIBRARY`. Exit code 0: the tensor is right; 1: it is outside its budget.

`fwl-export bisect` copies this file byte for byte beside the data, whatever the model is called or
contains. Names come from repro.json and stay data; nothing here is generated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

FOLDER = Path(__file__).resolve().parent


def with_onnxruntime(model: Path, output: str, inputs: Arrays, libraries: Sequence[str]) -> Any:
    """Return the tensor as ONNX Runtime computes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for library in libraries:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(model), options).run([output], inputs)[0]


def with_onnx_reference(model: Path, output: str, inputs: Arrays, _: Sequence[str]) -> Any:
    """Return the tensor as ONNX's reference evaluator computes it."""
    from onnx.reference import ReferenceEvaluator

    (found,) = ReferenceEvaluator(str(model)).run([output], dict(inputs))
    return found


RUNTIMES = {"onnxruntime": with_onnxruntime, "onnx-reference": with_onnx_reference}


def main() -> int:
    """Compute the tensor and print its largest difference; returns the exit code."""
    settings = json.loads((FOLDER / "repro.json").read_text(encoding="utf-8"))
    arrays = np.load(FOLDER / "arrays.npz", allow_pickle=False)
    inputs = {name: arrays[key] for name, key in settings["inputs"].items()}
    run = RUNTIMES[settings["runtime"]]
    found = run(FOLDER / "repro.onnx", settings["tensor"], inputs, sys.argv[1:])
    expected = arrays["expected"]
    difference = np.abs(np.asarray(found, np.float64) - expected)
    largest, allowed = float(difference.max()), float(settings["largest_allowed_difference"])
    place = np.argwhere(difference == difference.max())[:1].tolist()
    rms = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-300))
    allowed_rms = float(settings["largest_allowed_relative_rms"])
    print(
        f"{settings['tensor']!a}: max abs {largest:.6g} at {place}, allowed {allowed:.6g}; "
        f"relative RMS {rms:.6g}, allowed {allowed_rms:.6g}"
    )
    # Negated, so that NaN counts as wrong.
    return int(not (largest <= allowed and rms <= allowed_rms))


if __name__ == "__main__":
    sys.exit(main())

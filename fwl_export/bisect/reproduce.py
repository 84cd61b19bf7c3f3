"""Write a small program that computes one wrong tensor with only the nodes it needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwl_export.bisect.expose import open_probe
from fwl_export.bisect.locate import Located
from fwl_export.bundle.state import Array
from fwl_export.errors import FwlError
from fwl_export.parity.candidates import Candidate

if TYPE_CHECKING:
    import onnx


MODEL_FILE = "repro.onnx"
SCRIPT_FILE = "repro.py"

_RUN = {
    "onnxruntime": """import onnxruntime as ort

options = ort.SessionOptions()
for library in sys.argv[1:]:  # custom-op libraries
    options.register_custom_ops_library(library)
found = ort.InferenceSession("repro.onnx", options).run([NAME], dict(np.load("inputs.npz")))[0]""",
    "onnx-reference": """from onnx.reference import ReferenceEvaluator

found = ReferenceEvaluator("repro.onnx").run([NAME], dict(np.load("inputs.npz")))[0]""",
}
_SCRIPT = '''"""Shows one wrong tensor. Run in this folder: python repro.py{library}"""
import sys

import numpy as np
{run}
expected = np.load("expected.npz")["expected"]
difference = np.abs(np.asarray(found, np.float64) - expected)
print(NAME, "max abs", difference.max(), "at", np.argwhere(difference == difference.max())[:1])
sys.exit(bool(not difference.max() <= {limit!r}))  # the largest difference that is allowed
'''


@dataclass(frozen=True)
class Reproduced:
    """Result of running the nodes alone.

    Attributes:
      reproduces: Whether the tensor is still outside its budget.
      file_is_wrong: Whether it is outside its budget in ONNX's reference evaluator too, which does
        what the file says. If so, the file is wrong; if not, the runtime is. None means that the
        evaluator cannot run the nodes.
    """

    reproduces: bool
    file_is_wrong: bool | None


def write_reproducer(
    folder: Path,
    model: onnx.ModelProto,
    located: Located,
    inputs: Mapping[str, Array],
    expected: Array,
    candidate: Candidate,
) -> Reproduced:
    """Write repro.onnx, inputs.npz, expected.npz and repro.py, and run the nodes once.

    Args:
      folder: Empty folder to write to.
      model: Whole model with its weights loaded.
      located: Wrong tensor and the nodes that compute it.
      inputs: Correct input arrays by name, in the graph's dtypes.
      expected: Correct value of the tensor in float64.
      candidate: Candidate in whose runtime the nodes run.
    """
    import onnx

    taken = {name: np.asarray(inputs[name]) for name in located.inputs}
    onnx.save(part_of(model, located, taken), str(folder / MODEL_FILE))
    np.savez(folder / "inputs.npz", **taken)  # type: ignore[arg-type] # named arrays
    np.savez(folder / "expected.npz", expected=expected)
    limit = located.outside.budget.max_abs
    kernel = any(node.domain for node in located.nodes) and candidate.runtime == "onnxruntime"
    script = _SCRIPT.format(
        run=_RUN[candidate.runtime].replace("NAME", repr(located.tensor)),
        library=" [CUSTOM-OP LIBRARY]" if kernel else "",
        limit=limit,
    )
    script = script.replace("NAME", repr(located.tensor))
    (folder / SCRIPT_FILE).write_text(script, encoding="utf-8")
    return _run(folder / MODEL_FILE, taken, expected, located, candidate)


def part_of(
    model: onnx.ModelProto, located: Located, inputs: Mapping[str, Array]
) -> onnx.ModelProto:
    """Return a model with only some nodes of another, and the weights and functions they need.

    Args:
      model: Whole model with its weights loaded.
      located: Nodes to keep, and the tensor that they compute.
      inputs: Inputs of the new model by name; they define its dtypes and shapes.
    """
    import onnx
    from onnx import helper

    used = {name for node in located.nodes for name in node.input}
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = "repro"
    for node in located.nodes:
        part.graph.node.append(copy.deepcopy(node))
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    for name, array in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        part.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    part.graph.output.append(helper.make_empty_tensor_value_info(located.tensor))
    called = {(node.domain, node.op_type) for node in located.nodes}
    part.functions.extend(f for f in model.functions if (f.domain, f.name) in called)
    if not part.functions:
        domains: Sequence[Any] = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
        del part.opset_import[:]
        part.opset_import.extend(domains)
    return part


def _run(
    path: Path, inputs: Mapping[str, Array], expected: Array, located: Located, candidate: Candidate
) -> Reproduced:
    budget = located.outside.budget.max_abs

    def values(of: Candidate) -> Array:
        result: Array = open_probe(of, path).run(inputs)[located.tensor].astype(np.float64)
        return result

    def outside(of: Candidate) -> bool:
        # Negated, so that NaN counts as outside.
        return not bool(np.all(np.abs(values(of) - expected) <= budget))

    try:
        by_onnx = outside(Candidate("onnx-reference", "onnx-reference"))
    except FwlError:  # the evaluator lacks an operator
        return Reproduced(outside(candidate), None)
    return Reproduced(outside(candidate), by_onnx)

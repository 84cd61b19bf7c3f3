"""Write a small program that computes one wrong tensor with only the nodes it needs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwl_export.bisect.expose import open_probe
from fwl_export.bisect.locate import Located
from fwl_export.bisect.steps import distance
from fwl_export.bundle.state import Array
from fwl_export.errors import FwlError
from fwl_export.parity.candidates import Candidate

if TYPE_CHECKING:
    import onnx


MODEL_FILE = "repro.onnx"
SCRIPT_FILE = "repro.py"
SETTINGS_FILE = "repro.json"
ARRAYS_FILE = "arrays.npz"

# The program is a constant: nothing from a model ever becomes part of it.
_SCRIPT = Path(__file__).with_name(SCRIPT_FILE)


@dataclass(frozen=True)
class Reproduced:
    """Result of running the nodes alone.

    Attributes:
      reproduces: Whether the tensor is still outside its budget.
      file_is_wrong: Whether it is outside its budget in ONNX's reference evaluator too, which does
        what the file says. If so, the file is wrong; if not, the runtime is. None means that the
        evaluator cannot run the nodes, or that the nodes alone are right in both.
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
    """Write repro.onnx, arrays.npz, repro.json and repro.py, and run the nodes once.

    Names of tensors, which come from the model's file, are written to repro.json only. repro.py is
    a copy of a file of this package, and the arrays have names of our own.

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
    keys = {name: f"input_{number}" for number, name in enumerate(taken)}
    arrays = {keys[name]: array for name, array in taken.items()}
    np.savez(folder / ARRAYS_FILE, expected=expected, **arrays)  # type: ignore[arg-type] # arrays
    settings = {
        "runtime": candidate.runtime,
        "tensor": located.tensor,
        "inputs": keys,
        "largest_allowed_difference": located.outside.budget.max_abs,
        "largest_allowed_relative_rms": located.outside.budget.relative_rms,
    }
    text = json.dumps(settings, indent=2)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(_SCRIPT, folder / SCRIPT_FILE)
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
    def use(of: Candidate) -> float:
        """Return the error divided by its budget: what located the tensor also judges it."""
        found = open_probe(of, path).run(inputs)[located.tensor].astype(np.float64)
        return located.outside.budget.use(distance(found, expected))

    found = use(candidate)
    try:
        by_onnx = use(Candidate("onnx-reference", "onnx-reference"))
    except FwlError:  # the evaluator lacks an operator
        return Reproduced(found > 1, None)
    if max(found, by_onnx) <= 1:  # without the rest of the graph, the tensor is right
        return Reproduced(False, None)
    return Reproduced(found > 1, by_onnx > 1)

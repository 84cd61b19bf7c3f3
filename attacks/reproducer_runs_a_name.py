"""A tensor of the model has a name that is Python code.

The attacker wants `fwl-export bisect` to write that code into the program that reproduces a wrong
tensor, which the user then runs. The name must stay data.
"""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
from onnx import TensorProto, helper

from attacks.common import Place, run
from fwl_export.bisect import reproduce
from fwl_export.bisect.steps import Outside
from fwl_export.parity.candidates import Candidate
from fwl_export.parity.compare import Error
from fwl_export.parity.tolerances import Budget


def attack(place: Place) -> str:
    code = f"__import__('pathlib').Path({str(place.outside / 'pwned.txt')!r}).touch()"
    name = f"%0 if {code} else 0]) #NAME"
    sizes = [1]
    node = helper.make_node("Identity", ["x"], [name])
    graph = helper.make_graph(
        [node],
        "planted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    outside = Outside(Error(1.0, 1.0, 1.0, None), Budget(0.0, 0.0))
    located = types.SimpleNamespace(tensor=name, nodes=[node], inputs=["x"], outside=outside)
    folder = place.bundle.with_name("reproducer")
    folder.mkdir()
    wrong, right = np.ones(1, np.float32), np.zeros(1)
    candidate = Candidate("onnx-reference", "onnx-reference")
    reproduce.write_reproducer(folder, model, located, {"x": wrong}, right, candidate)
    program = [sys.executable, reproduce.SCRIPT_FILE]
    subprocess.run(program, cwd=folder, capture_output=True, check=False)
    return "harmless: the program was written and ran, and the name stayed data"


if __name__ == "__main__":
    run(attack)

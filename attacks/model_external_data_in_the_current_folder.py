"""A branch of an `If` node names a listed file that also lies in the current folder.

The attacker wants ONNX Runtime, which gets the model from memory, to look for the file in the
current folder, where nobody has checked it. Opening the bundle must refuse the model.
"""

from __future__ import annotations

import os

import numpy as np
from onnx import TensorProto, helper

from attacks.common import Place, edited_model, list_file, open_and_read, run


def attack(place: Place) -> object:
    weights = np.ones(4, np.float32).tobytes()
    (place.bundle / "weights.bin").write_bytes(weights)
    elsewhere = place.bundle.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "weights.bin").write_bytes(weights)
    with edited_model(place.bundle) as model:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [4])
        node = helper.make_node("Identity", ["w"], ["result"])
        branch = helper.make_graph([node], "branch", [], [result], [tensor])
        model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["planted"], then_branch=branch, else_branch=branch)
        )
        model.graph.output.append(helper.make_tensor_value_info("planted", 1, [4]))
    list_file(place.bundle, "weights.bin")
    os.chdir(elsewhere)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

"""A branch of an `If` node, a graph inside the graph, takes its weights from an unlisted file.

The attacker wants to exchange weights unnoticed by the hashes, hidden from readers that look at
the main graph only. Opening the bundle must refuse the file.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from attacks.common import Place, edited_model, open_and_read, run


def attack(place: Place) -> object:
    (place.bundle / "weights.bin").write_bytes(np.ones(4096, np.float32).tobytes())
    with edited_model(place.bundle) as model:
        weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4096])
        weights.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "16384")):
            weights.external_data.add(key=key, value=value)
        result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [4096])
        node = helper.make_node("Identity", ["w"], ["result"])
        branch = helper.make_graph([node], "branch", [], [result], [weights])
        true = helper.make_tensor("always", TensorProto.BOOL, [], [True])
        model.graph.initializer.append(true)
        made = helper.make_node(
            "If", ["always"], ["planted"], then_branch=branch, else_branch=branch
        )
        model.graph.node.append(made)
        model.graph.output.append(helper.make_tensor_value_info("planted", 1, [4096]))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

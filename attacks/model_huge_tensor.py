"""A tensor of 16 bytes declares a size of 4 TiB, like a zip bomb.

The attacker wants loading the model to exhaust the machine's memory. The bundle must be refused
before that much is allocated.
"""

from __future__ import annotations

from onnx import TensorProto, helper

from attacks.common import Place, edited_model, open_and_read, run


def attack(place: Place) -> object:
    with edited_model(place.bundle) as model:
        bomb = model.graph.initializer.add(name="bomb", data_type=TensorProto.FLOAT)
        bomb.dims.extend([1 << 20, 1 << 20])
        bomb.raw_data = b"\0" * 16
        model.graph.node.append(helper.make_node("ReduceSum", ["bomb"], ["planted"], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info("planted", TensorProto.FLOAT, []))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

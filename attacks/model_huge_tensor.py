"""A file of a few bytes declares a tensor of 4 TiB, as a zip bomb declares its contents.

The attacker wants loading the model to exhaust the machine's memory. ONNX Runtime must notice that
the data is missing, and the error must be one sentence.
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

"""A constant inside a function of the ONNX file takes its value from an unlisted file.

The attacker wants to exchange weights unnoticed by the hashes, in a list of tensors of a function's
node. Opening the bundle must refuse the file.
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
        weights.external_data.add(key="location", value="weights.bin")
        node = helper.make_node("Constant", [], ["w"])
        node.attribute.append(helper.make_attribute("value", [weights]))
        opset = helper.make_opsetid("", 20)
        model.functions.append(helper.make_function("planted", "F", [], ["w"], [node], [opset]))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

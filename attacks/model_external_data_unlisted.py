"""The ONNX file takes its weights from a file in the folder that the manifest does not list.

The attacker wants to exchange weights unnoticed by the hashes. Opening the bundle must refuse the
file.
"""

from __future__ import annotations

import shutil

from attacks.common import Place, edited_model, open_and_read, run


def attack(place: Place) -> object:
    shutil.copy(place.bundle / "model.onnx.data", place.bundle / "weights.bin")
    with edited_model(place.bundle) as model:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "weights.bin"
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

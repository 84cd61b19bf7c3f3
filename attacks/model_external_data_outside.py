"""The ONNX file takes a tensor's data from a file outside the bundle.

The attacker wants ONNX Runtime to read one of the user's files as weights, so that the logits
reveal its contents. Opening the bundle must refuse the path, although all hashes match.
"""

from __future__ import annotations

from attacks.common import Place, edited_model, open_and_read, run


def attack(place: Place) -> object:
    with edited_model(place.bundle) as model:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../outside/secret.txt"
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

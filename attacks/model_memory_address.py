"""The ONNX file takes a tensor's data from an address in the memory of the process.

ONNX Runtime has a name for such data, which an attacker can put into the file to read memory. It
must be refused, even if the manifest lists a file of that name.
"""

from __future__ import annotations

from attacks.common import Place, edited_model, list_file, open_and_read, run

NAME = "*/_ORT_MEM_ADDR_/*"


def attack(place: Place) -> object:
    path = place.bundle / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(64))
    list_file(place.bundle, NAME)
    with edited_model(place.bundle) as model:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = NAME
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

"""A tensor of the ONNX file names two files for its data, of which only the first is listed.

The attacker wants the check to see one file and the runtime the other. It must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edited_model, open_and_read, run
from fwl_export.bundle.manifest import MODEL_DATA_FILE


def attack(place: Place) -> object:
    (place.bundle / "weights.bin").write_bytes((place.bundle / MODEL_DATA_FILE).read_bytes())
    with edited_model(place.bundle) as model:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        tensor.external_data.add(key="location", value="weights.bin")
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

"""An ONNX file of 4 MB in which every byte is 0xFF: a protobuf number without an end.

The attacker wants the reader to be busy for hours. The file must be refused at once.
"""

from __future__ import annotations

from attacks.common import Place, list_file, open_and_read, run
from fwl_export.bundle.manifest import MODEL_FILE


def attack(place: Place) -> object:
    (place.bundle / MODEL_FILE).write_bytes(b"\xff" * (4 << 20))
    list_file(place.bundle, MODEL_FILE)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)

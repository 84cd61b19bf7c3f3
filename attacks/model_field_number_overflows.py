"""A number of a protobuf field has a bit beyond 32, which C++ drops and Python does not.

The attacker wants the check to overlook a field that ONNX Runtime reads: the location of external
data. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, list_file, open_and_read, run
from fwl_export.bundle.manifest import MODEL_FILE


def attack(place: Place) -> object:
    (place.bundle / "weights.bin").write_bytes(bytes(64))
    path = place.bundle / MODEL_FILE
    entry = field(13, field(1, b"location") + field(2, b"weights.bin"))
    # Tensor "w": field 13 holds its external data, field 14 says that it is external.
    tensor = b"\x08\x10\x10\x01" + field(8, b"w") + entry + b"\x70\x01"
    hidden = varint((1 << 32) | 5 << 3 | 2) + varint(len(tensor)) + tensor
    path.write_bytes(path.read_bytes() + field(7, hidden))
    list_file(place.bundle, MODEL_FILE)
    return open_and_read(place)


def field(number: int, content: bytes) -> bytes:
    """Return a protobuf field that holds bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it."""
    high = value >> 7
    return bytes([value & 0x7F | 0x80]) + varint(high) if high else bytes([value])


if __name__ == "__main__":
    run(attack)

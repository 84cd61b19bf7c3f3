"""A state file at position 2^63 - 1, one token before the counter overflows.

The attacker wants positions to wrap around to negative numbers. The file must be refused.

"""

from __future__ import annotations

import struct

from attacks.common import (
    Place,
    load_state,
    read_safetensors,
    run,
    saved_state,
    signed,
    write_safetensors,
)


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    start, end = header["position"]["data_offsets"]
    spoiled = data[:start] + struct.pack("<q", (1 << 63) - 1) + data[end:]
    header["__metadata__"]["tokens"] = str((1 << 63) - 1)
    return load_state(place, write_safetensors(path, signed(header, spoiled), spoiled))


if __name__ == "__main__":
    run(attack)

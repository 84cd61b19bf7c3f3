"""A state file with NaN in a tensor.

The attacker wants every later logit of the session to be NaN. The file must be refused.
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
    name = next(n for n, e in header.items() if n.startswith("fast.") and e["dtype"] == "F32")
    start, _ = header[name]["data_offsets"]
    spoiled = data[:start] + struct.pack("<f", float("nan")) + data[start + 4 :]
    return load_state(place, write_safetensors(path, signed(header, spoiled), spoiled))


if __name__ == "__main__":
    run(attack)

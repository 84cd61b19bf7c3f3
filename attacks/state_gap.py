"""Four bytes between two tensors of a state file belong to none of them.

The attacker wants to hide content in a file that readers call whole. The file must be refused.
"""

from __future__ import annotations

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
    first = header["fast.up.kernel"]["data_offsets"][0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= first:
            entry["data_offsets"] = [at + 4 for at in entry["data_offsets"]]
    spoiled = data[:first] + b"hide" + data[first:]
    return load_state(place, write_safetensors(path, signed(header, spoiled), spoiled))


if __name__ == "__main__":
    run(attack)

"""Two tensors of a state file share the same bytes.

The attacker wants one tensor to change when another is written. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    sized = [name for name in header if name != "__metadata__"]
    first, second = next(
        (a, b) for a in sized for b in sized if a < b and header[a]["shape"] == header[b]["shape"]
    )
    header[second]["data_offsets"] = header[first]["data_offsets"]
    return load_state(place, write_safetensors(path, header, data))


if __name__ == "__main__":
    run(attack)

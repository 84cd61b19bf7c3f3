"""The header of a state file names one tensor twice.

The attacker wants readers that take the first entry and readers that take the last to load
different states. The file must be refused.

"""

from __future__ import annotations

import json

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    text = json.dumps(header)
    again = json.dumps({"position": header["position"]})[1:-1]
    return load_state(place, write_safetensors(path, f"{text[:-1]}, {again}}}", data))


if __name__ == "__main__":
    run(attack)

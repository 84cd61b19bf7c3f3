"""A state file that ends in the middle of a tensor.

The attacker, or a full disk, wants a session to go on from what is left. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, run, saved_state


def attack(place: Place) -> object:
    path = saved_state(place)
    path.write_bytes(path.read_bytes()[:-100])
    return load_state(place, path)


if __name__ == "__main__":
    run(attack)

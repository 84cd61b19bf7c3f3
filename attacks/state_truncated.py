"""A state file that ends in the middle of a tensor.

The attacker wants a session to continue from what is left; a full disk leaves such files too. The
file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, run, saved_state


def attack(place: Place) -> object:
    path = saved_state(place)
    path.write_bytes(path.read_bytes()[:-100])
    return load_state(place, path)


if __name__ == "__main__":
    run(attack)

"""A state file that is a device which never ends.

The attacker wants a reader to fill the memory with what it reads. Anything but a regular file must
be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, run


def attack(place: Place) -> object:
    path = place.bundle.with_name("endless.state")
    path.symlink_to("/dev/zero")
    return load_state(place, path)


if __name__ == "__main__":
    run(attack)

"""A manifest lists a file whose name holds half of a Unicode character, as no file's name can.

The attacker wants a crash wherever the name is printed or opened. The manifest must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    entry = {"sha256": "0", "bytes": 0}
    edit_manifest(place.bundle, lambda data: data["files"].update({"\ud800": entry}))
    return repr(open_and_read(place))


if __name__ == "__main__":
    run(attack)

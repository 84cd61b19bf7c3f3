"""A folder beside a bundle has the name that the exporter would give to a temporary one.

The attacker, or a user with a backup, has a folder that a sweep of leftovers would remove. Writing
must refuse, and leave the folder alone.
"""

from __future__ import annotations

import shutil

from attacks.common import Place, run
from fwl_export.files import replaced_folder


def attack(place: Place) -> object:
    target = place.outside / "bundle"
    theirs = place.outside / ".bundle.fwl-export"
    theirs.mkdir()
    (theirs / "lock").write_text("a lock of another program\n", encoding="utf-8")
    (theirs / "precious").write_text("mine\n", encoding="utf-8")
    try:
        with replaced_folder(target):
            pass
    finally:
        kept = (theirs / "precious").is_file()
        shutil.rmtree(theirs)  # the attacker's own; whatever else changed here is an escape
    return "accepted" if kept else "removed"


if __name__ == "__main__":
    run(attack)

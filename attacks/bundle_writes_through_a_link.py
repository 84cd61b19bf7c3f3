"""Where an engine and a report would be written, the bundle holds links to things outside.

The attacker wants them to be overwritten when the user builds or checks. A folder that is such a
link must be refused, and a file that is one must be replaced by the new file.
"""

from __future__ import annotations

from attacks.common import Place, run
from fwl_export.bundle.manifest import ENGINES_FOLDER, REPORTS_FOLDER, read_bundle
from fwl_export.bundle.paths import place_for
from fwl_export.files import replaced_file

ENGINE = f"{ENGINES_FOLDER}/rtx-1.0-sm89-fp32.engine"


def attack(place: Place) -> object:
    engine = place.bundle / ENGINE
    engine.parent.mkdir()
    engine.symlink_to(place.outside / "secret.txt")
    with replaced_file(place_for(place.bundle, ENGINE), through_link=False) as beside:
        beside.write_bytes(b"an engine")
    read_bundle(place.bundle).add_files([ENGINE]).verify()
    (place.bundle / REPORTS_FOLDER).symlink_to(place.outside)
    return place_for(place.bundle, f"{REPORTS_FOLDER}/parity.json")


if __name__ == "__main__":
    run(attack)

"""A state file of megabytes whose empty compressed caches stand for gigabytes.

The attacker wants a reader without a session, which does not know how many rows there may be, to
allocate them all. The size must be compared with a limit first, and the file refused.
"""

from __future__ import annotations

from typing import Any

from attacks.common import Place, run, signed, write_safetensors
from fwl_export.bundle import state_file
from fwl_export.bundle.manifest import read_bundle


def attack(place: Place) -> object:
    manifest, rows = read_bundle(place.bundle).manifest, 1_000_000
    tokens = bytes(8 * rows)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "fwl-state",
            "version": "2",
            "model_id": manifest.model_id,
            "rows": str(rows),
            "tokens": ",".join("0" * rows),
            "compress": "lowrank",
        },
        "position": {"dtype": "I64", "shape": [rows], "data_offsets": [0, len(tokens)]},
    }
    for spec in manifest.state[1:]:
        shape = [rows, spec.shape[0], 0, *spec.shape[2:]] if spec.shape else [rows]
        header[f"{spec.name}.used"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(tokens), len(tokens)],
        }
    path = write_safetensors(place.bundle.with_name("a.state"), signed(header, tokens), tokens)
    return state_file.load_state(path, manifest.state, manifest.model_id)


if __name__ == "__main__":
    run(attack)

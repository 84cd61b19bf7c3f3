"""An orbax folder to import, without any data, whose array claims 4 TiB.

The attacker wants the process to end: the library that reads the format ends it when memory is
short. The array must be refused before.
"""

from __future__ import annotations

import json

from attacks.common import Place, run


def attack(place: Place) -> object:
    from fwl_export.importers.arrays import read_jax

    folder = place.bundle.with_name("params")
    (folder / "kernel").mkdir(parents=True)
    (folder / "_METADATA").write_text("{}", encoding="utf-8")
    claim = {"zarr_format": 2, "shape": [1 << 40], "chunks": [1 << 40], "dtype": "<f4"}
    rest = {"compressor": None, "fill_value": 0, "order": "C", "filters": None}
    text = json.dumps({**claim, **rest})
    (folder / "kernel" / ".zarray").write_text(text, encoding="utf-8")
    return read_jax(folder)["kernel"]()


if __name__ == "__main__":
    run(attack)

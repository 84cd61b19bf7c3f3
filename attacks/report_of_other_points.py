"""A parity report, used as a baseline, with fewer errors than comparison points.

The attacker wants a comparison that compares nothing and passes. The report must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, run
from fwl_export.parity.report.data import SCHEMA_VERSION, read_report


def attack(place: Place) -> object:
    path = place.bundle.with_name("parity.json")
    tensor = {"name": "logits", "max_abs": [], "relative_rms": []}
    run_ = {"case": "text", "mode": "free", "depths": [1, 2, 3], "tensors": [tensor]}
    report = {
        "schema_version": SCHEMA_VERSION,
        "bundle": {"name": "bundle", "model_id": "0"},
        "settings": {
            "reference": "torch:float64",
            "candidates": ["onnxruntime"],
            "cases": ["text@20"],
            "tokens": 20,
            "seed": 0,
        },
        "text": {"name": "a.txt", "ids": [1, 2, 3]},
        "candidates": [{"name": "onnxruntime", "runs": [run_]}],
    }
    path.write_text(json.dumps(report), encoding="utf-8")
    return read_report(path)


if __name__ == "__main__":
    run(attack)

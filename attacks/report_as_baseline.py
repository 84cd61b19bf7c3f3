"""A parity report, used as a baseline, whose list of candidates holds numbers.

The attacker wants a crash, or a comparison that compares nothing and passes. The report must be
refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, run
from fwl_export.parity.report.baseline import compare_with_baseline
from fwl_export.parity.report.data import SCHEMA_VERSION, read_report


def attack(place: Place) -> object:
    path = place.bundle.with_name("parity.json")
    report = {"schema_version": SCHEMA_VERSION, "candidates": [1, 2, 3]}
    path.write_text(json.dumps(report), encoding="utf-8")
    return compare_with_baseline([], read_report(path))


if __name__ == "__main__":
    run(attack)

"""A training config with a key of thousands of parts, which takes a TOML reader hours.

The attacker wants a file of kilobytes to keep a processor busy for hours. It must be refused.
"""

from __future__ import annotations

from attacks.common import Place, run
from fwl_export.model.training_run import read_run_config


def attack(place: Place) -> object:
    path = place.bundle / "run.toml"
    path.write_text("a." * 60_000 + "b = 1\n", encoding="utf-8")
    return read_run_config(path)


if __name__ == "__main__":
    run(attack)

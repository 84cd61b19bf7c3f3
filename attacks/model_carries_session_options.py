"""The ONNX file carries options for ONNX Runtime's sessions in its metadata.

The attacker wants them to be obeyed: to write a profile of every run into a file, say. They must
have no effect.
"""

from __future__ import annotations

import json

from attacks.common import Place, edited_model, open_and_read, run


def attack(place: Place) -> str:
    profile = str(place.outside / "pwned")
    options = {"session_options": {"enable_profiling": True, "profile_file_prefix": profile}}
    with edited_model(place.bundle) as model:
        model.metadata_props.add(key="ort_config", value=json.dumps(options))
    open_and_read(place)
    return "harmless: the options were not obeyed"


if __name__ == "__main__":
    run(attack)

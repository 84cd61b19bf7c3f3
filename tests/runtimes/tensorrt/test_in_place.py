"""Engine metadata names the tensors that an engine updates in place, and the runtime reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fwl_export.bundle.manifest import ENGINES_FOLDER, describe_file, read_bundle, write_manifest
from fwl_export.runtimes import open_session
from tests.runtimes.tensorrt.test_runner import Machine, build, ids, session_of

UPDATED = ["fast.up.kernel", "fast.down.kernel"]


def metadata_file(bundle: Path) -> Path:
    (path,) = (bundle / ENGINES_FOLDER).glob("*.json")
    return path


def test_metadata_names_the_tensors(machine: Machine, own_bundle: Path) -> None:
    assert build(machine, own_bundle, "plain").in_place_tensors == []
    assert build(machine, own_bundle, "in_place").in_place_tensors == UPDATED


@pytest.mark.parametrize("names", [UPDATED, None])
def test_the_runtime_reads_them(
    machine: Machine, own_bundle: Path, names: list[str] | None
) -> None:
    session = session_of(machine, own_bundle, "in_place", 2)
    expected = session.feed(ids(2, 9))
    path = metadata_file(own_bundle)
    data = json.loads(path.read_text())
    assert data.pop("in_place_tensors") == UPDATED
    if names is not None:
        data["in_place_tensors"] = names
    path.write_text(json.dumps(data))
    manifest = read_bundle(own_bundle).manifest.to_dict()
    manifest["files"][f"{ENGINES_FOLDER}/{path.name}"] = describe_file(path)
    write_manifest(own_bundle, manifest)
    again = open_session(own_bundle, "tensorrt", 2, plugin=machine.library)
    assert again._runner.model.in_place == frozenset(UPDATED)
    np.testing.assert_array_equal(again.feed(ids(2, 9)), expected)

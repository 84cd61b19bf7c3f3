"""Every fault that hides is real: the use that it names shows it, far above rounding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.runtimes import Session, open_session
from tests.parity.hidden_faults import Hidden, Sizes, hidden_faults
from tests.parity.planted import HIDDEN_NAMES
from tests.parity.session_faults import SessionFault
from tests.plugins.conftest import builds, libraries, ort_library  # noqa: F401 - fixtures

REAL = 100  # times the error of a session without the fault


@pytest.fixture(scope="module")
def exact(anchored_bundle: Path) -> Session:
    return open_session(anchored_bundle, "torch", precision="fp64")


@pytest.fixture(scope="module")
def hidden(anchored_bundle: Path) -> dict[str, Hidden]:
    return hidden_faults(Sizes.of(read_bundle(anchored_bundle).manifest))


def test_there_are_enough_hidden_faults(hidden: dict[str, Hidden]) -> None:
    assert list(hidden) == HIDDEN_NAMES
    assert len(hidden) >= 60


@pytest.mark.parametrize("name", HIDDEN_NAMES)
def test_a_hidden_fault_is_real(
    name: str,
    hidden: dict[str, Hidden],
    anchored_bundle: Path,
    exact: Session,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    fault = hidden[name]
    plugin: str | Path = fault.plugin
    if plugin == "required":  # built from the sources: the package's own need not be installed
        plugin = request.getfixturevalue("ort_library")
    right = open_session(anchored_bundle, threads=fault.threads, plugin=plugin)
    broken = fault.bundle(read_bundle(anchored_bundle), tmp_path / "broken")
    plant = fault.plant
    with plant.planted() if isinstance(plant, SessionFault) else nullcontext():
        wrong = open_session(broken, threads=fault.threads, plugin=plugin)
    assert fault.usage.shown(wrong, right, exact) >= REAL

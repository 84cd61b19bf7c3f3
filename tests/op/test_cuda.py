"""Which GPU kernels the PyTorch op runs, and its warnings where it cannot; see also tests/gpu."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fwl_export.op import cuda


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for function in (cuda._launcher, cuda._planned):
        function.cache_clear()
    yield
    for function in (cuda._launcher, cuda._planned):
        function.cache_clear()


@pytest.mark.parametrize(
    ("capability", "planned"),
    [((7, 5), 75), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_a_gpu_runs_the_plan_of_its_capability_or_the_one_below(
    capability: tuple[int, int], planned: int
) -> None:
    assert cuda._planned(capability) == planned


def test_an_old_gpu_causes_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"capability is 7\.0, and its kernels need 7\.5"):
        assert cuda._planned((7, 0)) is None


def test_a_missing_triton_causes_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes the import fail, as a missing triton does.
    monkeypatch.setitem(sys.modules, "plugins.kernels.gpu.launch", None)
    with pytest.warns(RuntimeWarning, match="pip install triton"):
        assert cuda._launcher() is None


def test_a_foreign_folder_of_that_name_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "plugins" / "kernels" / "gpu"
    kernels.mkdir(parents=True)
    (kernels / "launch.py").write_text("raise SystemExit('foreign code ran')")
    (tmp_path / "plugins" / "__init__.py").write_text("raise SystemExit('foreign code ran')")
    for name in [name for name in sys.modules if name.split(".")[0] == "plugins"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match="does not find fwl-export's own folder plugins/"):
        assert cuda._launcher() is None

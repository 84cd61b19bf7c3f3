"""Renamed modules and arguments: old names work, warn, and mean the same as the new ones."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from fwl_export.deprecations import MODULES, renamed_arguments
from fwl_export.errors import ConfigError
from fwl_export.runtimes import open_session


@pytest.mark.parametrize("old", MODULES)
def test_a_module_is_imported_by_its_old_name(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old} is now {MODULES[old]}")):
        moved = importlib.import_module(old)
    new = importlib.import_module(MODULES[old])
    names = [name for name in vars(new) if name[0].isalpha()]
    assert names
    assert all(getattr(moved, name) is getattr(new, name) for name in names)


@pytest.mark.parametrize("module", ["parity", "parity.candidates", "parity.backends"])
def test_candidates_by_their_old_names(module: str) -> None:
    candidates = importlib.import_module("fwl_export.parity.candidates")
    with pytest.warns(DeprecationWarning, match="parse_backend is now .*parse_candidate"):
        found = importlib.import_module(f"fwl_export.{module}").parse_backend
    assert found is candidates.parse_candidate
    with pytest.raises(AttributeError, match="has no attribute 'Front'"):
        importlib.import_module(f"fwl_export.{module}").Front  # noqa: B018


def test_a_module_that_never_was_is_still_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fwl_export\.stat"):
        importlib.import_module("fwl_export.stat")


def test_arguments_of_open_session_by_their_old_names(tiny_bundle: Path) -> None:
    with pytest.warns(DeprecationWarning, match="argument 'backend' is now 'runtime'"):
        session = open_session(tiny_bundle, backend="torch")
    assert session.feed([5]).shape == open_session(tiny_bundle, runtime="torch").feed([5]).shape
    with pytest.raises(ConfigError, match="runtime 'jax' is unknown"), pytest.warns():
        open_session(tiny_bundle, backend="jax")


def test_both_names_of_an_argument() -> None:
    @renamed_arguments(old="new")
    def function(new: int) -> int:
        return new

    with pytest.warns(DeprecationWarning, match="argument 'old' is now 'new'"):
        assert function(old=1) == 1  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'old' is the old name of 'new'"):
        function(new=1, old=1)  # type: ignore[call-arg, misc]

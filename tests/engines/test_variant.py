"""TensorRT variants: what is installed, one per process, and the GPUs they build for."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from fwl_export.engines import variant as variants
from fwl_export.engines.device import Device, Driver
from fwl_export.engines.variant import (
    VARIANTS,
    LoadedVariant,
    buildable_sms,
    check_installed,
    find_variant,
    load_variant,
)
from fwl_export.errors import EngineError, MissingDependencyError


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == hidden else find(name)
    )


@pytest.mark.parametrize(("name", "extra"), [("rtx", "rtx"), ("tensorrt", "gpu")])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    variant = VARIANTS[name]
    hide(monkeypatch, variant.module)
    expected = (
        f"{variant.title} engines need the package {variant.module}, which is not installed; "
        f"pip install 'fwl-export[{extra}]'"
    )
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        check_installed(variant)
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        load_variant(name)


def test_polygraphy_is_needed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "polygraphy" else object()
    )
    with pytest.raises(MissingDependencyError, match="need the package polygraphy"):
        check_installed(VARIANTS["rtx"])


def test_an_unknown_variant() -> None:
    with pytest.raises(EngineError, match="variant 'trt' is unknown; expected rtx or tensorrt"):
        find_variant("trt")


def test_two_variants_do_not_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(EngineError, match="already uses TensorRT; TensorRT-RTX needs a process"):
        load_variant("rtx")


def test_rtx_builds_for_what_it_lists_and_tensorrt_for_what_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = {"NONE": 0, "CURRENT": 1, "SM120": 2, "SM80": 3}
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=members))
    assert buildable_sms(LoadedVariant(VARIANTS["rtx"], trt, "1", "1")) == [80, 120]
    devices = (Device("a", 90), Device("b", 90), Device("c", 89))
    monkeypatch.setattr(variants, "query_driver", lambda: Driver("13.0", devices, ""))
    assert buildable_sms(LoadedVariant(VARIANTS["tensorrt"], trt, "1", "1")) == [89, 90]

"""The table of runtimes: a new one is registered in one place, and every row says the truth."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.bundle import Bundle, read_bundle
from fwl_export.bundle.state import Array, State, TensorSpec, zeros
from fwl_export.errors import ConfigError, MissingDependencyError
from fwl_export.parity.candidates import parse_candidate
from fwl_export.runtimes import RUNTIMES
from fwl_export.runtimes.base import Call, Loaded, Rows, index
from fwl_export.runtimes.registry import Options, Runtime
from tests.bundles import VOCABULARY


class UniformRunner:
    """Finds every token equally likely; its state stays zero."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs

    def another(self) -> UniformRunner:
        return self

    def new_buffers(self, batch: int) -> State:
        return zeros(self._specs, batch)

    def run(self, call: Call, past: State, present: State) -> Array:
        return np.zeros((*call.logit_positions.shape, VOCABULARY), np.float32)

    def read(self, buffers: State, rows: Rows) -> State:
        return {name: array[index(rows)] for name, array in buffers.items()}

    def write(self, buffers: State, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        for name, array in buffers.items():
            array[list(rows)] = state[name]

    def release(self, buffers: State) -> None:
        pass


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Register a runtime "uniform"; returns the options that its loader has received."""
    found: list[Options] = []

    def load(bundle: Bundle, options: Options) -> Loaded:
        found.append(options)
        return Loaded(UniformRunner(bundle.manifest.state), bundle.manifest.state, 4)

    module: Any = ModuleType("uniform_runtime")
    module.load = load
    monkeypatch.setitem(sys.modules, "uniform_runtime", module)
    row = Runtime(
        module="uniform_runtime",
        takes=frozenset({"threads", "device"}),
        packages=("numpy",),
        extra="uniform",
        candidate_options={"cuda": {"device": "cuda"}},
    )
    monkeypatch.setitem(RUNTIMES, "uniform", row)
    return found


def test_a_fifth_runtime_is_registered_in_one_place(
    tiny_bundle: Path, received: list[Options]
) -> None:
    session = open_session(tiny_bundle, "uniform", batch=2, threads=3)
    assert received == [Options(threads=3)]
    assert session.max_tokens == 4
    assert session.feed(np.ones((2, 9), np.int64)).shape == (2, 9, VOCABULARY)
    assert session.positions == [9, 9]
    with pytest.raises(ConfigError, match="precision can be chosen for runtime 'torch' only; rec"):
        open_session(tiny_bundle, "uniform", precision="fp64")
    with pytest.raises(
        ConfigError, match=r"threads can be .* runtimes 'onnxruntime' and 'uniform'"
    ):
        open_session(tiny_bundle, "torch", threads=1)
    with pytest.raises(ConfigError, match=r"expected onnxruntime, .*, uniform$"):
        open_session(tiny_bundle, "jax")


def test_a_fifth_runtime_is_a_candidate(tiny_bundle: Path, received: list[Options]) -> None:
    candidate = parse_candidate("uniform:cuda")
    assert candidate.describe() == f"numpy {metadata.version('numpy')}, cuda"
    candidate.open(read_bundle(tiny_bundle), batch=1, threads=2)
    assert received == [Options(threads=2, device="cuda")]


def test_values_that_ask_for_nothing_special_fit_every_runtime(
    tiny_bundle: Path, received: list[Options]
) -> None:
    open_session(tiny_bundle, "uniform", plugin="none", device="cpu", cuda_graph=False)
    open_session(tiny_bundle, "torch", plugin="none", device="cpu", cuda_graph=False)
    with pytest.raises(ConfigError, match="received device='cuda' for runtime 'torch'"):
        open_session(tiny_bundle, "torch", device="cuda")


def test_a_missing_package_names_the_extra(
    tiny_bundle: Path, received: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "uniform_runtime")
    with pytest.raises(MissingDependencyError) as error:
        open_session(tiny_bundle, "uniform")
    assert str(error.value) == (
        "runtime 'uniform' needs 'uniform_runtime'; pip install 'fwl-export[uniform]'"
    )


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_row_of_the_table_is_true(name: str) -> None:
    row = RUNTIMES[name]
    assert callable(importlib.import_module(row.module).load)
    assert row.takes <= {field.name for field in fields(Options)}
    for options in row.candidate_options.values():
        assert options.keys() <= row.takes
    assert row.extra in metadata.metadata("fwl-export").get_all("Provides-Extra", [])

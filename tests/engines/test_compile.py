"""The parts of a build that need no TensorRT: profiles, and the count of plugin layers."""

from __future__ import annotations

from types import SimpleNamespace

from fwl_export.engines.compile import _count_plugins, _profile
from fwl_export.engines.metadata import TensorMetadata
from fwl_export.engines.request import Range


def test_a_profile_fills_the_dynamic_axes() -> None:
    inputs = [
        TensorMetadata("input_ids", (-1, -1), "int64"),
        TensorMetadata("lengths", (-1,), "int64"),
        TensorMetadata("past.fast.up.kernel", (-1, 16, 32), "float32"),
    ]
    profile = _profile(Range("prefill", (1, 2, 8), (1, 5, 16)), inputs)
    assert profile.name == "prefill"
    assert profile.inputs == {
        "input_ids": {"min": [1, 1], "opt": [2, 5], "max": [8, 16]},
        "lengths": {"min": [1], "opt": [2], "max": [8]},
        "past.fast.up.kernel": {"min": [1, 16, 32], "opt": [2, 16, 32], "max": [8, 16, 32]},
    }


def test_plugin_layers_of_every_generation_are_counted() -> None:
    kinds = ("CONSTANT", "PLUGIN_V3", "PLUGIN_V2", "MATRIX_MULTIPLY", "PLUGIN", "PLUGIN_V3")
    layers = [SimpleNamespace(type=SimpleNamespace(name=kind)) for kind in kinds]
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    assert _count_plugins(network) == 4

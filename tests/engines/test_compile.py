"""The parts of a build that need no builder: profiles, plugin count, error texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fwl_export.engines.compile import Range, _count_plugins, _load, _profile, _sentence
from fwl_export.engines.metadata import TensorMetadata
from fwl_export.engines.variant import LoadedVariant, find_variant
from fwl_export.errors import EngineError


def test_a_profile_fills_the_free_axes() -> None:
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


@pytest.mark.parametrize(
    ("handle", "creator", "message"),
    [
        (None, None, "TensorRT 9 cannot load plugin 'lib.so'; build it with"),
        (object(), None, "'lib.so' has no plugin fwl::LinearAttentionUpdate of version 1; build"),
        (object(), object(), ""),
    ],
)
def test_a_plugin_library_is_loaded_and_has_our_plugin(
    handle: object, creator: object, message: str
) -> None:
    asked = []

    def get_creator(*names: str) -> object:
        asked.append(names)
        return creator

    registry = SimpleNamespace(load_library=lambda path: handle, get_creator=get_creator)
    module = SimpleNamespace(get_plugin_registry=lambda: registry)
    loaded = LoadedVariant(find_variant("tensorrt"), module, "9", "0.1")
    if message:
        with pytest.raises(EngineError, match=f"^{message}"):
            _load(loaded, Path("lib.so"))
    else:
        _load(loaded, Path("lib.so"))
        assert asked == [("LinearAttentionUpdate", "1", "fwl")]


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        (
            [
                'ModelImporter.cpp:140: While parsing node number 44 [NoSuchOp -> "linear"]:',
                "ModelImporter.cpp:142: --- Begin node ---\nNode name: node_linear",
                "In node 44 with name: node_linear and operator: NoSuchOp:\nPlugin not found.",
                "Could not parse ONNX correctly",
            ],
            "In node 44 with name: node_linear and operator: NoSuchOp: Plugin not found",
        ),
        (
            [
                "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: "
                "check_turing] Cannot compile 'x' for Turing: FP32 GEMM is not supported. "
                "In compileGraph at /_src/optimizer/codeGenerator.cpp:2012)",
                "Invalid Engine",
            ],
            "Myelin (Cannot compile 'x' for Turing: FP32 GEMM is not supported)",
        ),
        (["ModelImporter.cpp:1: only this"], "ModelImporter.cpp:1: only this"),
    ],
)
def test_the_first_telling_error_becomes_one_sentence(errors: list[str], sentence: str) -> None:
    assert _sentence(errors) == sentence

"""Builder messages become one sentence."""

from __future__ import annotations

import pytest

from fwl_export.engines.messages import shorten


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
    assert shorten(errors) == sentence

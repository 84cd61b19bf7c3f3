"""Requests of builds: what they hold, and that they cross to another process unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fwl_export.engines.metadata import NetworkMetadata, ProfileMetadata, TensorMetadata
from fwl_export.engines.request import BuildRequest, PluginUse, Range

RANGES = [Range("decode", [1, 1, 8], [1, 1, 1]), Range("prefill", [1, 1, 8], [1, 64, 64])]


@pytest.mark.parametrize("plugin", [None, PluginUse(Path("lib.so"), True, False, True)])
def test_a_request_survives_json(plugin: PluginUse | None) -> None:
    request = BuildRequest("rtx", Path("a/model.onnx"), 89, RANGES, Path("b.engine"), plugin)
    assert BuildRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_a_request_without_a_plugin_asks_nothing_of_it() -> None:
    request = BuildRequest("rtx", Path("m"), 89, RANGES, Path("b"))
    assert [request.in_place_state, request.embeds_plugin, request.requires_plugin] == [False] * 3


def test_network_metadata_survives_json() -> None:
    tensor = TensorMetadata("input_ids", [-1, -1], "int64")
    shapes = {"input_ids": {"min": [1, 1], "opt": [1, 8], "max": [4, 8]}}
    network = NetworkMetadata(
        [tensor], [tensor], [ProfileMetadata("prefill", shapes)], 5, 2, False, 0.5
    )
    assert NetworkMetadata.from_dict(json.loads(json.dumps(network.to_dict()))) == network

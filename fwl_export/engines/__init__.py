"""Engines: from a bundle's ONNX file to TensorRT engines."""

from fwl_export.engines.build import DEFAULT_MAX_BATCH, DEFAULT_SMS, build_engines
from fwl_export.engines.device import query_driver
from fwl_export.engines.facts import EngineFacts
from fwl_export.engines.flavour import FLAVOURS, load_flavour
from fwl_export.engines.worker import probe_flavour

__all__ = [
    "DEFAULT_MAX_BATCH",
    "DEFAULT_SMS",
    "FLAVOURS",
    "EngineFacts",
    "build_engines",
    "load_flavour",
    "probe_flavour",
    "query_driver",
]

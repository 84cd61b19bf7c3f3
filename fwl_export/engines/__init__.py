"""Engines: from a bundle's ONNX file to TensorRT engines."""

from fwl_export.engines.build import DEFAULT_MAX_BATCH, DEFAULT_SMS, build_engines
from fwl_export.engines.choose import choose_engine, choose_flavour, needs_library, read_engines
from fwl_export.engines.device import Device, query_driver
from fwl_export.engines.facts import EngineFacts
from fwl_export.engines.flavour import FLAVOURS, import_flavour, load_flavour
from fwl_export.engines.worker import probe_flavour

__all__ = [
    "DEFAULT_MAX_BATCH",
    "DEFAULT_SMS",
    "FLAVOURS",
    "Device",
    "EngineFacts",
    "build_engines",
    "choose_engine",
    "choose_flavour",
    "import_flavour",
    "load_flavour",
    "needs_library",
    "probe_flavour",
    "query_driver",
    "read_engines",
]

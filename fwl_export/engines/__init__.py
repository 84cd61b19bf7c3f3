"""TensorRT engines: build them from a bundle's ONNX file, and choose the one to run."""

from fwl_export.bundle.defaults import DEFAULT_MAX_BATCH, DEFAULT_SMS
from fwl_export.engines.build import build_engines
from fwl_export.engines.choose import choose_engine, choose_variant, needs_library, read_engines
from fwl_export.engines.device import Device, query_driver
from fwl_export.engines.metadata import EngineMetadata
from fwl_export.engines.variant import VARIANTS, import_variant, load_variant
from fwl_export.engines.worker import probe_variant

__all__ = [
    "DEFAULT_MAX_BATCH",
    "DEFAULT_SMS",
    "VARIANTS",
    "Device",
    "EngineMetadata",
    "build_engines",
    "choose_engine",
    "choose_variant",
    "import_variant",
    "load_variant",
    "needs_library",
    "probe_variant",
    "query_driver",
    "read_engines",
]

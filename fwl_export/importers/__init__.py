"""Import Fast Weight Layers from checkpoints of the paper's JAX and TensorFlow code."""

from fwl_export.importers.paper import import_block, with_backbone

__all__ = ["import_block", "with_backbone"]

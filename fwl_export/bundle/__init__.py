"""The contract that every part shares: configuration, manifest, state, tokenizer, ONNX file.

Nothing here needs PyTorch or onnx.
"""

from fwl_export.bundle.manifest import Bundle, is_bundle, read_bundle

__all__ = ["Bundle", "is_bundle", "read_bundle"]

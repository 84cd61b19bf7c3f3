"""The bundle on disk, which all parts share: configuration, manifest, state, tokenizer, ONNX file.

Nothing here needs PyTorch or the package onnx.

    from fwl_export.bundle import read_bundle

    bundle = read_bundle("demo-bundle")
    bundle.verify()
    print(bundle.manifest.config.vocab_size)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwl_export.bundle.manifest import Bundle, is_bundle, read_bundle

__all__ = ["Bundle", "is_bundle", "read_bundle"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `fwl_export.bundle.defaults` does not import numpy.
    if name in __all__:
        from fwl_export.bundle import manifest

        return getattr(manifest, name)
    raise AttributeError(f"module 'fwl_export.bundle' has no attribute '{name}'")

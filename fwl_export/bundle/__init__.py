"""The bundle on disk, which all parts share: configuration, manifest, state, tokenizer, ONNX file.

Nothing here needs PyTorch or the package onnx.

    from fwl_export.bundle import read_bundle

    bundle = read_bundle("demo-bundle")
    bundle.verify()
    print(bundle.manifest.config.vocab_size)
"""

from fwl_export.bundle.manifest import Bundle, is_bundle, read_bundle

__all__ = ["Bundle", "is_bundle", "read_bundle"]

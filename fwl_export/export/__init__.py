"""Export a checkpoint folder to a bundle."""

from fwl_export.export.write_bundle import export_bundle

__all__ = ["export_bundle"]

"""Errors a user can cause. The CLI prints their message and exits with 1, without a traceback.

A message says which thing is wrong, what was received, what was expected, and what to do next.
"""


class FwlError(Exception):
    """Base class of every error that a user, not a bug, caused."""

    exit_code = 1


class ConfigError(FwlError):
    """A configuration has an unknown key or a value out of range."""


class CheckpointError(FwlError):
    """A checkpoint folder is incomplete, truncated or does not fit its config."""


class BundleError(FwlError):
    """A bundle is missing, incomplete, changed on disk, or of another schema."""


class ShapeError(FwlError):
    """A tensor argument has the wrong rank, size or type."""


class StateError(FwlError):
    """A recurrent state does not belong to this model."""


class TokenError(FwlError):
    """Token ids, label weights or lengths are unusable."""


class NotFiniteError(TokenError):
    """The model's output is NaN or infinite."""


class ReportError(FwlError):
    """A report cannot be read, is of another schema, or of another model."""


class CheckError(FwlError):
    """A check could not run; what it would have found is not known."""

    exit_code = 2


class ExportError(FwlError):
    """The exported ONNX file did not pass its own checks."""


class EngineError(FwlError):
    """An engine could not be built or read."""


class PluginError(FwlError):
    """A plugin library is missing, or cannot be loaded."""


class MissingDependencyError(FwlError):
    """An optional package is needed and not installed."""


class OutputExistsError(FwlError):
    """The output path exists and must not be overwritten."""

"""Errors that users can cause, as opposed to bugs.

The command line prints their message without a traceback, and exits with 1, or with 2 for a
`CheckError`. A message says which thing is wrong, what was received, what was expected, and what to
do next.
"""

from __future__ import annotations

import re


class FwlError(Exception):
    """Base class of all errors that a user, rather than a bug, caused.

    Attributes:
      exit_code: What the command line exits with.
    """

    exit_code = 1


class ConfigError(FwlError):
    """A configuration, argument or option is unknown or out of range."""


class CheckpointError(FwlError):
    """A checkpoint is incomplete, damaged, or does not fit its configuration."""


class TrainingError(FwlError):
    """Training cannot start or continue: too little text, or a loss that is not finite."""


class BundleError(FwlError):
    """A bundle is missing, incomplete, changed on disk, or has another schema version."""


class ShapeError(FwlError):
    """An array has the wrong shape or dtype, or a row or slot does not exist."""


class StateError(FwlError):
    """A recurrent state, or a state file, is damaged or does not belong to this model."""


class TokenError(FwlError):
    """Token ids, label weights or lengths are out of range, or a text has too many or no tokens."""


class NotFiniteError(TokenError):
    """The model's output has NaN or infinite values.

    Attributes:
      row: Row of the session, or None if it is not known; in `Slots`, it is the slot.
      token: Index in the call of the first token after which a value is not finite, from 0; None if
        it is not known.
      position: Tokens that the row had read before that token, or None.
      tensor: What is not finite: "logits", or the name of a state tensor.
      cause: What is known of the cause, in words; "" if nothing is.
    """

    def __init__(
        self,
        message: str,
        row: int | None = None,
        token: int | None = None,
        position: int | None = None,
        tensor: str = "logits",
        cause: str = "",
    ) -> None:
        """Describe what is not finite; see the attributes of the class."""
        super().__init__(message)
        self.row = row
        self.token = token
        self.position = position
        self.tensor = tensor
        self.cause = cause


class UpdateNormError(TokenError):
    """A row would have learned more than the session's `max_update_norm` allows."""


class ReportError(FwlError):
    """A parity report cannot be read, has another schema version, or is of another model."""


class CheckError(FwlError):
    """A check could not run, so that its result is unknown. The exit code is 2."""

    exit_code = 2


class ExportError(FwlError):
    """An exported ONNX file failed the exporter's own checks."""


class EngineError(FwlError):
    """A TensorRT engine is missing, or could not be built, loaded or run."""


class DeviceError(FwlError):
    """A GPU is missing, or the GPU or its driver refused a call."""


class PluginError(FwlError):
    """A plugin library is missing or cannot be loaded, or an engine was built without it."""


class MissingDependencyError(FwlError):
    """An optional package is needed but not installed; the message says how to install it."""


# What the extra `export` installs.
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript")


def missing_export_package(user: str, error: ModuleNotFoundError) -> MissingDependencyError | None:
    """Return the error for a module that the extra `export` brings, or None for any other module.

    Args:
      user: What needs the module; begins the message.
      error: The failed import.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXPORT_PACKAGES:
        return None
    return MissingDependencyError(
        f"{user} needs '{package}', which is not installed; pip install 'fwl-export[export]'"
    )


def missing_account(error: Exception) -> FwlError | None:
    """Return the error of a library that needs a home folder or an account, or None for others.

    A container that runs as a number, as with `docker --user 12345`, has neither unless HOME and
    USER name them.

    Args:
      error: What the library raised: an exception of `Path.home`, `pwd.getpwuid` or
        `getpass.getuser`.
    """
    if not re.search(r"home directory|getpwuid|uid not found|No username set", str(error)):
        return None
    return FwlError(
        "this user has no home folder, because HOME is not set and the user has no account; set "
        "HOME to a folder that can be written"
    )


class OutputExistsError(FwlError):
    """The output path exists, and was not overwritten."""


class OutputBusyError(FwlError):
    """Another process is writing the same output; nothing was written."""

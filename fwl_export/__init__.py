"""Take Fast Weight Layer language models from PyTorch to ONNX, TensorRT, C++ and Python.

A Fast Weight Layer learns while it reads: every token changes some of the model's weights, so the
model adapts to the text at hand. Here these weights are explicit state. A trained checkpoint is
exported to a *bundle*, a folder with everything that an application needs, and a *session* reads
text with it:

    from fwl_export import open_session

    session = open_session("demo-bundle")  # from `fwl-export export demo -o demo-bundle`
    logits = session.feed([5, 7, 11])  # reads three tokens, learns from them, predicts the next
    session.save_state("after.state")  # what it has learned; load_state() restores it

Where each thing is:

    run a bundle          open_session, Session, Slots (rows for several users), Sampler
    text in, text out     open_text_session, TextSession, TextStream, Generation
    a bundle on disk      read_bundle, Bundle
    make a bundle         export_bundle, PrecisionPolicy, build_engines (TensorRT)
    prove it correct      check_bundle, Report, bisect_bundle
    the PyTorch model     FWLModel, ModelConfig, BackboneConfig, FastWeightsConfig
    its checkpoints       load_checkpoint, save_checkpoint, Checkpoint
    errors                FwlError and its subclasses; their messages say what to do next

Importing the package loads neither NumPy nor PyTorch: each name loads its module when it is first
used. Running a bundle needs no PyTorch. `fwl-export --help` shows the command line.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fwl_export import deprecations, errors

if TYPE_CHECKING:
    from fwl_export.bisect import bisect_bundle as bisect_bundle
    from fwl_export.bundle import Bundle as Bundle
    from fwl_export.bundle import read_bundle as read_bundle
    from fwl_export.bundle.config import BackboneConfig as BackboneConfig
    from fwl_export.bundle.config import FastWeightsConfig as FastWeightsConfig
    from fwl_export.bundle.config import ModelConfig as ModelConfig
    from fwl_export.engines import build_engines as build_engines
    from fwl_export.errors import BundleError as BundleError
    from fwl_export.errors import CheckError as CheckError
    from fwl_export.errors import CheckpointError as CheckpointError
    from fwl_export.errors import ConfigError as ConfigError
    from fwl_export.errors import DeviceError as DeviceError
    from fwl_export.errors import EngineError as EngineError
    from fwl_export.errors import ExportError as ExportError
    from fwl_export.errors import FwlError as FwlError
    from fwl_export.errors import MissingDependencyError as MissingDependencyError
    from fwl_export.errors import NotFiniteError as NotFiniteError
    from fwl_export.errors import OutputBusyError as OutputBusyError
    from fwl_export.errors import OutputExistsError as OutputExistsError
    from fwl_export.errors import PluginError as PluginError
    from fwl_export.errors import ReportError as ReportError
    from fwl_export.errors import ShapeError as ShapeError
    from fwl_export.errors import StateError as StateError
    from fwl_export.errors import TokenError as TokenError
    from fwl_export.errors import TrainingError as TrainingError
    from fwl_export.errors import UpdateNormError as UpdateNormError
    from fwl_export.export import export_bundle as export_bundle
    from fwl_export.model.checkpoint import Checkpoint as Checkpoint
    from fwl_export.model.checkpoint import load_checkpoint as load_checkpoint
    from fwl_export.model.checkpoint import save_checkpoint as save_checkpoint
    from fwl_export.model.language_model import FWLModel as FWLModel
    from fwl_export.parity import Report as Report
    from fwl_export.parity import check_bundle as check_bundle
    from fwl_export.precision.policy import PrecisionPolicy as PrecisionPolicy
    from fwl_export.runtimes import Generation as Generation
    from fwl_export.runtimes import Sampler as Sampler
    from fwl_export.runtimes import Session as Session
    from fwl_export.runtimes import Slots as Slots
    from fwl_export.runtimes import TextSession as TextSession
    from fwl_export.runtimes import TextStream as TextStream
    from fwl_export.runtimes import open_session as open_session
    from fwl_export.runtimes import open_text_session as open_text_session

__version__ = "0.2.0.dev0"

# The public names and their modules; tests compare them with the imports for type checkers above.
_PUBLIC = {
    "BundleError": "errors",
    "CheckError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DeviceError": "errors",
    "EngineError": "errors",
    "ExportError": "errors",
    "FwlError": "errors",
    "MissingDependencyError": "errors",
    "NotFiniteError": "errors",
    "OutputBusyError": "errors",
    "OutputExistsError": "errors",
    "PluginError": "errors",
    "ReportError": "errors",
    "ShapeError": "errors",
    "StateError": "errors",
    "TokenError": "errors",
    "TrainingError": "errors",
    "UpdateNormError": "errors",
    "Bundle": "bundle",
    "read_bundle": "bundle",
    "BackboneConfig": "bundle.config",
    "FastWeightsConfig": "bundle.config",
    "ModelConfig": "bundle.config",
    "Generation": "runtimes",
    "Sampler": "runtimes",
    "Session": "runtimes",
    "Slots": "runtimes",
    "TextSession": "runtimes",
    "TextStream": "runtimes",
    "open_session": "runtimes",
    "open_text_session": "runtimes",
    "build_engines": "engines",
    "Report": "parity",
    "check_bundle": "parity",
    "bisect_bundle": "bisect",
    "export_bundle": "export",
    "Checkpoint": "model.checkpoint",
    "load_checkpoint": "model.checkpoint",
    "save_checkpoint": "model.checkpoint",
    "FWLModel": "model.language_model",
    "PrecisionPolicy": "precision.policy",
}

# Parts that need the packages of the extra `export`.
_EXPORT_PARTS = ("bisect", "export", "model", "parity", "precision")

__all__ = list(_PUBLIC)


deprecations.install()
# The package prints nothing of its own; an application that wants its log records adds a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fwl_export' has no attribute '{name}'")
    import importlib

    try:
        module = importlib.import_module(f"fwl_export.{_PUBLIC[name]}")
    except ModuleNotFoundError as error:
        if missing := errors.missing_export_package(f"fwl_export.{name}", error):
            raise missing from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the module's names, except those that cannot be imported without PyTorch."""
    from importlib.util import find_spec

    names = set(globals()) | set(_PUBLIC)
    if not all(map(find_spec, errors.EXPORT_PACKAGES)):
        parts = {name: module.partition(".")[0] for name, module in _PUBLIC.items()}
        names -= {name for name, part in parts.items() if part in _EXPORT_PARTS}
    return sorted(names)

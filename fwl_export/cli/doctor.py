"""`fwl-export doctor`: what is installed, and what cannot be done without what is missing."""

from __future__ import annotations

import importlib.util
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import typer

from fwl_export.cli.options import JsonOption
from fwl_export.cli.terminal import COLUMNS, print_json


@dataclass(frozen=True)
class Piece:
    """A package, driver or library that fwl-export uses.

    Attributes:
      name: Name as users know it.
      found: Whether it is installed and loads.
      version: Its version, or "" if it has none or is missing.
      note: What it provides; if it is missing, what cannot be done and how to install it.
      needed: Whether running a model needs it.
    """

    name: str
    found: bool
    version: str
    note: str
    needed: bool = False


# What exporting needs in addition to _RUN, and what for.
_EXPORT = {
    "torch": "for export, check and train",
    "onnx": "for export and check",
    "onnxscript": "for export",
}
_RUN = {
    "safetensors": "for checkpoints and saved states",
    "tokenizers": "for texts; token ids work without",
}

_VARIANT_COSTS = {
    "rtx": "for engines that are built without a GPU",
    "tensorrt": "for engines for data-center GPUs such as SM90",
}


def doctor(json: JsonOption = False) -> None:
    """Show what is installed and what is missing.

    Says of each missing package what cannot be done without it, and how to install it.

    Exit code 0: everything that running a model needs is installed; 1: something is missing.

    Example:
      fwl-export doctor
    """
    pieces = examine()
    can_run = all(piece.found for piece in pieces if piece.needed)
    can_export = can_run and all(piece.found for piece in pieces if piece.name in _EXPORT)
    if json:
        found = {"can_run": can_run, "can_export": can_export}
        print_json({**found, "pieces": [asdict(piece) for piece in pieces]})
    else:
        print(_report(pieces, can_run, can_export))
    if not can_run:
        raise typer.Exit(1)


def examine() -> list[Piece]:
    """Return what is installed and what is not, without importing anything large."""
    from fwl_export.plugins import ONNXRUNTIME, TENSORRT

    packages = [_package(name, cost, "[export]", False) for name, cost in _EXPORT.items()]
    packages += [_package(name, cost, "", True) for name, cost in _RUN.items()]
    plugins = [
        _plugin(ONNXRUNTIME, "ONNX Runtime"),
        _plugin(TENSORRT, "TensorRT"),
    ]
    variants = [_variant(name, cost) for name, cost in _VARIANT_COSTS.items()]
    return [*packages, _onnxruntime(), *variants, _driver(), *plugins]


def _package(name: str, cost: str, extra: str, needed: bool) -> Piece:
    version = _version(name)
    note = "" if version else f"{cost}; pip install 'fwl-export{extra}'"
    return Piece(name, bool(version), version, note, needed)


def _onnxruntime() -> Piece:
    from fwl_export.errors import MissingDependencyError
    from fwl_export.ort import import_onnxruntime

    try:
        onnxruntime = import_onnxruntime()
    except MissingDependencyError as problem:
        error = problem.__cause__
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        note = "" if missing else f"installed, but it cannot be loaded ({error}): "
        note += "for export and runtime 'onnxruntime'; pip install 'fwl-export[cpu]'"
        return Piece("ONNX Runtime", False, "", note, needed=True)
    providers = onnxruntime.get_available_providers()
    names = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    note = f"providers {names}"
    return Piece("ONNX Runtime", True, onnxruntime.__version__, note, needed=True)


def _variant(name: str, cost: str) -> Piece:
    from fwl_export.engines import VARIANTS, probe_variant

    variant, probe = VARIANTS[name], probe_variant(name)
    if not probe.available:
        return Piece(variant.title, False, "", f"{cost}; {probe.reason}")
    sms = ", ".join(map(str, probe.sms))
    if not variant.needs_device:
        note = f"builds engines for SM {sms}, without a GPU"
    elif sms:
        note = f"builds engines for the GPU that is here, SM {sms}"
    else:
        note = "builds engines only for the GPU that is present, and there is none"
    note += f"; Polygraphy {probe.versions['polygraphy']}"
    return Piece(variant.title, True, probe.version, note)


def _driver() -> Piece:
    from fwl_export.engines import query_driver

    driver = query_driver()
    if not driver.devices:
        note = f"{driver.reason}: engines can be built here, but not run"
        return Piece("CUDA driver", False, driver.version, note)
    gpus = ", ".join(f"{device.name} (SM {device.sm})" for device in driver.devices)
    return Piece("CUDA driver", True, driver.version, gpus)


def _plugin(library: str, runtime: str) -> Piece:
    from fwl_export.plugins import find_plugin

    if find_plugin(library) is not None:
        return Piece(library, True, "", f"kernels of the fast-weight update for {runtime}")
    note = (
        f"{runtime} runs the fast-weight update in standard operators, slower; `make plugins` or "
        "`pip install`, with a C++ compiler"
    )
    return Piece(library, False, "", note)


def _version(name: str) -> str:
    """Return the version of a package, "" if its module is not found, or "unknown"."""
    # Imported here because it takes a tenth of the time that --help may take.
    from importlib.metadata import PackageNotFoundError, version

    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _report(pieces: Sequence[Piece], can_run: bool, can_export: bool) -> str:
    from fwl_export import __version__

    lines = [
        f"fwl-export {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "",
    ]
    for piece in pieces:
        mark = "ok" if piece.found else ("MISSING" if piece.needed else "no")
        text = f"{mark:7}  {piece.name} {piece.version}".rstrip()
        text += f": {piece.note}" if piece.note else ""
        lines += textwrap.wrap(text, COLUMNS, subsequent_indent=" " * 9, break_on_hyphens=False)
    verdict = "cannot run models"
    if can_run:
        verdict = "can export models and run them" if can_export else "can run models, not export"
    return "\n".join([*lines, "", f"This machine {verdict}."])

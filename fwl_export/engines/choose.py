"""Choose which of a bundle's engines to run, before anything of TensorRT is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from fwl_export.bundle.manifest import ENGINES_FOLDER, Bundle
from fwl_export.engines.device import Device
from fwl_export.engines.metadata import PLUGIN, EngineMetadata
from fwl_export.engines.variant import VARIANTS, Variant, find_variant
from fwl_export.errors import EngineError, PluginError
from fwl_export.json_files import read_json


def read_engines(bundle: Bundle) -> list[EngineMetadata]:
    """Return the metadata of all engines of a bundle, after checking the files' hashes.

    Raises:
      BundleError: A metadata file is missing or changed.
      EngineError: A metadata file is malformed.
    """
    engines = []
    for name in bundle.manifest.files:
        if name.startswith(ENGINES_FOLDER + "/") and name.endswith(".json"):
            path, remedy = bundle.folder / name, "build the engine again with `fwl-export build`"
            data = read_json(path, EngineError, remedy, bundle.read_file(name))
            engines.append(EngineMetadata.from_dict(data, str(path)))
    return engines


def choose_variant(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str | None = None
) -> Variant:
    """Return the TensorRT variant to run.

    Args:
      bundle: The bundle to run.
      engines: The metadata of its engines.
      device: The GPU to run on.
      variant: Name of the variant. None chooses among the installed variants that have an engine
        for this GPU: the one that this process already uses, or else the first of `VARIANTS`.

    Raises:
      EngineError: The variant is unknown, or the bundle has no engine for this GPU.
    """
    fitting = _fitting(bundle, engines, device, variant)
    if not fitting:
        raise EngineError(_no_engine(bundle, engines, device, variant))
    names = {engine.variant for engine in fitting}
    able = [each for each in VARIANTS.values() if each.name in names]
    installed = [each for each in able if importlib.util.find_spec(each.module) is not None]
    # If none is installed, the import of the first one raises an error that says how to install it.
    return min(installed or able, key=lambda each: each.module not in sys.modules)


def choose_engine(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str, version: str
) -> EngineMetadata:
    """Return the engine to run.

    An engine that updates its state in place is chosen only if there is no other.

    Args:
      bundle: The bundle to run.
      engines: The metadata of its engines.
      device: The GPU to run on.
      variant: Name of the variant to run.
      version: The installed version of the variant.

    Raises:
      EngineError: No engine was built by this version for this GPU.
    """
    fitting = _fitting(bundle, engines, device, variant)
    same = [engine for engine in fitting if engine.version == version]
    if not same:
        built = " and ".join(sorted({engine.version for engine in fitting}))
        has = f"were built by {built}" if built else "do not exist"
        raise EngineError(
            f"{VARIANTS[variant].title} {version} is installed, but the bundle's engines for "
            f"SM{device.sm} {has}, and an engine runs only in the version that built it; "
            f"{_remedy(bundle, device, variant)}"
        )
    return min(same, key=lambda engine: engine.in_place_state)


def needs_library(engine: EngineMetadata, plugin: str) -> bool:
    """Return whether the plugin library must be loaded before an engine.

    Args:
      engine: The engine to run.
      plugin: What the caller asked for: "auto", "none", "required", or the path of a library.

    Raises:
      PluginError: The engine was built with the plugin, but "none" was asked for, or vice versa.
    """
    if plugin == "none" and engine.update_path == PLUGIN:
        raise PluginError(
            f"engine '{engine.name}' computes the fast-weight updates in the plugin, but plugin "
            "'none' was asked for; build the engine again with --plugin none"
        )
    if plugin not in ("auto", "none") and engine.update_path != PLUGIN:
        raise PluginError(
            f"engine '{engine.name}' computes the fast-weight updates in standard operators, but "
            "the plugin was asked for; build the engine again with --plugin required"
        )
    return engine.update_path == PLUGIN and not engine.plugin_embedded


def _fitting(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str | None
) -> list[EngineMetadata]:
    names = VARIANTS if variant is None else (find_variant(variant).name,)
    wanted = bundle.manifest.model_id
    return [e for e in engines if e.sm == device.sm and e.model_id == wanted and e.variant in names]


def _no_engine(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str | None
) -> str:
    title = "" if variant is None else f"{VARIANTS[variant].title} "
    has = f" (it has {', '.join(engine.name for engine in engines)})" if engines else ""
    return (
        f"bundle '{bundle.folder}' has no {title}engine of its model for this GPU, {device.name}, "
        f"SM{device.sm}{has}; {_remedy(bundle, device, variant or next(iter(VARIANTS)))}"
    )


def _remedy(bundle: Bundle, device: Device, variant: str) -> str:
    return f"build one with `fwl-export build {bundle.folder} --variant {variant} --sm {device.sm}`"

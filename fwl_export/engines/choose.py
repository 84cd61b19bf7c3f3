"""Which of a bundle's engines runs here; decided before anything of TensorRT is imported."""

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
    """Return the facts of all engines of a bundle, after checking their hashes.

    Raises:
      BundleError: a file of facts is missing or changed.
      EngineError: one is malformed.
    """
    engines = []
    for name in bundle.manifest.files:
        if name.startswith(ENGINES_FOLDER + "/") and name.endswith(".json"):
            path = bundle.file(name)
            data = read_json(path, EngineError, "build the engine again")
            engines.append(EngineMetadata.from_dict(data, str(path)))
    return engines


def choose_variant(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str | None = None
) -> Variant:
    """Return the variant to run: the given one, or one that has an engine here and is installed.

    If there are two, the one that this process already uses, else the first of `VARIANTS`.

    Raises:
      EngineError: the variant is unknown, or there is no engine for this GPU.
    """
    fitting = _fitting(bundle, engines, device, variant)
    if not fitting:
        raise EngineError(_no_engine(bundle, engines, device, variant))
    names = {facts.variant for facts in fitting}
    able = [each for each in VARIANTS.values() if each.name in names]
    installed = [each for each in able if importlib.util.find_spec(each.module) is not None]
    # If none is, its import says so.
    return min(installed or able, key=lambda each: each.module not in sys.modules)


def choose_engine(
    bundle: Bundle, engines: Sequence[EngineMetadata], device: Device, variant: str, version: str
) -> EngineMetadata:
    """Return the engine to run with the installed version of a variant.

    One that updates its state in place is taken only where there is no other.

    Raises:
      EngineError: no engine was built by this version for this GPU.
    """
    fitting = _fitting(bundle, engines, device, variant)
    same = [facts for facts in fitting if facts.version == version]
    if not same:
        built = " and ".join(sorted({facts.version for facts in fitting})) or "none"
        raise EngineError(
            f"{VARIANTS[variant].title} {version} is installed, and the bundle's engines for "
            f"SM{device.sm} are of version {built}, which only that version runs; "
            f"{_remedy(bundle, device, variant)}"
        )
    return min(same, key=lambda facts: facts.in_place_state)


def needs_library(facts: EngineMetadata, plugin: str) -> bool:
    """Return whether the plugin library must be loaded before an engine.

    Args:
      facts: of the engine.
      plugin: what was asked for: "auto", "none", "required", or a library's path.

    Raises:
      PluginError: the engine was built the other way.
    """
    if plugin == "none" and facts.update_path == PLUGIN:
        raise PluginError(
            f"engine '{facts.name}' runs the fast-weight updates in the plugin, which is not "
            "wanted; build it again with --plugin none"
        )
    if plugin not in ("auto", "none") and facts.update_path != PLUGIN:
        raise PluginError(
            f"engine '{facts.name}' runs the fast-weight updates in standard operators, but the "
            "plugin was asked for; build it again with --plugin required"
        )
    return facts.update_path == PLUGIN and not facts.plugin_embedded


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
    has = f" (it has {', '.join(facts.name for facts in engines)})" if engines else ""
    return (
        f"bundle '{bundle.folder}' has no {title}engine of its model for this GPU, {device.name}, "
        f"SM{device.sm}{has}; {_remedy(bundle, device, variant or next(iter(VARIANTS)))}"
    )


def _remedy(bundle: Bundle, device: Device, variant: str) -> str:
    return f"build one with `fwl-export build {bundle.folder} --variant {variant} --sm {device.sm}`"

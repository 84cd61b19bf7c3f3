"""Build engines from a bundle and add them to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fwl_export import __version__
from fwl_export.bundle.defaults import DEFAULT_MAX_BATCH, DEFAULT_SMS
from fwl_export.bundle.manifest import (
    ENGINES_FOLDER,
    Bundle,
    describe_file,
    read_bundle,
    write_manifest,
)
from fwl_export.deprecations import renamed_arguments
from fwl_export.engines.compile import PluginUse, Range
from fwl_export.engines.metadata import (
    FUNCTION_BODY,
    PLUGIN,
    EngineMetadata,
    ProfileMetadata,
    TensorMetadata,
)
from fwl_export.engines.variant import find_variant
from fwl_export.engines.worker import Probe, build_in_worker, describe_variant
from fwl_export.errors import EngineError
from fwl_export.files import replaced_file
from fwl_export.plugins import TENSORRT, find_plugin

_log = logging.getLogger(__name__)


@renamed_arguments(flavour="variant")
def build_engines(
    bundle: Bundle,
    variant: str = "rtx",
    sms: Sequence[int] | None = None,
    precision: str | None = None,
    chunk: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    plugin: str | Path = "auto",
    in_place_state: bool = False,
    embed_plugin: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[EngineMetadata]:
    """Build one engine per SM into the bundle, each registered as soon as it is finished.

    An engine has two optimisation profiles: "decode" for calls of 1 token, "prefill" for calls
    of 1 to `chunk` tokens, best at `chunk`; both for 1 to `max_batch` rows, best at 1. Nothing
    is rounded to TF32. An engine of the same name is replaced.

    Args:
      bundle: where the engines go.
      variant: "rtx" or "tensorrt".
      sms: compute capabilities without the dot, e.g. 89. None means 80, 86, 89 and 120 for rtx,
        which builds without a GPU, and the GPU of this machine for tensorrt.
      precision: must be the bundle's; None means that.
      chunk: largest T of a call; None means the bundle's `max_tokens`.
      max_batch: largest B of a call.
      plugin: the library of the fast-weight updates, see `find_plugin`. Without it they are built
        from standard operators; "required" or a path insist on it.
      in_place_state: the updates write their state over the old one. Such an engine needs both
        bound to one buffer, so Triton Inference Server cannot run it; its name ends in "-inplace".
      embed_plugin: put the library into the engine, which then runs without loading it.
      progress: called with what is being done, every second.

    Raises:
      PluginError: the library is required and not there.
      EngineError: an argument does not fit, the plugin was not taken, or parser or builder
        refuse.
      MissingDependencyError: the variant is not installed.
      BundleError: the ONNX file is not what the manifest says.
    """
    ranges = _ranges(bundle, precision, chunk, max_batch)
    library = find_plugin(TENSORRT, plugin)
    if library is None and (in_place_state or embed_plugin):
        option = "in-place-state" if in_place_state else "embed-plugin"
        raise EngineError(
            f"--{option} needs the plugin, which is not there or not wanted; build it with "
            "`make plugins`, or give its path with --plugin"
        )
    use = None if library is None else PluginUse(library, in_place_state, embed_plugin)
    _log.info("building with plugin %s", library or "none, from standard operators")
    insist = plugin not in ("auto", "none")
    progress(f"loading {find_variant(variant).title}")
    probe = describe_variant(variant)
    targets = _targets(variant, sms, probe)
    model = bundle.model_files()
    built: list[EngineMetadata] = []
    for number, sm in enumerate(targets, 1):
        title = f"engine {number} of {len(targets)} for SM{sm}"
        progress(title)
        tick = _ticker(progress, title)
        try:
            built.append(_build(bundle, variant, sm, probe, model, ranges, use, insist, tick))
        except EngineError as error:
            stays = f"; in the bundle stay {', '.join(b.name for b in built)}" if built else ""
            raise EngineError(f"{error}{stays}") from None
    return built


def engine_name(
    variant: str, version: str, sm: int, precision: str, in_place_state: bool = False
) -> str:
    """Return the name of an engine: of its file, without ".engine"."""
    end = "-inplace" if in_place_state else ""
    return f"{variant}-{version}-sm{sm}-{precision}{end}"


def _ticker(progress: Callable[[str], None], title: str) -> Callable[[float], None]:
    return lambda seconds: progress(f"{title}, {seconds:.0f} s")


def _ranges(
    bundle: Bundle, precision: str | None, chunk: int | None, max_batch: int
) -> tuple[Range, Range]:
    """Check the arguments against the bundle; returns the optimisation profiles."""
    manifest = bundle.manifest
    if precision not in (None, manifest.precision):
        raise EngineError(
            f"precision '{precision}' was asked for, but bundle '{bundle.folder}' is "
            f"{manifest.precision} and engines take their types from the ONNX file; export it with "
            f"`fwl-export export … --precision {precision}`"
        )
    chunk = manifest.max_tokens if chunk is None else chunk
    if not 1 <= chunk <= manifest.max_tokens:
        raise EngineError(
            f"chunk is {chunk}; expected 1 to {manifest.max_tokens}, the bundle's largest call "
            "(`fwl-export export … --max-tokens` sets it)"
        )
    if max_batch < 1:
        raise EngineError(f"max_batch is {max_batch}; expected 1 or more")
    batch = (1, 1, max_batch)
    return Range("decode", batch, (1, 1, 1)), Range("prefill", batch, (1, chunk, chunk))


def _targets(variant: str, sms: Sequence[int] | None, probe: Probe) -> list[int]:
    """Return what to build for, each once, after checking that the variant can."""
    chosen = find_variant(variant)
    here = ", ".join(map(str, probe.sms))
    if chosen.needs_device and not probe.sms:
        raise EngineError(
            f"{chosen.title} builds only for the GPU that is present, and there is none here; "
            "build on a machine with the GPU, or use variant 'rtx'"
        )
    if sms is None:
        sms = probe.sms if chosen.needs_device else DEFAULT_SMS
    if not sms:
        raise EngineError("no SM was given to build for; expected one or more, e.g. 89")
    for sm in sms:
        if sm not in probe.sms and chosen.needs_device:
            raise EngineError(
                f"SM{sm} was asked for, but {chosen.title} builds only for the GPU that is "
                f"present, which is SM{here}; use that, or variant 'rtx'"
            )
        if sm not in probe.sms:
            raise EngineError(
                f"{chosen.title} {probe.version} has no SM{sm}; expected one of {here}"
            )
    return list(dict.fromkeys(sms))


def _build(
    bundle: Bundle,
    variant: str,
    sm: int,
    probe: Probe,
    model: Path,
    ranges: Sequence[Range],
    plugin: PluginUse | None,
    insist: bool,
    tick: Callable[[float], None],
) -> EngineMetadata:
    """Build one engine, put it and its facts into the bundle, and register both."""
    manifest = bundle.manifest
    in_place = plugin is not None and plugin.in_place_state
    name = engine_name(variant, probe.version, sm, manifest.precision, in_place)
    names = [f"{ENGINES_FOLDER}/{name}.json", f"{ENGINES_FOLDER}/{name}.engine"]
    target = bundle.folder / names[1]
    with replaced_file(bundle.folder / names[0]) as beside, replaced_file(target) as engine:
        try:
            known = build_in_worker(variant, model, sm, ranges, engine, plugin, tick)
        except OSError as error:
            if error.filename != str(engine):
                raise
            # The user knows the file by this name, not by that of the one beside it.
            raise OSError(error.errno, error.strerror, str(target)) from None
        except EngineError as error:
            raise EngineError(f"{error}{_hint(str(error))}") from None
        facts = _facts(bundle, name, variant, sm, probe, known, plugin, engine)
        if insist and facts.update_path != PLUGIN:
            raise EngineError(
                f"{probe.version} of {find_variant(variant).title} built the fast-weight updates "
                "from the function body although the plugin is required; export the bundle again "
                "with this version of fwl-export"
            )
        beside.write_text(json.dumps(facts.to_dict(), indent=2) + "\n", encoding="utf-8")
        _forget(bundle, names)
    bundle.add_files(names)
    _log.info("built '%s' in %.1f s: %s", target, facts.build_seconds, facts.update_path)
    return facts


def _facts(
    bundle: Bundle,
    name: str,
    variant: str,
    sm: int,
    probe: Probe,
    known: dict[str, Any],
    plugin: PluginUse | None,
    engine: Path,
) -> EngineMetadata:
    """Put together what the worker and the bundle know about an engine."""
    manifest, file = bundle.manifest, describe_file(engine)
    return EngineMetadata(
        name=name,
        variant=variant,
        version=probe.version,
        sm=sm,
        precision=manifest.precision,
        tf32=known["tf32"],
        inputs=[TensorMetadata(**tensor) for tensor in known["inputs"]],
        outputs=[TensorMetadata(**tensor) for tensor in known["outputs"]],
        profiles=[ProfileMetadata(**profile) for profile in known["profiles"]],
        layers=known["layers"],
        plugin_layers=known["plugin_layers"],
        plugin_sha256="" if plugin is None else describe_file(plugin.path)["sha256"],
        plugin_embedded=plugin is not None and plugin.embed,
        in_place_state=plugin is not None and plugin.in_place_state,
        update_path=_update_path(known["plugin_layers"], manifest.op["nodes"]),
        build_seconds=known["build_seconds"],
        engine_bytes=file["bytes"],
        sha256=file["sha256"],
        model_id=manifest.model_id,
        versions={"fwl-export": __version__, **probe.versions},
    )


def _forget(bundle: Bundle, names: Sequence[str]) -> None:
    """Take files out of the manifest before they change.

    So the manifest names no file with another hash, at whatever moment the power fails.
    """
    manifest = read_bundle(bundle.folder).manifest
    files = {name: entry for name, entry in manifest.files.items() if name not in names}
    if len(files) < len(manifest.files):
        write_manifest(bundle.folder, {**manifest.to_dict(), "files": files})


def _update_path(plugin_layers: int, updates: int) -> str:
    """Return which implementation of the fast-weight update an engine holds.

    A parser that finds no plugin takes the function body without a word, node by node.
    """
    if plugin_layers not in (0, updates):
        raise EngineError(
            f"{plugin_layers} of {updates} fast-weight updates became plugin layers; expected "
            "all or none. Do the plugin library and the bundle belong together?"
        )
    return PLUGIN if plugin_layers else FUNCTION_BODY


def _hint(message: str) -> str:
    """Return what to do about a known error of a builder."""
    if "FP32 GEMM is not supported" in message:
        return (
            ". The fast weights' sums are float32 at every precision; the oldest GPU whose "
            "float32 products this builder knows is SM80"
        )
    return ""

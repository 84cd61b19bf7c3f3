"""Build engines from a bundle and add them to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fwl_export import __version__
from fwl_export.bundle.defaults import DEFAULT_MAX_BATCH, DEFAULT_SMS
from fwl_export.bundle.manifest import ENGINES_FOLDER, MODEL_FILE, Bundle, describe_file
from fwl_export.bundle.paths import place_for
from fwl_export.deprecations import renamed_arguments
from fwl_export.engines.metadata import (
    FUNCTION_BODY,
    PLUGIN,
    EngineMetadata,
    NetworkMetadata,
    op_state_tensors,
)
from fwl_export.engines.request import BuildRequest, PluginUse, Range
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
    """Build one engine per GPU architecture and add each to the bundle as soon as it is built.

    An engine has two optimization profiles: "decode" for calls of 1 token, and "prefill" for calls
    of 1 to `chunk` tokens, tuned for `chunk`. Both take 1 to `max_batch` rows and are tuned for 1.
    Float32 products are never rounded to TF32. A new engine replaces one of the same name.

    Args:
      bundle: The bundle to build from and to add the engines to.
      variant: The TensorRT variant: "rtx" for TensorRT-RTX, or "tensorrt".
      sms: Compute capabilities to build for, without the dot, e.g. 89. None means 80, 86, 89 and
        120 for "rtx", which needs no GPU to build, and this machine's GPU for "tensorrt".
      precision: The bundle's precision, to insist on it; None accepts any.
      chunk: Largest number of tokens per call; None means the bundle's `max_tokens`.
      max_batch: Largest number of rows per call.
      plugin: The plugin library for the fast-weight updates, see `find_plugin`. Without it, they
        are built from standard operators; "required" or a path make that an error.
      in_place_state: Whether the updates write their new state over the old one. The caller must
        then bind both to one buffer, which Triton Inference Server cannot do; the engine's name
        ends in "-inplace".
      embed_plugin: Whether to put the plugin library into the engine, which then runs without
        loading it separately.
      progress: Called with a line of text about what is being done, every second.

    Returns:
      The metadata of the new engines, in the order they were built.

    Raises:
      PluginError: The plugin library is required and missing, or cannot be loaded.
      EngineError: An argument does not fit, the parser or the builder refuses the model, or it
        does without the plugin that is required.
      MissingDependencyError: The variant is not installed.
      BundleError: The ONNX file differs from what the manifest says, or another export replaced the
        bundle meanwhile.
      OutputBusyError: Another process is building the same engine.
    """
    ranges = _ranges(bundle, precision, chunk, max_batch)
    use = None
    if bundle.has_updates(plugin, in_place_state or embed_plugin):
        use = _plugin_use(plugin, in_place_state, embed_plugin)
    _log.info("building with plugin %s", use.path if use else "none, from standard operators")
    progress(f"loading {find_variant(variant).title}")
    probe = describe_variant(variant)
    sms = _targets(variant, sms, probe)
    model = bundle.model_files()
    built: list[EngineMetadata] = []
    for number, sm in enumerate(sms, 1):
        name = engine_name(variant, probe.version, sm, bundle.manifest.precision, in_place_state)
        output = place_for(bundle.folder, f"{ENGINES_FOLDER}/{name}.engine")
        request = BuildRequest(variant, model, sm, ranges, output, use)
        title = f"engine {number} of {len(sms)} for SM{sm}"
        progress(title)
        try:
            built.append(_build(bundle, request, probe, _ticker(progress, title)))
        except EngineError as error:
            names = ", ".join(engine.name for engine in built)
            stays = f"; the bundle keeps the engines built before: {names}" if built else ""
            raise EngineError(f"{error}{stays}") from None
    return built


def engine_name(
    variant: str, version: str, sm: int, precision: str, in_place_state: bool = False
) -> str:
    """Return the name of an engine: its file name without ".engine"."""
    end = "-inplace" if in_place_state else ""
    return f"{variant}-{version}-sm{sm}-{precision}{end}"


def _plugin_use(plugin: str | Path, in_place_state: bool, embed: bool) -> PluginUse | None:
    """Return how to use the plugin library, or None to build without it."""
    library = find_plugin(TENSORRT, plugin)
    if library is not None:
        return PluginUse(library, in_place_state, embed, required=plugin != "auto")
    if in_place_state or embed:
        option = "in-place-state" if in_place_state else "embed-plugin"
        reason = "--plugin none leaves it out" if plugin == "none" else "it is not built"
        raise EngineError(
            f"--{option} needs the plugin library, but {reason}; build it with `make plugins`, or "
            "give its path with --plugin"
        )
    return None


def _ticker(progress: Callable[[str], None], title: str) -> Callable[[float], None]:
    return lambda seconds: progress(f"{title}, {seconds:.0f} s")


def _ranges(
    bundle: Bundle, precision: str | None, chunk: int | None, max_batch: int
) -> tuple[Range, Range]:
    """Check the arguments against the bundle and return the sizes of the two profiles."""
    manifest = bundle.manifest
    if precision not in (None, manifest.precision):
        raise EngineError(
            f"precision '{precision}' was asked for, but bundle '{bundle.folder}' is "
            f"{manifest.precision} and engines take their types from the ONNX file; export the "
            f"model again with `fwl-export export … --precision {precision}`"
        )
    chunk = manifest.max_tokens if chunk is None else chunk
    if not 1 <= chunk <= manifest.max_tokens:
        raise EngineError(
            f"chunk is {chunk}; expected 1 to {manifest.max_tokens}, the bundle's largest number "
            "of tokens per call (`fwl-export export … --max-tokens` sets it)"
        )
    if max_batch < 1:
        raise EngineError(f"max_batch is {max_batch}; expected 1 or more")
    batch = (1, 1, max_batch)
    return Range("decode", batch, (1, 1, 1)), Range("prefill", batch, (1, chunk, chunk))


def _targets(variant: str, sms: Sequence[int] | None, probe: Probe) -> list[int]:
    """Return the compute capabilities to build for, each once, after checking the variant's."""
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
                f"{chosen.title} {probe.version} cannot build for SM{sm}; expected one of {here}"
            )
    return list(dict.fromkeys(sms))


def _build(
    bundle: Bundle, request: BuildRequest, probe: Probe, tick: Callable[[float], None]
) -> EngineMetadata:
    """Build one engine, write its metadata beside it, and add both files to the manifest."""
    engine = request.output
    names = [f"{ENGINES_FOLDER}/{path.name}" for path in (engine.with_suffix(".json"), engine)]
    try:
        metadata = _write(bundle, request, names, probe, tick)
    except (OSError, EngineError):
        bundle.check_not_replaced()  # if it was, this says so, rather than that a file is missing
        raise
    bundle.add_files(names)
    _log.info("built '%s' in %.1f s: %s", names[1], metadata.build_seconds, metadata.update_path)
    return metadata


def _write(
    bundle: Bundle,
    request: BuildRequest,
    names: Sequence[str],
    probe: Probe,
    tick: Callable[[float], None],
) -> EngineMetadata:
    """Build one engine and write it, with its metadata beside it; the manifest lists neither then.

    Another process that builds the same engine is refused: it would take minutes to wait for it.
    """
    described = request.output.with_suffix(".json")
    with (
        replaced_file(described, through_link=False) as beside,
        replaced_file(request.output, through_link=False) as engine,
    ):
        network = _compile(replace(request, output=engine), request.output, tick)
        metadata = _metadata(bundle, request, probe, network, engine)
        if request.requires_plugin and metadata.update_path != PLUGIN:
            raise EngineError(
                f"{find_variant(request.variant).title} {probe.version} built the fast-weight "
                "updates from the function body, although the plugin is required; export the "
                "bundle again with this version of fwl-export"
            )
        beside.write_text(json.dumps(metadata.to_dict(), indent=2) + "\n", encoding="utf-8")
        bundle.remove_files(names)
    return metadata


def _compile(request: BuildRequest, target: Path, tick: Callable[[float], None]) -> NetworkMetadata:
    """Build an engine in a worker, with errors that a user can act on.

    Args:
      request: The engine to build; its output is a temporary file.
      target: The path that the engine will have, which the user knows.
      tick: Called every second with the seconds that have passed.
    """
    try:
        return build_in_worker(request, tick)
    except OSError as error:
        if error.filename != str(request.output):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from None
    except EngineError as error:
        raise EngineError(f"{error}{_hint(str(error))}") from None


def _metadata(
    bundle: Bundle, request: BuildRequest, probe: Probe, network: NetworkMetadata, engine: Path
) -> EngineMetadata:
    """Put together what the worker and the bundle know about an engine.

    Args:
      bundle: The bundle of the model.
      request: What was built; its output names the engine.
      probe: The variant that built it.
      network: What the build knows about the network.
      engine: Path of the engine file, still temporary.
    """
    manifest, file, plugin = bundle.manifest, describe_file(engine), request.plugin
    return EngineMetadata(
        name=request.output.stem,
        variant=request.variant,
        version=probe.version,
        sm=request.sm,
        precision=manifest.precision,
        tf32=network.tf32,
        inputs=network.inputs,
        outputs=network.outputs,
        profiles=network.profiles,
        layers=network.layers,
        plugin_layers=network.plugin_layers,
        plugin_sha256="" if plugin is None else describe_file(plugin.path)["sha256"],
        plugin_embedded=request.embeds_plugin,
        in_place_state=request.in_place_state,
        update_path=_update_path(network.plugin_layers, manifest.op["nodes"]),
        build_seconds=network.build_seconds,
        engine_bytes=file["bytes"],
        sha256=file["sha256"],
        model_id=manifest.model_id,
        versions={"fwl-export": __version__, **probe.versions},
        in_place_tensors=(
            op_state_tensors(bundle.file(MODEL_FILE)) if request.in_place_state else []
        ),
    )


def _update_path(plugin_layers: int, updates: int) -> str:
    """Return which implementation of the fast-weight update an engine holds.

    The parser decides node by node, and takes the function body silently if it finds no plugin.

    Args:
      plugin_layers: Number of plugin layers in the network.
      updates: Number of fast-weight updates in the model.
    """
    if plugin_layers not in (0, updates):
        raise EngineError(
            f"{plugin_layers} of {updates} fast-weight updates became plugin layers; expected "
            "all or none. Were the plugin library and the bundle made by the same version of "
            "fwl-export?"
        )
    return PLUGIN if plugin_layers else FUNCTION_BODY


def _hint(message: str) -> str:
    """Return an explanation of a known error of a builder, to append to it, or ""."""
    if "FP32 GEMM is not supported" in message:
        return (
            ". The fast weights' sums are float32 at every precision, and the oldest GPU "
            "architecture for which this builder has float32 products is SM80"
        )
    return ""

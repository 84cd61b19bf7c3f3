"""ONNX file to engine, through Polygraphy's loaders; runs in the worker's process.

Polygraphy is imported inside functions: it binds to a variant when it is imported, so
`load_variant` must come first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fwl_export.engines.messages import shorten
from fwl_export.engines.metadata import ProfileMetadata, TensorMetadata
from fwl_export.engines.plugin import load_plugin
from fwl_export.engines.variant import LoadedVariant
from fwl_export.errors import EngineError
from fwl_export.op.spec import DOMAIN, NAME

_PLUGIN_LAYERS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")


@dataclass(frozen=True)
class Range:
    """Sizes of the free axes of one optimisation profile, each as (min, opt, max).

    Attributes:
      name: "decode" or "prefill".
      batch: of axis 0.
      tokens: of axis 1 of what comes per token.
    """

    name: str
    batch: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class PluginUse:
    """How a build uses the plugin library.

    Attributes:
      path: of the library.
      in_place_state: the updates write `present` over `past`.
      embed: the engine carries the library.
    """

    path: Path
    in_place_state: bool = False
    embed: bool = False


def compile_engine(
    loaded: LoadedVariant,
    model: Path,
    sm: int,
    ranges: Sequence[Range],
    output: Path,
    plugin: PluginUse | None = None,
) -> dict[str, Any]:
    """Build an engine and write it to `output`.

    Args:
      loaded: the variant of this process.
      model: ONNX file, its external data beside it.
      sm: compute capability to build for.
      ranges: one for each optimisation profile.
      output: file to write.
      plugin: for the fast-weight updates; None builds them from the function body.

    Returns:
      The part of `EngineMetadata` that is known here, JSON-ready.

    Raises:
      EngineError: the plugin library cannot be loaded, or the parser or the builder refuses; with
        its first error.
    """
    from polygraphy.backend.trt import engine_bytes_from_network

    began = time.perf_counter()
    if plugin is not None:
        title = f"{loaded.variant.title} {loaded.version}"
        with _first_error(f"{title} cannot load '{plugin.path}'") as errors:
            load_plugin(loaded.trt, title, plugin.path, errors)
    with _first_error(f"{loaded.variant.title} {loaded.version} cannot read '{model.name}'"):
        in_place = plugin is not None and plugin.in_place_state
        builder, network, _parser = _parse(loaded, model, in_place)
    inputs = [_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    profiles = [_profile(scope, inputs) for scope in ranges]
    facts = {
        "inputs": [asdict(tensor) for tensor in inputs],
        "outputs": [asdict(_tensor(network.get_output(i))) for i in range(network.num_outputs)],
        "profiles": [asdict(profile) for profile in profiles],
        "layers": network.num_layers,
        "plugin_layers": _count_plugins(network),
    }
    with _first_error(f"{loaded.variant.title} {loaded.version} cannot build for SM{sm}"):
        config = _config(loaded, builder, network, sm, profiles)
        if plugin is not None and plugin.in_place_state:
            config.set_preview_feature(loaded.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if plugin is not None and plugin.embed:
            config.plugins_to_serialize = [str(plugin.path)]
        engine = engine_bytes_from_network((builder, network), config)
    facts["tf32"] = bool(config.get_flag(loaded.trt.BuilderFlag.TF32))
    facts["build_seconds"] = round(time.perf_counter() - began, 3)
    with output.open("wb") as stream:
        stream.write(engine)
    return facts


def _parse(loaded: LoadedVariant, model: Path, in_place_state: bool) -> tuple[Any, Any, Any]:
    """Read an ONNX file; returns builder, network and the parser, which owns the weights."""
    from polygraphy.backend.trt import create_network, network_from_onnx_path

    # Where the flag is gone, every network is strongly typed.
    typed = hasattr(loaded.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if not in_place_state:
        parsed: tuple[Any, Any, Any] = network_from_onnx_path(str(model), strongly_typed=typed)
        return parsed
    from polygraphy.backend.trt import get_trt_logger
    from polygraphy.exception import PolygraphyException

    builder, network = create_network(strongly_typed=typed)
    parser = loaded.trt.OnnxParser(network, get_trt_logger())
    # The path tells where the weights lie.
    if not parser.parse(_with_state_in_place(model), str(model)):
        raise PolygraphyException("Could not parse ONNX correctly")
    return builder, network, parser


def _with_state_in_place(model: Path) -> bytes:
    """Return an ONNX file, without its external data, whose updates ask for one state buffer."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    readers = [name for node in proto.graph.node for name in node.input]
    for node in proto.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        state = node.input[-1]
        if readers.count(state) > 1:
            raise EngineError(
                f"'{state}' cannot be updated in place: the model also copies it into its anchor, "
                "and builders crash or refuse where a state has two readers; build without "
                "--in-place-state"
            )
        node.attribute.append(onnx.helper.make_attribute("in_place_state", 1))
    content: bytes = proto.SerializeToString()
    return content


def _config(
    loaded: LoadedVariant, builder: Any, network: Any, sm: int, profiles: Sequence[ProfileMetadata]
) -> Any:
    from polygraphy.backend.trt import Profile, create_config

    shapes = []
    for profile in profiles:
        shapes.append(Profile())
        for name, sizes in profile.inputs.items():
            shapes[-1].add(name, **sizes)
    if loaded.variant.needs_device:
        config = create_config(builder, network, profiles=shapes)
    else:
        from polygraphy.backend.tensorrt_rtx import create_config_rtx

        config = create_config_rtx(
            builder, network, profiles=shapes, compute_capabilities=[divmod(sm, 10)]
        )
    # On by default in RTX, and it rounds the factors of float32 products to 10 bits: half
    # precision under the name of fp32, in the fast weights' sums too.
    config.clear_flag(loaded.trt.BuilderFlag.TF32)
    return config


def _tensor(tensor: Any) -> TensorMetadata:
    from polygraphy.datatype import DataType

    return TensorMetadata(
        tensor.name,
        [int(size) for size in tensor.shape],
        DataType.from_dtype(tensor.dtype, source_module="tensorrt").name,
    )


def _profile(scope: Range, inputs: Sequence[TensorMetadata]) -> ProfileMetadata:
    """Put a range's sizes in the place of the inputs' free axes."""
    shapes = {}
    for tensor in inputs:
        sizes = {}
        for kind, batch, tokens in zip(
            ("min", "opt", "max"), scope.batch, scope.tokens, strict=True
        ):
            # Logits of the last position only are as welcome as those of all.
            fewest = 1 if kind == "min" and tensor.name == "logit_positions" else tokens
            free = (batch, fewest)
            sizes[kind] = [n if n >= 0 else free[axis] for axis, n in enumerate(tensor.shape)]
        shapes[tensor.name] = sizes
    return ProfileMetadata(scope.name, shapes)


def _count_plugins(network: Any) -> int:
    kinds = (network.get_layer(i).type.name for i in range(network.num_layers))
    return sum(kind in _PLUGIN_LAYERS for kind in kinds)


@contextmanager
def _first_error(what: str) -> Iterator[list[str]]:
    """Turn a failure into an EngineError with the first error that was logged in the block.

    Yields the errors so far.

    Polygraphy's own exception only says that something failed.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.colors = G_LOGGER.letter = False
    G_LOGGER.module_severity = G_LOGGER.WARNING
    logger = G_LOGGER.python_logger
    logger.addHandler(handler)
    try:
        yield errors
    except PolygraphyException as error:
        raise EngineError(f"{what}: {shorten([*errors, str(error)])}") from None
    finally:
        logger.removeHandler(handler)

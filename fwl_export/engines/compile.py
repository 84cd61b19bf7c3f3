"""Compile an ONNX file to an engine, through Polygraphy's loaders; runs in the worker process.

Polygraphy is imported inside functions: it binds to a TensorRT variant when it is imported, so
`load_variant` must come first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fwl_export.engines.messages import shorten
from fwl_export.engines.metadata import NetworkMetadata, ProfileMetadata, TensorMetadata
from fwl_export.engines.plugin import load_plugin
from fwl_export.engines.request import BuildRequest, Range
from fwl_export.engines.variant import LoadedVariant
from fwl_export.errors import EngineError
from fwl_export.op.spec import DOMAIN, NAME

_PLUGIN_LAYERS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")


def compile_engine(loaded: LoadedVariant, request: BuildRequest) -> NetworkMetadata:
    """Build an engine and write it to the request's output.

    Args:
      loaded: The request's variant, loaded into this process.
      request: The engine to build.

    Raises:
      PluginError: The plugin library cannot be loaded.
      EngineError: The parser or the builder refuses the model; the message holds its first error.
      OSError: The output cannot be written.
    """
    from polygraphy.backend.trt import engine_bytes_from_network

    began = time.perf_counter()
    title = f"{loaded.variant.title} {loaded.version}"
    if request.plugin is not None:
        with _first_error(f"{title} cannot load '{request.plugin.path}'") as errors:
            load_plugin(loaded.trt, title, request.plugin.path, errors)
    with _first_error(f"{title} cannot read '{request.model.name}'"):
        # The parser owns the weights, so it must live until the engine is built.
        builder, network, _parser = _parse(loaded, request.model, request.in_place_state)
    inputs = [_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_tensor(network.get_output(i)) for i in range(network.num_outputs)]
    profiles = [_profile(span, inputs) for span in request.ranges]
    layers, plugin_layers = network.num_layers, _count_plugins(network)
    with _first_error(f"{title} cannot build for SM{request.sm}"):
        config = _config(loaded, builder, network, request, profiles)
        engine = engine_bytes_from_network((builder, network), config)
    tf32 = bool(config.get_flag(loaded.trt.BuilderFlag.TF32))
    seconds = round(time.perf_counter() - began, 3)
    with request.output.open("wb") as stream:
        stream.write(engine)
    return NetworkMetadata(inputs, outputs, profiles, layers, plugin_layers, tf32, seconds)


def _parse(loaded: LoadedVariant, model: Path, in_place_state: bool) -> tuple[Any, Any, Any]:
    """Parse an ONNX file; return the builder, the network and the parser."""
    from polygraphy.backend.trt import create_network, network_from_onnx_path

    # TensorRT versions without the flag build only strongly typed networks.
    typed = hasattr(loaded.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if not in_place_state:
        parsed: tuple[Any, Any, Any] = network_from_onnx_path(str(model), strongly_typed=typed)
        return parsed
    from polygraphy.backend.trt import get_trt_logger
    from polygraphy.exception import PolygraphyException

    builder, network = create_network(strongly_typed=typed)
    parser = loaded.trt.OnnxParser(network, get_trt_logger())
    # The parser finds the external weights by the model's path.
    if not parser.parse(_with_state_in_place(model), str(model)):
        raise PolygraphyException("Could not parse ONNX correctly")
    return builder, network, parser


def _with_state_in_place(model: Path) -> bytes:
    """Return the model, without its external data, with every update's state set to be in place."""
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
                "and TensorRT crashes or refuses if a state that is updated in place has a second "
                "reader; build without --in-place-state"
            )
        node.attribute.append(onnx.helper.make_attribute("in_place_state", 1))
    content: bytes = proto.SerializeToString()
    return content


def _config(
    loaded: LoadedVariant,
    builder: Any,
    network: Any,
    request: BuildRequest,
    profiles: Sequence[ProfileMetadata],
) -> Any:
    from polygraphy.backend.trt import create_config

    shapes = _shapes(profiles)
    if loaded.variant.needs_device:
        config = create_config(builder, network, profiles=shapes)
    else:
        from polygraphy.backend.tensorrt_rtx import create_config_rtx

        config = create_config_rtx(
            builder, network, profiles=shapes, compute_capabilities=[divmod(request.sm, 10)]
        )
    # TensorRT-RTX allows TF32 by default. It would round the factors of float32 products to 10
    # bits, in the fast weights' sums too: half precision under the name of fp32.
    config.clear_flag(loaded.trt.BuilderFlag.TF32)
    if request.in_place_state:
        config.set_preview_feature(loaded.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if request.plugin is not None and request.plugin.embed:
        config.plugins_to_serialize = [str(request.plugin.path)]
    return config


def _shapes(profiles: Sequence[ProfileMetadata]) -> list[Any]:
    """Return the profiles as Polygraphy's."""
    from polygraphy.backend.trt import Profile

    shapes = []
    for profile in profiles:
        shapes.append(Profile())
        for name, sizes in profile.inputs.items():
            shapes[-1].add(name, **sizes)
    return shapes


def _tensor(tensor: Any) -> TensorMetadata:
    from polygraphy.datatype import DataType

    return TensorMetadata(
        tensor.name,
        [int(size) for size in tensor.shape],
        DataType.from_dtype(tensor.dtype, source_module="tensorrt").name,
    )


def _profile(span: Range, inputs: Sequence[TensorMetadata]) -> ProfileMetadata:
    """Replace the dynamic axes of the inputs by the sizes of a range."""
    shapes = {}
    for tensor in inputs:
        sizes = {}
        for kind, batch, tokens in zip(("min", "opt", "max"), span.batch, span.tokens, strict=True):
            # A call may ask for the logits of one position only, however many tokens it reads.
            fewest = 1 if kind == "min" and tensor.name == "logit_positions" else tokens
            free = (batch, fewest)
            sizes[kind] = [n if n >= 0 else free[axis] for axis, n in enumerate(tensor.shape)]
        shapes[tensor.name] = sizes
    return ProfileMetadata(span.name, shapes)


def _count_plugins(network: Any) -> int:
    kinds = (network.get_layer(i).type.name for i in range(network.num_layers))
    return sum(kind in _PLUGIN_LAYERS for kind in kinds)


@contextmanager
def _first_error(what: str) -> Iterator[list[str]]:
    """Turn a failure into an EngineError with the first error that was logged in the block.

    Polygraphy's own exception says only that something failed.

    Args:
      what: What failed; begins the message.

    Yields:
      The list of the errors logged so far.
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

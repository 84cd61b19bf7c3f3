"""Finding, checking and loading a bundle's engine for the GPU of this machine.

An engine is a program and may contain a library, and TensorRT runs what it contains. Only load
engines that you built yourself, or that come from someone whose programs you would run.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fwl_export.bundle.manifest import ENGINES_FOLDER, MODEL_FILE, Bundle
from fwl_export.bundle.state import PAST, TensorSpec
from fwl_export.engines import (
    Device,
    EngineMetadata,
    choose_engine,
    choose_variant,
    import_variant,
    needs_library,
    query_driver,
    read_engines,
)
from fwl_export.engines.metadata import op_state_tensors
from fwl_export.engines.plugin import load_plugin
from fwl_export.errors import ConfigError, DeviceError, EngineError
from fwl_export.plugins import TENSORRT, find_plugin
from fwl_export.runtimes.base import Call, parse_device
from fwl_export.runtimes.tensorrt.cuda import Cuda

_log = logging.getLogger(__name__)

LOGITS = "logits"


@dataclass(frozen=True)
class TensorRTModel:
    """A loaded engine that sessions share.

    Attributes:
      metadata: What is known about the engine.
      specs: Specs of the state's tensors, in the model's order.
      vocab_size: Number of token ids, V.
      max_tokens: Largest T of a call.
      max_batch: Largest B of a call.
      in_place: Names of the state tensors that the engine updates in place.
      cuda_graph: Whether to capture calls of one token in CUDA graphs.
      cuda: CUDA runtime on the engine's device.
      trt: Module of the TensorRT variant, `tensorrt_rtx` or `tensorrt`.
      engine: TensorRT's `ICudaEngine`.
      log: TensorRT's latest error messages.
      keep: Objects that must live as long as the engine.
      lock: Lock to hold while making an execution context.
    """

    metadata: EngineMetadata
    specs: Sequence[TensorSpec]
    vocab_size: int
    max_tokens: int
    max_batch: int
    in_place: frozenset[str]
    cuda_graph: bool
    cuda: Cuda
    trt: Any
    engine: Any
    log: deque[str]
    keep: Any
    lock: threading.Lock

    def check(self, succeeded: object, what: str) -> None:
        """Check the result of a TensorRT call.

        Args:
          succeeded: The result; false means that TensorRT refused.
          what: What TensorRT was asked for; completes "TensorRT refuses ...".

        Raises:
          EngineError: TensorRT refused; the message ends with its latest error.
        """
        if not succeeded:
            words = f": {self.log[-1]}" if self.log else ""
            raise EngineError(f"engine '{self.metadata.name}': TensorRT refuses {what}{words}")


def load_model(
    bundle: Bundle,
    variant: str | None = None,
    plugin: str | Path = "auto",
    device: str | None = None,
    cuda_graph: bool = True,
) -> TensorRTModel:
    """Load the engine that a bundle has for the GPU of this machine.

    Args:
      bundle: Bundle whose engine and metadata are checked first.
      variant: TensorRT variant, "rtx" or "tensorrt"; None takes one that is installed and has an
        engine for the GPU.
      plugin: Choice of the plugin library, see `find_plugin`; it is loaded if the engine needs it.
        "none" and "required" fail if the engine was built the other way.
      device: Device to run on: "cuda" or, for example, "cuda:1"; None means "cuda".
      cuda_graph: Whether to capture calls of one token in CUDA graphs.

    Raises:
      DeviceError: There is no such GPU, or it refused a call.
      EngineError: The bundle has no engine for the GPU (the message names the command that builds
        one), or TensorRT cannot load the engine.
      MissingDependencyError: A package that is needed is not installed.
      PluginError: The library is missing or cannot be loaded.
    """
    index, gpu = find_device(device)
    engines = read_engines(bundle)
    chosen = choose_variant(bundle, engines, gpu, variant)
    cuda = Cuda(index, chosen.remedy)
    trt = import_variant(chosen)
    metadata = choose_engine(bundle, engines, gpu, chosen.name, str(trt.__version__))
    path, content = bundle.folder / _file_name(metadata), _engine_file(bundle, metadata)
    cuda.use()
    log: deque[str] = deque(maxlen=16)
    logger = error_logger(trt, log)
    if needs_library(metadata, str(plugin)):
        library = find_plugin(TENSORRT, plugin if plugin != "auto" else "required")
        assert library is not None  # needs_library refuses "none"
        load_plugin(trt, f"{chosen.title} {metadata.version}", library, log)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        words = f": {log[-1]}" if log else ""
        raise EngineError(
            f"{chosen.title} {metadata.version} cannot load '{path}'{words}; build the engine again"
        )
    _check_tensors(trt, engine, metadata, bundle.manifest.state)
    _log.info("loaded engine '%s', %s %s, %s", path, chosen.title, metadata.version, gpu.name)
    largest = [profile.inputs["input_ids"]["max"] for profile in metadata.profiles]
    return TensorRTModel(
        metadata=metadata,
        specs=bundle.manifest.state,
        vocab_size=bundle.manifest.config.vocab_size,
        max_tokens=max(tokens for _, tokens in largest),
        max_batch=min(batch for batch, _ in largest),
        in_place=_in_place(bundle, metadata) if metadata.in_place_state else frozenset(),
        cuda_graph=cuda_graph,
        cuda=cuda,
        trt=trt,
        engine=engine,
        log=log,
        keep=(runtime, logger),
        lock=threading.Lock(),
    )


def _file_name(metadata: EngineMetadata) -> str:
    return f"{ENGINES_FOLDER}/{metadata.name}.engine"


def _engine_file(bundle: Bundle, metadata: EngineMetadata) -> bytes:
    """Return the content of an engine's file, after checking it."""
    name = _file_name(metadata)
    content = bundle.read_file(name)
    if bundle.manifest.files[name]["sha256"] != metadata.sha256:
        raise EngineError(
            f"'{bundle.folder / name}' is not the engine that its metadata describes; build it "
            "again"
        )
    return content


def new_context(model: TensorRTModel, decode: bool) -> Any:
    """Return a new execution context, or None if TensorRT refuses.

    Args:
      model: Loaded engine.
      decode: Whether the context is for calls of one token, which CUDA graphs may capture.
    """
    strategies = getattr(model.trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None or not decode:
        return model.engine.create_execution_context()
    # By default RTX compiles kernels for the shapes it meets in the background; a graph captured
    # meanwhile would keep the slower ones for good.
    config = model.engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return model.engine.create_execution_context(config)


def find_device(device: str | None = None) -> tuple[int, Device]:
    """Return the number of a GPU and what the driver says about it.

    Args:
      device: Name of the device: "cuda" or, for example, "cuda:1"; None means "cuda".

    Raises:
      ConfigError: The device is unknown or not a GPU.
      DeviceError: This machine has no such GPU.
    """
    kind, index = parse_device(device or "cuda")
    if kind != "cuda":
        raise ConfigError(
            f"runtime 'tensorrt' runs on a GPU, but device is '{device}'; expected cuda, or a "
            "numbered GPU such as cuda:1"
        )
    driver = query_driver()
    if not driver.devices:
        raise DeviceError(
            "runtime 'tensorrt' needs an NVIDIA GPU, and there is no CUDA device: "
            f"{driver.reason}; use runtime 'onnxruntime'"
        )
    if index >= len(driver.devices):
        raise DeviceError(
            f"device '{device}' does not exist; the CUDA devices are numbered from cuda:0, and "
            f"there are {len(driver.devices)}"
        )
    return index, driver.devices[index]


def error_logger(trt: Any, log: deque[str]) -> Any:
    """Return a TensorRT logger that appends errors to `log` and drops everything else."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.append(message)

    return Logger()


def _check_tensors(
    trt: Any, engine: Any, metadata: EngineMetadata, specs: Sequence[TensorSpec]
) -> None:
    """Check the engine's inputs and outputs against its metadata and what this version expects.

    Raises:
      EngineError: They differ.
    """
    names = {tensor.name for tensor in metadata.inputs}
    wanted = {field.name for field in fields(Call)} | {PAST + spec.name for spec in specs}
    tensors = map(engine.get_tensor_name, range(engine.num_io_tensors))
    found = {_described(trt, engine, name) for name in tensors}
    expected = {
        (t.name, tuple(t.shape), t.dtype, mode, "DEVICE")
        for of_mode, mode in ((metadata.inputs, "INPUT"), (metadata.outputs, "OUTPUT"))
        for t in of_mode
    }
    if names != wanted or found != expected:
        other = sorted(names ^ wanted) or sorted(tensor[0] for tensor in found ^ expected)
        raise EngineError(
            f"engine '{metadata.name}' does not fit its metadata or this version of fwl-export: "
            f"'{other[0]}' differs; build it again"
        )


def _described(trt: Any, engine: Any, name: str) -> tuple[str, tuple[int, ...], str, str, str]:
    return (
        name,
        tuple(engine.get_tensor_shape(name)),
        np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name,
        engine.get_tensor_mode(name).name,
        engine.get_tensor_location(name).name,
    )


def _in_place(bundle: Bundle, metadata: EngineMetadata) -> frozenset[str]:
    """Return the state tensors that an engine with in-place state updates in place."""
    if metadata.in_place_tensors is not None:
        return frozenset(metadata.in_place_tensors)
    return frozenset(op_state_tensors(bundle.file(MODEL_FILE)))  # an engine of an earlier version

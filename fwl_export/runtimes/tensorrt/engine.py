"""A bundle's engine for the GPU of this machine: found, checked and loaded.

An engine is a program, and may carry a library: TensorRT runs what it holds. Open engines that you
have built yourself, or that come from someone you would run a program of.
"""

from __future__ import annotations

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

LOGITS = "logits"


@dataclass(frozen=True)
class TensorRTModel:
    """A loaded engine, which sessions share.

    Attributes:
      facts: of the engine.
      specs: of the state.
      vocab_size: V.
      max_tokens: largest T of a call.
      max_batch: largest B of a call.
      in_place: the state tensors that the engine updates in place.
      cuda_graph: whether calls with one token are captured in CUDA graphs.
      cuda: the runtime of the engine's device.
      trt: the variant's module.
      engine: TensorRT's.
      log: TensorRT's last errors.
      keep: what must live as long as the engine.
      lock: held while an execution context is made.
    """

    facts: EngineMetadata
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
        """Raise an EngineError with TensorRT's last words if something did not succeed."""
        if not succeeded:
            words = f": {self.log[-1]}" if self.log else ""
            raise EngineError(f"engine '{self.facts.name}': TensorRT refuses {what}{words}")


def load_model(
    bundle: Bundle,
    variant: str | None = None,
    plugin: str | Path = "auto",
    device: str | None = None,
    cuda_graph: bool = True,
) -> TensorRTModel:
    """Load the engine that a bundle has for the GPU of this machine.

    Args:
      bundle: the engine and its facts are checked first.
      variant: "rtx" or "tensorrt"; None takes one that has an engine and is installed.
      plugin: the plugin library, see `find_plugin`; loaded if the engine needs it. "none" and
        "required" insist on how the engine was built.
      device: "cuda" or, say, "cuda:1"; None is "cuda".
      cuda_graph: whether to capture calls with one token in CUDA graphs.

    Raises:
      DeviceError: there is no such GPU, or it refuses a call.
      EngineError: the bundle has no engine for it; the text says which command makes one. Or
        TensorRT cannot load the engine.
      MissingDependencyError: a package is not installed.
      PluginError: the library is missing or cannot be loaded.
    """
    index, gpu = find_device(device)
    engines = read_engines(bundle)
    chosen = choose_variant(bundle, engines, gpu, variant)
    cuda = Cuda(index, chosen.remedy)
    trt = import_variant(chosen)
    facts = choose_engine(bundle, engines, gpu, chosen.name, str(trt.__version__))
    path = _engine_file(bundle, facts)
    cuda.use()
    log: deque[str] = deque(maxlen=16)
    logger = error_logger(trt, log)
    if needs_library(facts, str(plugin)):
        library = find_plugin(TENSORRT, plugin if plugin != "auto" else "required")
        assert library is not None  # needs_library refuses "none"
        load_plugin(trt, f"{chosen.title} {facts.version}", library, log)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        words = f": {log[-1]}" if log else ""
        raise EngineError(
            f"{chosen.title} {facts.version} cannot load '{path}'{words}; build the engine again"
        )
    _check_tensors(trt, engine, facts, bundle.manifest.state)
    largest = [profile.inputs["input_ids"]["max"] for profile in facts.profiles]
    return TensorRTModel(
        facts,
        bundle.manifest.state,
        bundle.manifest.config.vocab_size,
        max(tokens for _, tokens in largest),
        min(batch for batch, _ in largest),
        _in_place(bundle, facts) if facts.in_place_state else frozenset(),
        cuda_graph,
        cuda,
        trt,
        engine,
        log,
        (runtime, logger),
        threading.Lock(),
    )


def _engine_file(bundle: Bundle, facts: EngineMetadata) -> Path:
    name = f"{ENGINES_FOLDER}/{facts.name}.engine"
    path = bundle.file(name)
    if bundle.manifest.files[name]["sha256"] != facts.sha256:
        raise EngineError(f"'{path}' is not the engine that its metadata describes; build it again")
    return path


def new_context(model: TensorRTModel, decode: bool) -> Any:
    """Return an execution context, for calls with one token or for longer ones."""
    strategies = getattr(model.trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None or not decode:
        return model.engine.create_execution_context()
    # RTX compiles kernels for the shapes it meets, by default in the background: a graph would keep
    # the slower ones that it has recorded meanwhile.
    config = model.engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return model.engine.create_execution_context(config)


def find_device(device: str | None = None) -> tuple[int, Device]:
    """Return a GPU and its number.

    Args:
      device: "cuda" or, say, "cuda:1"; None is "cuda".

    Raises:
      ConfigError: the device is unknown, or no GPU.
      DeviceError: it is not there.
    """
    kind, index = parse_device(device or "cuda")
    if kind != "cuda":
        raise ConfigError(f"runtime 'tensorrt' runs on a GPU, but device is '{device}'")
    driver = query_driver()
    if not driver.devices:
        raise DeviceError(
            "runtime 'tensorrt' needs an NVIDIA GPU, and there is no CUDA device: "
            f"{driver.reason}; use runtime 'onnxruntime'"
        )
    if index >= len(driver.devices):
        raise DeviceError(
            f"device '{device}' is not here; the driver finds {len(driver.devices)}, from cuda:0 on"
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
    trt: Any, engine: Any, facts: EngineMetadata, specs: Sequence[TensorSpec]
) -> None:
    """Check that the engine is what its facts say, and that the facts fit this fwl-export.

    Raises:
      EngineError: they do not.
    """
    names = {tensor.name for tensor in facts.inputs}
    wanted = {field.name for field in fields(Call)} | {PAST + spec.name for spec in specs}
    tensors = map(engine.get_tensor_name, range(engine.num_io_tensors))
    found = {_described(trt, engine, name) for name in tensors}
    told = {
        (t.name, tuple(t.shape), t.dtype, mode, "DEVICE")
        for of_mode, mode in ((facts.inputs, "INPUT"), (facts.outputs, "OUTPUT"))
        for t in of_mode
    }
    if names != wanted or found != told:
        other = sorted(names ^ wanted) or sorted(tensor[0] for tensor in found ^ told)
        raise EngineError(
            f"engine '{facts.name}' does not fit its facts or this fwl-export, beginning with "
            f"'{other[0]}'; build it again"
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
    """Return the state tensors that an engine with state in place updates so."""
    if metadata.in_place_tensors is not None:
        return frozenset(metadata.in_place_tensors)
    return frozenset(op_state_tensors(bundle.file(MODEL_FILE)))  # an engine of an earlier version

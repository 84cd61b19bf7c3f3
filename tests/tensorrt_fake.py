"""A fake of TensorRT's Python module on `FakeCuda`, which fails where TensorRT would.

Its engines compute: they run the bundle's ONNX file in ONNX Runtime, on the device memory whose
addresses they are given. Where TensorRT returns False or None and logs a message, so does the fake;
what TensorRT leaves undefined raises `MisuseError`.

Public names here exist in the real module with the same parameters;
tests/runtimes/tensorrt/test_api.py checks that. The fake uses public names of fwl_export only.
"""

from __future__ import annotations

import enum
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fwl_export import plugins
from fwl_export.bundle.manifest import read_bundle
from fwl_export.bundle.state import PAST, PRESENT
from fwl_export.engines import EngineMetadata, build, build_engines
from fwl_export.engines.device import Device, Driver
from fwl_export.engines.metadata import NetworkMetadata, ProfileMetadata, TensorMetadata
from fwl_export.engines.request import BuildRequest, Range
from fwl_export.engines.worker import Probe
from fwl_export.op.spec import NAME, NODE_ATTRIBUTES
from tests.cuda_fake import FakeCuda, Stream

VERSION = "1.2.3"
GPU = Device("Fake One", 89)

_NAMESPACE, _VERSION = NODE_ATTRIBUTES["plugin_namespace"], NODE_ATTRIBUTES["plugin_version"]


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class IPluginRegistry:
    def __init__(self, library: Path | None) -> None:
        self._library, self._loaded = library, False

    def load_library(self, plugin_path: str) -> object | None:
        if self._loaded or Path(plugin_path) != self._library:
            return None
        self._loaded = True
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:  # noqa: A002
        ours = (type, version, plugin_namespace) == (NAME, _VERSION, _NAMESPACE)
        return object() if ours and self._loaded else None


class Runtime:
    _module: Any

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self._logger.log(ILogger.ERROR, "the plan is not a plan")
            return None
        registry = self._module._registry
        if plan["needs_library"] and registry.get_creator(NAME, _VERSION, _NAMESPACE) is None:
            self._logger.log(ILogger.ERROR, f"no creator of plugin {NAME}")
            return None
        return ICudaEngine(self, plan)


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        self._module, self._logger = runtime._module, runtime._logger
        self._runtime, self._plan = weakref.ref(runtime), plan
        self._cuda: FakeCuda = self._module._cuda
        self._device = self._cuda.device()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(plan["model"], options)
        graph = onnx.load(plan["model"], load_external_data=False).graph
        self._tensors = {t.name: (mode, t) for mode, t in _io(graph)}

    def _error(self, message: str) -> None:
        self._logger.log(ILogger.ERROR, message)

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name][0]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._plan["locations"].get(name, "DEVICE")]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name][1].type.tensor_type.elem_type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape(self._tensors[name][1])

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, runtime_config: IRuntimeConfig | None = None
    ) -> IExecutionContext:
        if self._cuda.device() != self._device:
            raise self._cuda.misuse("a context is made on another device than its engine's")
        rtx = hasattr(self._module, "DynamicShapesKernelSpecializationStrategy")
        return (RtxContext if rtx else IExecutionContext)(self, runtime_config)


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._owner, self._cuda = weakref.ref(engine), engine._cuda
        self._config = config or IRuntimeConfig()
        self._profile: dict[str, Any] | None = None
        self._switched_on: Stream | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0  # counts changes of shapes and profile, which invalidate captured graphs
        self._warm = False
        self._busy = threading.Lock()

    @property
    def _engine(self) -> ICudaEngine:
        engine = self._owner()
        if engine is None or engine._runtime() is None:
            raise self._cuda.misuse("a context is used after its engine or runtime has gone")
        return engine

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        stream = self._cuda.stream(stream_handle)
        if stream.recorded is not None:
            raise self._cuda.misuse("the profile is switched while the stream is captured")
        profiles = self._engine._plan["profiles"]
        if not 0 <= profile_index < len(profiles):
            self._engine._error(f"profile {profile_index} does not exist")
            return False
        self._profile, self._shapes, self._addresses = profiles[profile_index]["inputs"], {}, {}
        self._changed()
        self._switched_on = stream
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            raise self._cuda.misuse("a shape is set before an optimisation profile was chosen")
        engine = self._engine
        sizes = self._profile.get(name)
        if sizes is None or len(shape) != len(sizes["min"]):
            engine._error(f"no input '{name}' of {len(shape)} axes")
            return False
        for low, size, high in zip(sizes["min"], shape, sizes["max"], strict=True):
            if not low <= size <= high:
                engine._error(f"'{name}' has size {size}, its profile {low} to {high}")
                return False
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._changed()
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._engine._error(f"no tensor '{name}'")
            return False
        if memory % 256:
            raise self._cuda.misuse(f"the address of '{name}' is not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        tensors = self._engine._tensors
        inputs = [name for name, (mode, _) in tensors.items() if mode is TensorIOMode.INPUT]
        return [name for name in inputs if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, stream = self._engine, self._cuda.stream(stream_handle)
        if failing := engine._module._refuse:
            engine._error(failing.pop())
            return False
        if missing := self.infer_shapes():
            engine._error(f"no shape of {missing[0]}")
            return False
        if missing := [name for name in engine._tensors if name not in self._addresses]:
            engine._error(f"no address of {missing[0]}")
            return False
        if self._switched_on not in (None, stream) and self._switched_on.work:
            raise self._cuda.misuse("a call on another stream than that of the profile's switch")
        if stream.recorded is not None:
            if not self._warm:
                raise self._cuda.misuse("a context is captured that has not run with its shapes")
            self._check_capture()
        self._check_aliases(engine)
        version, shapes, addresses = self._version, dict(self._shapes), dict(self._addresses)

        def run() -> None:
            if version != self._version:
                raise self._cuda.misuse("shapes or profile changed before enqueued work was done")
            if not self._busy.acquire(blocking=False):
                raise self._cuda.misuse("a context runs in two streams at the same time")
            try:
                self._run(shapes, addresses)
            finally:
                self._busy.release()

        stream.add(run)
        if stream.recorded is None:
            self._warm = True
        return True

    def _check_capture(self) -> None:
        """Fail if RTX forbids to capture the engine now."""

    def _changed(self) -> None:
        self._version += 1
        self._warm = False

    def _check_aliases(self, engine: ICudaEngine) -> None:
        for name in self._addresses:
            if not name.startswith(PRESENT):
                continue
            state = name.removeprefix(PRESENT)
            shared = self._addresses[name] == self._addresses[PAST + state]
            if shared != (state in engine._plan["in_place"]):
                raise self._cuda.misuse(f"past and present of '{state}': one address is {shared}")

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self._engine
        feeds = {}
        for name, shape in shapes.items():
            dtype = _dtype(engine._tensors[name][1])
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = self._cuda.bytes(addresses[name], size).view(dtype).reshape(shape).copy()
        outputs = [o.name for o in engine._session.get_outputs()]
        for name, array in zip(outputs, engine._session.run(outputs, feeds), strict=True):
            target = self._cuda.bytes(addresses[name], array.nbytes)
            target[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        engine._module._runs.append(shapes["input_ids"])


class RtxContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        self._cuda.stream(stream)
        return not self._engine._plan["not_capturable"]

    def _check_capture(self) -> None:
        if self._engine._plan["not_capturable"]:
            raise self._cuda.misuse("a context is captured that says it cannot be")
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        if self._config.dynamic_shapes_kernel_specialization_strategy is not eager:
            raise self._cuda.misuse("kernels are captured that RTX is about to replace")


def _io(graph: Any) -> Iterator[tuple[TensorIOMode, Any]]:
    yield from ((TensorIOMode.INPUT, tensor) for tensor in graph.input)
    yield from ((TensorIOMode.OUTPUT, tensor) for tensor in graph.output)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(d.dim_value or -1 for d in tensor.type.tensor_type.shape.dim)


def _dtype(tensor: Any) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def _profile(scope: Range, inputs: list[TensorMetadata]) -> ProfileMetadata:
    """Return the profile that the parser makes of a range: sizes of the inputs' dynamic axes."""
    shapes: dict[str, dict[str, list[int]]] = {tensor.name: {} for tensor in inputs}
    for bound, batch, tokens in zip(("min", "opt", "max"), scope.batch, scope.tokens, strict=True):
        for tensor in inputs:
            free = [batch, tokens]
            if (tensor.name, bound) == ("logit_positions", "min"):
                free[1] = 1  # a call may ask for the logits of one position only
            axes = enumerate(tensor.shape)
            shapes[tensor.name][bound] = [free[i] if size < 0 else size for i, size in axes]
    return ProfileMetadata(scope.name, shapes)


def tensorrt_module(name: str, cuda: FakeCuda, library: Path | None = None) -> Any:
    """Return a fake module.

    Args:
      name: Name of the module, "tensorrt" or "tensorrt_rtx".
      cuda: Fake CUDA runtime that its engines run on.
      library: Path of the only plugin library that it can load.
    """
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__version__ = VERSION
    module._cuda, module._registry, module._runs, module._refuse = (
        cuda,
        IPluginRegistry(library),
        [],
        [],
    )
    module.ILogger, module.TensorIOMode, module.TensorLocation = (
        ILogger,
        TensorIOMode,
        TensorLocation,
    )
    module.Runtime = type("Runtime", (Runtime,), {"_module": module})
    module.get_plugin_registry = lambda: module._registry
    module.nptype = onnx.helper.tensor_dtype_to_np_dtype
    if name == "tensorrt_rtx":
        module.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    return module


class Machine:
    """A fake machine with GPUs and TensorRT in one or both variants; see `fake_machine`.

    Attributes:
      cuda: Fake CUDA runtime.
      library: Path of the plugin library, an empty file.
      modules: Installed fake modules, by name.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, gpus: int) -> None:
        self.cuda = FakeCuda(gpus)
        self.library = folder / plugins.TENSORRT
        self.library.touch()
        self._patch = patch

    def install(self, *modules: str) -> None:
        """Install the modules with these names, and uninstall all other variants."""
        import importlib.util

        find = importlib.util.find_spec
        for name in ("tensorrt", "tensorrt_rtx"):
            self._patch.delitem(sys.modules, name, raising=False)
        fakes = {name: tensorrt_module(name, self.cuda, self.library) for name in modules}

        def find_fake(name: str, package: str | None = None) -> Any:
            if name in ("tensorrt", "tensorrt_rtx"):
                return fakes[name].__spec__ if name in fakes else None
            return find(name, package)

        def import_fake(name: str) -> Any:
            return fakes[name] if name in fakes else real_import(name)

        from fwl_export.engines import variant

        real_import = variant.importlib.import_module
        self._patch.setattr(importlib.util, "find_spec", find_fake)
        self._patch.setattr(
            variant, "importlib", _Importlib(importlib.util, staticmethod(import_fake))
        )
        self.modules = fakes

    def module(self, name: str = "tensorrt_rtx") -> Any:
        """Return an installed variant's module by name."""
        return self.modules[name]

    def build(self, folder: Path, **options: Any) -> EngineMetadata:
        """Add an engine to a bundle, by the project's own code around a fake builder.

        Args:
          folder: Path of the bundle's folder.
          options: Arguments of `build_engines`, and further `version` and `sm` of the engine, and
            `locations`, `not_capturable` and `plugin_layers` of its content.
        """
        version, sm = options.pop("version", VERSION), options.pop("sm", GPU.sm)
        plan = {
            "model": str(folder / "model.onnx"),
            "locations": options.pop("locations", {}),
            "not_capturable": options.pop("not_capturable", False),
        }
        layers = options.pop("plugin_layers", 2 if "plugin" in options else 0)

        def worker(request: BuildRequest, tick: Any) -> NetworkMetadata:
            graph = onnx.load(request.model, load_external_data=False).graph
            inputs = [TensorMetadata(t.name, list(_shape(t)), _dtype(t).name) for t in graph.input]
            outputs = [
                TensorMetadata(t.name, list(_shape(t)), _dtype(t).name) for t in graph.output
            ]
            profiles = [_profile(sizes, inputs) for sizes in request.ranges]
            updated = [n.input[-1].removeprefix(PAST) for n in graph.node if n.op_type == NAME]
            plan.update(
                profiles=[vars(profile) for profile in profiles],
                needs_library=bool(layers) and not request.embeds_plugin,
                in_place=updated if request.in_place_state else [],
            )
            request.output.write_text(json.dumps(plan), encoding="utf-8")
            return NetworkMetadata(inputs, outputs, profiles, 1, layers, False, 0.0)

        probe = Probe(version, (sm,), {"polygraphy": "0"}, "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "describe_variant", lambda name: probe)
            patch.setattr(build, "build_in_worker", worker)
            options = {"plugin": "none", **options}
            (metadata,) = build_engines(read_bundle(folder), sms=[sm], **options)
        return metadata


class _Importlib:
    def __init__(self, util: Any, import_module: Any) -> None:
        self.util, self.import_module = util, import_module.__func__


@contextmanager
def fake_machine(folder: Path, gpus: int = 1) -> Iterator[Machine]:
    """Yield a fake machine; fails at the end if CUDA or TensorRT was misused meanwhile.

    Args:
      folder: Folder for the machine's plugin library.
      gpus: Number of GPUs, all `GPU`.
    """
    from fwl_export.runtimes.tensorrt import engine as tensorrt_engine

    driver = Driver("13.0", (GPU,) * gpus, "")
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, folder, gpus)
        patch.setitem(sys.modules, "cuda.bindings.runtime", machine.cuda)
        patch.setattr(tensorrt_engine, "query_driver", lambda: driver)
        machine.install("tensorrt_rtx")
        yield machine
        assert not machine.cuda.misuses, machine.cuda.misuses

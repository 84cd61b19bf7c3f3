"""Runtime "onnxruntime": ONNX Runtime on the CPU or on a CUDA device."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwl_export.bundle.manifest import MODEL_FILE, Bundle
from fwl_export.bundle.onnx_file import external_tensors
from fwl_export.bundle.state import PAST, PRESENT, Array, State, TensorSpec
from fwl_export.errors import BundleError, MissingDependencyError
from fwl_export.ort import import_onnxruntime, register_plugin
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes.base import Call, Loaded, Rows, index, parse_device
from fwl_export.runtimes.registry import Options

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import onnxruntime


_ALIGNMENT = 64  # in bytes: one cache line, and the widest vector of the plugin's kernel


@dataclass(frozen=True)
class OnnxRuntimeModel:
    """A loaded model that sessions share.

    Attributes:
      session: ONNX Runtime's `InferenceSession`; threads may call it at the same time.
      specs: Specs of the state's tensors, in the model's order.
      vocab_size: Number of token ids, V.
      device: Kind and number of the device, e.g. ("cuda", 0).
    """

    session: onnxruntime.InferenceSession
    specs: Sequence[TensorSpec]
    vocab_size: int
    device: tuple[str, int]


def load(bundle: Bundle, options: Options) -> Loaded:
    """Load a bundle's model for sessions; raises what `load_model` raises."""
    model = load_model(bundle, options.threads, options.plugin, options.device or "cpu")
    return Loaded(OnnxRuntimeRunner(model), model.specs, bundle.manifest.max_tokens)


def load_model(
    bundle: Bundle,
    threads: int | None = None,
    plugin: str | Path = "auto",
    device: str = "cpu",
) -> OnnxRuntimeModel:
    """Load a bundle's ONNX file.

    ONNX Runtime gets the bytes whose hashes were checked. So a session does not notice it if the
    files are overwritten, truncated or removed while it is open.

    Args:
      bundle: Bundle whose ONNX file and external data are checked first.
      threads: Threads inside one operator; None lets ONNX Runtime choose.
      plugin: Choice of the plugin library, see `open_session`.
      device: Device to run on: "cpu", "cuda" or, for example, "cuda:1".

    Raises:
      BundleError: ONNX Runtime cannot load the model.
      PluginError: The library is required and missing, or cannot be loaded.
      MissingDependencyError: ONNX Runtime is not installed, or not with CUDA.
      ConfigError: The device is unknown.
    """
    path = bundle.folder / MODEL_FILE
    plugin = plugin if bundle.has_updates(plugin) else "none"
    model, data = bundle.read_model()
    session = _open(path, model, _arrays(path, model, data), threads, plugin, device)
    manifest = bundle.manifest
    place = parse_device(device)
    return OnnxRuntimeModel(session, manifest.state, manifest.config.vocab_size, place)


def _arrays(path: Path, model: bytes, data: Mapping[str, bytes]) -> dict[str, Array]:
    """Return the weights in a model's external data by name, in the memory of `data`.

    Args:
      path: Path of the ONNX file, for messages.
      model: Content of the ONNX file.
      data: Content of each file of external data, by its name in the model.
    """
    arrays: dict[str, Array] = {}
    for tensor in external_tensors(path, model):
        content = data[tensor.location]
        if not tensor.dtype or not 0 <= tensor.offset <= len(content) - tensor.size:
            raise BundleError(
                f"ONNX Runtime cannot load '{path}': tensor '{tensor.name}' has an unknown type or "
                f"lies outside of '{tensor.location}'; export the model again"
            )
        count = math.prod(tensor.shape)
        flat = np.frombuffer(content, tensor.dtype, count, tensor.offset)
        arrays[tensor.name] = flat.reshape(tensor.shape)
    return arrays


def open_file(
    path: Path, threads: int | None = None, plugin: str | Path = "auto", device: str = "cpu"
) -> onnxruntime.InferenceSession:
    """Load an ONNX file outside of a bundle; for arguments and errors see `load_model`."""
    return _open(path, str(path), {}, threads, plugin, device)


def _open(
    path: Path,
    model: str | bytes,
    weights: Mapping[str, Array],
    threads: int | None,
    plugin: str | Path,
    device: str,
) -> onnxruntime.InferenceSession:
    """Load an ONNX file; for errors see `load_model`.

    Args:
      path: Path of the file, for messages.
      model: The path as text, or the file's content.
      weights: The tensors with external data by name, if `model` is the content. ONNX Runtime
        copies them, so that they can be dropped afterwards.
      threads: Threads inside one operator; None lets ONNX Runtime choose.
      plugin: Choice of the plugin library, see `open_session`.
      device: Device to run on.
    """
    place = parse_device(device)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # Otherwise ONNX Runtime also rounds the activations that int8 weights are multiplied with to
    # int8: the results are 1 % off, and on CPUs it is slower.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if place[0] == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise MissingDependencyError(
                f"device '{device}' needs ONNX Runtime with CUDA; "
                "pip uninstall onnxruntime, then pip install 'fwl-export[gpu]'"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": place[1]}))
    library = find_plugin(ONNXRUNTIME, plugin)
    if library is not None:
        register_plugin(options, library)
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        # Without the last argument, ONNX Runtime prints an "EP Error" and tries other providers.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        where = "" if place[0] == "cpu" else f" on device '{device}'"
        raise BundleError(f"ONNX Runtime cannot load '{path}'{where}: {error}") from None
    if place[0] == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingDependencyError(  # ONNX Runtime itself only warns, and falls back to the CPU
            f"ONNX Runtime cannot use device '{device}'; `fwl-export doctor` says what is missing"
        )
    _log.info("loaded '%s', %s, plugin %s", path, session.get_providers()[0], library or "none")
    return session


class OnnxRuntimeRunner:
    """Runs a loaded model on buffers that ONNX Runtime reads and writes in place, without copies.

    Past and present must not share a buffer: ONNX Runtime accepts one buffer for both, and then
    computes wrong results if the graph reads the past after writing the present.
    """

    def __init__(self, model: OnnxRuntimeModel) -> None:
        """Share a loaded model.

        Args:
          model: Loaded model, which other runners may share.
        """
        self._model = model
        # By ids of past and present buffers: binding takes as long as a small model's step.
        self._bound: dict[tuple[int, int], BoundCall] = {}

    def another(self) -> OnnxRuntimeRunner:
        """See `Runner.another`."""
        return OnnxRuntimeRunner(self._model)

    def new_buffers(self, batch: int) -> _HostBuffers | _DeviceBuffers:
        """See `Runner.new_buffers`."""
        kind = _HostBuffers if self._model.device[0] == "cpu" else _DeviceBuffers
        return kind(self._model, batch)

    def run(self, call: Call, past: Any, present: Any) -> Array:
        """See `Runner.run`."""
        key = (id(past), id(present))
        if key not in self._bound:
            self._bound[key] = BoundCall(self._model, call, past, present)
        return self._bound[key].run(call)

    def read(self, buffers: Any, rows: Rows) -> State:
        """See `Runner.read`."""
        state: State = buffers.read(rows)
        return state

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """See `Runner.write`."""
        buffers.write(state, rows)

    def release(self, buffers: Any) -> None:
        """See `Runner.release`."""
        self._bound = {key: bound for key, bound in self._bound.items() if id(buffers) not in key}


class BoundCall:
    """A call whose inputs and outputs are bound to memory, and which may run again.

    If the next call has another shape, everything but the state is bound again.
    """

    def __init__(self, model: OnnxRuntimeModel, call: Call, past: Any, present: Any) -> None:
        self._session = model.session
        self._vocab_size = model.vocab_size
        self._buffers = (past, present)  # the binding holds addresses only: keep them alive
        self._call: Call
        self._inputs: dict[str, Array]
        self.binding = model.session.io_binding()
        past.bind_inputs(self.binding)
        present.bind_outputs(self.binding)
        self._bind(call)

    def run(self, call: Call) -> Array:
        """Run with a call's values; returns logits [B, P, V], which belong to the caller."""
        shape = call.logit_positions.shape
        if shape != self._logits.shape[:2] or call.input_ids.shape != self._shape:
            self._bind(call)
        # See `Runner.run`: in the previous call's object only the ids may have changed.
        changed = {"input_ids": call.input_ids} if call is self._call else vars(call)
        for name, array in changed.items():
            self._inputs[name][:] = array
        self._call = call
        self._session.run_with_iobinding(self.binding)
        if shape[1] == 1:  # copying few logits is faster than binding a new array
            return self._logits.copy()
        logits = self._logits
        self._bind_logits(shape)
        return logits

    def _bind(self, call: Call) -> None:
        self._call = call
        self._shape = call.input_ids.shape
        self._inputs = {name: array.copy() for name, array in vars(call).items()}
        for name, array in self._inputs.items():
            _bind(self.binding.bind_input, name, array)
        self._bind_logits(call.logit_positions.shape)

    def _bind_logits(self, shape: tuple[int, ...]) -> None:
        self._logits = np.empty((*shape, self._vocab_size), np.float32)
        _bind(self.binding.bind_output, "logits", self._logits)


class _HostBuffers:
    def __init__(self, model: OnnxRuntimeModel, batch: int) -> None:
        self._arrays = {s.name: _aligned_zeros((batch, *s.shape), s.dtype) for s in model.specs}

    def bind_inputs(self, binding: onnxruntime.IOBinding) -> None:
        for name, array in self._arrays.items():
            _bind(binding.bind_input, PAST + name, array)

    def bind_outputs(self, binding: onnxruntime.IOBinding) -> None:
        for name, array in self._arrays.items():
            _bind(binding.bind_output, PRESENT + name, array)

    def read(self, rows: Rows) -> State:
        return {name: array[index(rows)] for name, array in self._arrays.items()}

    def write(self, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        for name, array in self._arrays.items():
            array[list(rows)] = state[name]


class _DeviceBuffers:
    def __init__(self, model: OnnxRuntimeModel, batch: int) -> None:
        make = import_onnxruntime().OrtValue.ortvalue_from_numpy
        self._values = {
            s.name: make(np.zeros((batch, *s.shape), s.dtype), *model.device) for s in model.specs
        }

    def bind_inputs(self, binding: onnxruntime.IOBinding) -> None:
        for name, value in self._values.items():
            binding.bind_ortvalue_input(PAST + name, value)

    def bind_outputs(self, binding: onnxruntime.IOBinding) -> None:
        for name, value in self._values.items():
            binding.bind_ortvalue_output(PRESENT + name, value)

    def read(self, rows: Rows) -> State:
        return {name: value.numpy()[index(rows)] for name, value in self._values.items()}

    def write(self, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        for name, value in self._values.items():
            array = value.numpy().copy()
            array[list(rows)] = state[name]
            value.update_inplace(array)


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _aligned_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)

"""Runs a bundle's TensorRT or TensorRT-RTX engine, with the state on the GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import PAST, PRESENT, Array, State, TensorSpec
from fwl_export.engines.metadata import EngineMetadata, ProfileMetadata
from fwl_export.errors import DeviceError, EngineError, ShapeError
from fwl_export.runtimes.base import Call, Loaded, Rows
from fwl_export.runtimes.registry import Options
from fwl_export.runtimes.tensorrt.cuda import ALIGNMENT, Cuda, DeviceMemory, Graph, Mirror, Stream
from fwl_export.runtimes.tensorrt.engine import LOGITS, TensorRTModel, load_model, new_context

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # pairs of name and shape: hashable


def load(bundle: Bundle, options: Options) -> Loaded:
    """Load a bundle's engine for sessions; raises what `load_model` raises."""
    o = options
    model = load_model(bundle, o.variant, o.plugin, o.device, o.cuda_graph)
    return Loaded(TensorRTRunner(model), model.specs, model.max_tokens)


class StateBuffers:
    """The state of all rows in one allocation on the device.

    Attributes:
      batch: Number of rows, B.
      offsets: Where each tensor [B, ...] begins, in bytes, by name.
      size: Size of the allocation, in bytes.
    """

    def __init__(self, cuda: Cuda, specs: Sequence[TensorSpec], batch: int) -> None:
        self.batch = batch
        self.offsets, self.size = state_layout(specs, batch)
        self._memory = DeviceMemory(cuda, self.size)

    @property
    def address(self) -> int:
        """Device address of the allocation."""
        return self._memory.address

    def of(self, name: str) -> int:
        """Return the device address of a state tensor [B, ...]."""
        return self.address + self.offsets[name]


class TensorRTRunner:
    """Runs a loaded engine for one session; the state stays on the device.

    No call writes to the past state: an engine that updates in place works on a copy of it. So a
    call that fails, or whose capture fails, leaves the past state intact. All work goes to one
    stream, and a call returns when the work is done.

    Attributes:
      model: The loaded engine.
    """

    def __init__(self, model: TensorRTModel) -> None:
        """Share a loaded engine.

        Args:
          model: Loaded engine, which other runners may share.
        """
        self.model = model
        model.cuda.use()
        self._stream = Stream(model.cuda)
        self._contexts: dict[int, _ProfileContext] = {}  # by optimization profile

    def another(self) -> TensorRTRunner:
        """See `Runner.another`. Each runner has its own execution contexts and their memory."""
        return TensorRTRunner(self.model)

    def new_buffers(self, batch: int) -> StateBuffers:
        """See `Runner.new_buffers`.

        Raises:
          ShapeError: The engine takes fewer rows.
          DeviceError: The device has too little memory, or refuses a call.
        """
        model = self.model
        if batch > model.max_batch:
            raise ShapeError(
                f"batch is {batch}, but engine '{model.metadata.name}' takes at most "
                f"{model.max_batch} rows; build it again with `--max-batch {batch}`"
            )
        model.cuda.use()
        buffers = StateBuffers(model.cuda, model.specs, batch)
        self._stream.zero(buffers.address, buffers.size)
        self._stream.synchronize()
        return buffers

    def run(self, call: Call, past: StateBuffers, present: StateBuffers) -> Array:
        """See `Runner.run`."""
        model = self.model
        shapes = call_shapes(call, model.specs)
        profile = choose_profile(model.metadata, shapes)
        model.cuda.use()
        self._stream.synchronize()  # an interrupted call may still be running
        if profile not in self._contexts:
            self._contexts[profile] = _ProfileContext(model, profile, self._stream)
        return self._contexts[profile].run(call, shapes, past, present)

    def read(self, buffers: StateBuffers, rows: Rows) -> State:
        """See `Runner.read`."""
        rows = range(buffers.batch)[rows] if isinstance(rows, slice) else rows
        state = {s.name: np.empty((len(rows), *s.shape), s.dtype) for s in self.model.specs}
        self._copy_rows(buffers, rows, state, to_device=False)
        return state

    def write(self, buffers: StateBuffers, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """See `Runner.write`."""
        arrays = {s.name: np.ascontiguousarray(state[s.name]) for s in self.model.specs}
        self._copy_rows(buffers, rows, arrays, to_device=True)

    def _copy_rows(
        self,
        buffers: StateBuffers,
        rows: Sequence[int],
        arrays: Mapping[str, Array],
        to_device: bool,
    ) -> None:
        self.model.cuda.use()
        for spec in self.model.specs:
            host, size = arrays[spec.name].ctypes.data, spec.bytes_per_row
            for place, row in enumerate(rows):
                here, there = host + place * size, buffers.of(spec.name) + row * size
                if to_device:
                    self._stream.copy(there, here, size, "HostToDevice")
                else:
                    self._stream.copy(here, there, size, "DeviceToHost")
        self._stream.synchronize()

    def release(self, buffers: StateBuffers) -> None:
        """See `Runner.release`."""
        self.model.cuda.use()
        self._stream.synchronize()
        for context in self._contexts.values():
            context.forget(buffers)


class _ProfileContext:
    """An execution context for one optimization profile, with memory for its inputs and outputs.

    Every profile has its own context, so that no call switches profiles, and graphs captured from a
    context stay valid.
    """

    def __init__(self, model: TensorRTModel, profile: int, stream: Stream) -> None:
        self._model, self._stream = model, stream
        self._decode = is_decode(model.metadata.profiles[profile])
        with model.lock:
            self._context = new_context(model, self._decode)
        model.check(self._context, "an execution context")
        switched = self._context.set_optimization_profile_async(profile, stream.handle)
        model.check(switched, f"optimization profile {profile}")
        stream.synchronize()
        self._mirrors: dict[str, Mirror] = {}
        self._graphs: dict[tuple[int, int, Shapes], Graph] = {}
        self._shapes: Shapes = ()  # shapes of the last call that ran
        self._capturable = model.cuda_graph and self._decode

    def run(self, call: Call, shapes: Shapes, past: StateBuffers, present: StateBuffers) -> Array:
        """See `Runner.run`."""
        for name, array in vars(call).items():
            self._mirror(name, array.nbytes).host(array.shape, array.dtype)[...] = array
        shape = (*call.logit_positions.shape, self._model.vocab_size)
        logits = self._mirror(LOGITS, math.prod(shape) * 4).host(shape, np.float32)
        key = (past.address, present.address, shapes)
        graph = self._graphs.get(key)
        if graph is None:
            self._bind(shapes, past, present)
            # A context must have run once after its shapes changed before it can be captured.
            if self._capturable and shapes == self._shapes:
                graph = self._capture(past, present)
        if graph is None:
            self._enqueue(past, present)
        else:
            self._graphs[key] = graph
            self._stream.launch(graph)
        self._stream.synchronize()
        self._shapes = shapes
        return logits.copy()

    def forget(self, buffers: StateBuffers) -> None:
        """Drop the graphs that read or write the buffers."""
        self._graphs = {k: g for k, g in self._graphs.items() if buffers.address not in k[:2]}

    def _mirror(self, name: str, size: int) -> Mirror:
        """Return memory for an input or output, `size` bytes or more."""
        if name not in self._mirrors or self._mirrors[name].size < size:
            self._graphs.clear()  # they contain the old address
            self._mirrors[name] = Mirror(self._model.cuda, size)
        return self._mirrors[name]

    def _bind(self, shapes: Shapes, past: StateBuffers, present: StateBuffers) -> None:
        """Set the shapes and addresses of all inputs and outputs in the context."""
        context, check = self._context, self._model.check
        if shapes != self._shapes:
            self._shapes = ()
        for name, shape in shapes:
            check(context.set_input_shape(name, shape), f"shape {list(shape)} of '{name}'")
        addresses = {name: mirror.address for name, mirror in self._mirrors.items()}
        addresses |= state_addresses(self._model.specs, self._model.in_place, past, present)
        for name, address in addresses.items():
            check(context.set_tensor_address(name, address), f"the address of '{name}'")
        missing = context.infer_shapes()
        check(not missing, f"shapes without {', '.join(missing)}")

    def _enqueue(self, past: StateBuffers, present: StateBuffers) -> None:
        """Enqueue a call: inputs to the device, the engine, logits back to the host."""
        for name, mirror in self._mirrors.items():
            if name != LOGITS:
                mirror.upload(self._stream)
        for spec in self._model.specs:
            if spec.name in self._model.in_place:
                size = past.batch * spec.bytes_per_row
                target, source = present.of(spec.name), past.of(spec.name)
                self._stream.copy(target, source, size, "DeviceToDevice")
        self._model.check(self._context.execute_async_v3(self._stream.handle), "to run")
        self._mirrors[LOGITS].download(self._stream)

    def _capture(self, past: StateBuffers, present: StateBuffers) -> Graph | None:
        """Capture a call without running it; returns None, after one warning, if that fails."""
        ask = getattr(self._context, "is_stream_capturable", None)  # only RTX has it
        reason = "" if ask is None or ask(self._stream.handle) else "its context says so"
        if not reason:
            try:
                with self._stream.captured() as graphs:
                    self._enqueue(past, present)
                return graphs[0]
            except (DeviceError, EngineError) as error:
                reason = str(error)
        self._capturable = False
        warnings.warn(
            f"engine '{self._model.metadata.name}' cannot be captured in a CUDA graph ({reason}); "
            "decoding continues without one and is slower. Pass cuda_graph=False to avoid this "
            "warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def state_layout(specs: Sequence[TensorSpec], batch: int) -> tuple[dict[str, int], int]:
    """Return where each state tensor [B, ...] begins in one allocation, and its size; in bytes."""
    offsets, end = {}, 0
    for spec in specs:
        offsets[spec.name] = end
        end += -(-batch * spec.bytes_per_row // ALIGNMENT) * ALIGNMENT
    return offsets, end


def state_addresses(
    specs: Sequence[TensorSpec],
    in_place: frozenset[str],
    past: StateBuffers,
    present: StateBuffers,
) -> dict[str, int]:
    """Return the device addresses of all past and present state tensors, by the engine's names.

    A tensor that the engine updates in place has one address for both, in the present buffers; the
    caller copies its past there first.

    Args:
      specs: Specs of the state's tensors.
      in_place: Names of the tensors that the engine updates in place.
      past: Buffers with the state before the call.
      present: Buffers for the state after the call.
    """
    addresses = {}
    for spec in specs:
        source = present if spec.name in in_place else past
        addresses[PAST + spec.name] = source.of(spec.name)
        addresses[PRESENT + spec.name] = present.of(spec.name)
    return addresses


def call_shapes(call: Call, specs: Sequence[TensorSpec]) -> Shapes:
    """Return name and shape of every input of the engine for a call."""
    batch = len(call.lengths)
    return (
        *((name, array.shape) for name, array in vars(call).items()),
        *((PAST + spec.name, (batch, *spec.shape)) for spec in specs),
    )


def choose_profile(metadata: EngineMetadata, shapes: Shapes) -> int:
    """Return the index of the first optimization profile that allows the shapes.

    Raises:
      ShapeError: No profile does.
    """
    for index, profile in enumerate(metadata.profiles):
        if all(_fits(profile, name, shape) for name, shape in shapes):
            return index
    last = metadata.profiles[-1].inputs["input_ids"]
    raise ShapeError(
        f"a call of {list(dict(shapes)['input_ids'])} tokens fits no profile of engine "
        f"'{metadata.name}'; expected {list(last['min'])} to {list(last['max'])}"
    )


def is_decode(profile: ProfileMetadata) -> bool:
    """Return whether a profile is for calls of one token."""
    return profile.inputs["input_ids"]["max"][1] == 1


def _fits(profile: ProfileMetadata, name: str, shape: tuple[int, ...]) -> bool:
    sizes = profile.inputs[name]
    bounds = zip(sizes["min"], shape, sizes["max"], strict=True)
    return all(low <= size <= high for low, size, high in bounds)

"""The part of the CUDA runtime that a session needs: memory, a stream, graphs.

Everything is freed when the last reference to it goes. Only bytes are known here, no tensors.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.errors import DeviceError, MissingDependencyError

# Of every address that is handed to TensorRT; cudaMalloc aligns to as much.
ALIGNMENT = 256

_MODULE = "cuda.bindings.runtime"


class Cuda:
    """The CUDA runtime of one device, every call checked."""

    def __init__(self, device: int, remedy: str) -> None:
        """Load the bindings.

        Args:
          device: its number.
          remedy: how to install them.

        Raises:
          MissingDependencyError: they are not installed.
        """
        try:
            self.api: Any = importlib.import_module(_MODULE)
        except ImportError:
            raise MissingDependencyError(
                f"engines need the package cuda-bindings to run, which is not installed; {remedy}"
            ) from None
        self.device = device

    def use(self) -> None:
        """Make the device that of this thread; other threads have their own."""
        self.call("cudaSetDevice", self.device)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime; returns its result, None if it has none.

        Raises:
          DeviceError: it failed. That may be due to work which was enqueued before.
        """
        status, *results = getattr(self.api, function)(*arguments)
        if status != self.api.cudaError_t.cudaSuccess:
            text = self.api.cudaGetErrorString(status)[1]
            raise DeviceError(
                f"{function} failed on device cuda:{self.device}: "
                f"{text.decode() if isinstance(text, bytes) else text} ({status.name})"
            )
        return results[0] if results else None

    def free_with(self, owner: object, function: str, handle: Any) -> None:
        """Call a function on a handle when its owner goes; what it answers does not matter."""
        weakref.finalize(owner, _free, self.api, self.device, function, handle)


def _free(api: Any, device: int, function: str, handle: Any) -> None:
    api.cudaSetDevice(device)
    getattr(api, function)(handle)


class DeviceMemory:
    """Memory on the device, not initialised."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address = int(cuda.call("cudaMalloc", size))
        cuda.free_with(self, "cudaFree", self.address)


class Mirror:
    """Memory on the device with as much page-locked memory on the host, to copy between them.

    Attributes:
      size: in bytes.
      used: how many of them the copies take along, from the first on.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = self.used = size
        self._device = DeviceMemory(cuda, size)
        self._host = int(cuda.call("cudaMallocHost", size))
        cuda.free_with(self, "cudaFreeHost", self._host)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._host))

    @property
    def address(self) -> int:
        """On the device."""
        return self._device.address

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the bytes on the host as an array, which is valid as long as this object is."""
        self.used = math.prod(shape) * np.dtype(dtype).itemsize
        return self._bytes[: self.used].view(dtype).reshape(shape)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy from host to device."""
        stream.copy(self.address, self._host, self.used, "HostToDevice")

    def download(self, stream: Stream) -> None:
        """Enqueue the copy from device to host."""
        stream.copy(self._host, self.address, self.used, "DeviceToHost")


class Stream:
    """A queue of work on the device."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # Not the default stream, which waits for all others and cannot be captured.
        flags = cuda.api.cudaStreamNonBlocking
        self._handle = cuda.call("cudaStreamCreateWithFlags", flags)
        self.handle = int(self._handle)
        cuda.free_with(self, "cudaStreamDestroy", self._handle)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Enqueue a copy, e.g. of kind "HostToDevice"."""
        way = getattr(self._cuda.api.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._cuda.call("cudaMemcpyAsync", target, source, size, way, self._handle)

    def zero(self, address: int, size: int) -> None:
        """Enqueue the writing of zeros."""
        self._cuda.call("cudaMemsetAsync", address, 0, size, self._handle)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done.

        Raises:
          DeviceError: something of it failed.
        """
        self._cuda.call("cudaStreamSynchronize", self._handle)

    @contextmanager
    def captured(self) -> Iterator[list[Graph]]:
        """Record what the block enqueues instead of running it; then the list holds the graph."""
        # Relaxed: a finalizer may free another session's memory at any time, in this thread too.
        mode = self._cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        graphs: list[Graph] = []
        try:
            self._cuda.call("cudaStreamBeginCapture", self._handle, mode)
            yield graphs
            recorded = self._cuda.call("cudaStreamEndCapture", self._handle)
        except BaseException:
            # The stream must leave this mode; a graph of half a block is of no use.
            status, half = self._cuda.api.cudaStreamEndCapture(self._handle)
            if status == self._cuda.api.cudaError_t.cudaSuccess:
                self._cuda.api.cudaGraphDestroy(half)
            raise
        try:
            graphs.append(Graph(self._cuda, recorded))
        finally:
            self._cuda.call("cudaGraphDestroy", recorded)

    def launch(self, graph: Graph) -> None:
        """Enqueue a graph."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self._handle)


class Graph:
    """Recorded work with its addresses, ready to be launched again and again."""

    def __init__(self, cuda: Cuda, recorded: Any) -> None:
        self.handle = cuda.call("cudaGraphInstantiate", recorded, 0)
        cuda.free_with(self, "cudaGraphExecDestroy", self.handle)

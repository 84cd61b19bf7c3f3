"""The part of the CUDA runtime that a session needs: memory, a stream, and graphs.

Everything is freed with the last reference to it. This module knows bytes, not tensors.
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

# Bytes: TensorRT wants aligned addresses, and cudaMalloc returns addresses with this alignment.
ALIGNMENT = 256

_MODULE = "cuda.bindings.runtime"


class Cuda:
    """The CUDA runtime on one device; every call is checked.

    Attributes:
      api: The module `cuda.bindings.runtime`.
      device: Number of the device.
    """

    def __init__(self, device: int, remedy: str) -> None:
        """Load the bindings.

        Args:
          device: Number of the device.
          remedy: How to install the bindings; ends the error message.

        Raises:
          MissingDependencyError: The package cuda-bindings is not installed.
        """
        try:
            self.api: Any = importlib.import_module(_MODULE)
        except ImportError:
            raise MissingDependencyError(
                f"engines need the package cuda-bindings to run, which is not installed; {remedy}"
            ) from None
        self.device = device

    def use(self) -> None:
        """Make this the current device of the calling thread; every thread has its own."""
        self.call("cudaSetDevice", self.device)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime.

        Args:
          function: Name of the function, e.g. "cudaMalloc".
          arguments: Its arguments, in order.

        Returns:
          The function's result, or None if it has none.

        Raises:
          DeviceError: The call failed, perhaps because of work that was enqueued before it.
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
        """Free a handle when its owner is garbage-collected, ignoring errors.

        Args:
          owner: Object that lives as long as the handle is used.
          function: Name of the function that frees it, e.g. "cudaFree".
          handle: Handle or address to free.
        """
        weakref.finalize(owner, _free, self.api, self.device, function, handle)


def _free(api: Any, device: int, function: str, handle: Any) -> None:
    api.cudaSetDevice(device)
    getattr(api, function)(handle)


class DeviceMemory:
    """Uninitialized memory on the device.

    Attributes:
      address: Device address of its first byte.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address = int(cuda.call("cudaMalloc", size))
        cuda.free_with(self, "cudaFree", self.address)


class Mirror:
    """Memory on the device and page-locked memory of the same size on the host, with copies.

    Attributes:
      size: Size of either, in bytes.
      used: Number of bytes, from the first on, that copies transfer.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = self.used = size
        self._device = DeviceMemory(cuda, size)
        self._host = int(cuda.call("cudaMallocHost", size))
        cuda.free_with(self, "cudaFreeHost", self._host)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._host))

    @property
    def address(self) -> int:
        """Device address of the first byte."""
        return self._device.address

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the host's bytes as an array, valid as long as this object; sets `used` to fit."""
        self.used = math.prod(shape) * np.dtype(dtype).itemsize
        return self._bytes[: self.used].view(dtype).reshape(shape)

    def upload(self, stream: Stream) -> None:
        """Enqueue a copy of the used bytes from host to device."""
        stream.copy(self.address, self._host, self.used, "HostToDevice")

    def download(self, stream: Stream) -> None:
        """Enqueue a copy of the used bytes from device to host."""
        stream.copy(self._host, self.address, self.used, "DeviceToHost")


class Stream:
    """A queue of work on the device, done in order.

    Attributes:
      handle: CUDA's handle as a number, which TensorRT takes.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # The default stream would wait for all others, and cannot be captured.
        flags = cuda.api.cudaStreamNonBlocking
        self._handle = cuda.call("cudaStreamCreateWithFlags", flags)
        self.handle = int(self._handle)
        cuda.free_with(self, "cudaStreamDestroy", self._handle)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Enqueue a copy of `size` bytes.

        Args:
          target: Address to write to.
          source: Address to read from.
          size: Number of bytes.
          kind: Direction: "HostToDevice", "DeviceToHost" or "DeviceToDevice".
        """
        way = getattr(self._cuda.api.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._cuda.call("cudaMemcpyAsync", target, source, size, way, self._handle)

    def zero(self, address: int, size: int) -> None:
        """Enqueue writing `size` zero bytes at a device address."""
        self._cuda.call("cudaMemsetAsync", address, 0, size, self._handle)

    def synchronize(self) -> None:
        """Wait until all enqueued work is done.

        Raises:
          DeviceError: Some of the work failed.
        """
        self._cuda.call("cudaStreamSynchronize", self._handle)

    @contextmanager
    def captured(self) -> Iterator[list[Graph]]:
        """Record what the block enqueues as a CUDA graph, instead of running it.

        Yields:
          A list, empty during the block, which holds the graph afterwards.
        """
        # Relaxed, because a finalizer may free another session's memory meanwhile in this thread.
        mode = self._cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        graphs: list[Graph] = []
        try:
            self._cuda.call("cudaStreamBeginCapture", self._handle, mode)
            yield graphs
            recorded = self._cuda.call("cudaStreamEndCapture", self._handle)
        except BaseException:
            # End the capture to make the stream usable again, and drop the incomplete graph.
            status, half = self._cuda.api.cudaStreamEndCapture(self._handle)
            if status == self._cuda.api.cudaError_t.cudaSuccess:
                self._cuda.api.cudaGraphDestroy(half)
            raise
        try:
            graphs.append(Graph(self._cuda, recorded))
        finally:
            self._cuda.call("cudaGraphDestroy", recorded)

    def launch(self, graph: Graph) -> None:
        """Enqueue a recorded graph."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self._handle)


class Graph:
    """Recorded work on fixed addresses, which can be launched repeatedly.

    Attributes:
      handle: CUDA's handle of the executable graph.
    """

    def __init__(self, cuda: Cuda, recorded: Any) -> None:
        self.handle = cuda.call("cudaGraphInstantiate", recorded, 0)
        cuda.free_with(self, "cudaGraphExecDestroy", self.handle)

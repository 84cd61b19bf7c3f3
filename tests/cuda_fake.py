"""A fake of the CUDA runtime's Python bindings, which fails where CUDA would fail or corrupt data.

Work on a stream runs when the stream is synchronized and not before: a host that reads too early
finds poison, and one that writes too early changes what is copied. The host cannot read device
addresses, and freed memory cannot be used.

A call that a program must not make raises `MisuseError`. A failure that a program must expect, such
as too little memory, returns an error code, as in CUDA (`fail_next`).
"""

# ruff: noqa: N801, N802, N803, N815 - CUDA's names

from __future__ import annotations

import enum
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

POISON = 0xFF  # NaN as a float, -1 as an integer
_PAGE = 512


class MisuseError(AssertionError):
    """The program did something that CUDA or TensorRT forbids."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorIllegalState = 401


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Handle:
    """A CUDA handle, which the bindings represent as an object that converts to an int."""

    _numbers = itertools.count(1 << 20)

    def __init__(self) -> None:
        self.number = next(self._numbers)

    def __int__(self) -> int:
        return self.number


class Stream(Handle):
    def __init__(self, device: int) -> None:
        super().__init__()
        self.device = device
        self.work: list[Callable[[], None]] = []
        self.recorded: list[Callable[[], None]] | None = None
        self.mode: tuple[int, int] = (0, 0)
        self.invalidated = False
        self.lock = threading.Lock()

    def add(self, work: Callable[[], None]) -> None:
        (self.work if self.recorded is None else self.recorded).append(work)


class Graph(Handle):
    def __init__(self, work: list[Callable[[], None]]) -> None:
        super().__init__()
        self.work = work


class FakeCuda:
    """The part of `cuda.bindings.runtime` that the project uses, on a given number of GPUs."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, devices: int = 1) -> None:
        self._fake = SimpleNamespace(
            devices=devices,
            memory={},  # on devices: (number of the device, bytes) by address
            pinned={},  # on the host: bytes by address
            freed=[],  # kept so that the host does not use an address again
            streams={},
            graphs=set(),
            launches=0,
            copies=0,
            fail=[],
            misuses=[],
            next=1 << 40,
            lock=threading.RLock(),
            thread=threading.local(),
        )

    # For tests.

    def fail_next(self, function: str, status: cudaError_t, after: int = 0) -> None:
        """Make a function return an error once, after `after` calls that succeed."""
        self._fake.fail.append([function, status, after])

    @property
    def alive(self) -> dict[str, int]:
        d = self._fake
        return {
            "memory": len(d.memory),
            "pinned": len(d.pinned),
            "streams": len(d.streams),
            "graphs": len(d.graphs),
        }

    @property
    def launches(self) -> int:
        """Number of graphs that were launched."""
        return int(self._fake.launches)

    @property
    def misuses(self) -> list[str]:
        """Messages of all misuses, including those whose exception was swallowed."""
        return list(self._fake.misuses)

    # For the fake of TensorRT.

    def misuse(self, what: str) -> MisuseError:
        self._fake.misuses.append(what)
        return MisuseError(what)

    def stream(self, handle: int) -> Stream:
        stream = self._fake.streams.get(int(handle))
        if stream is None:
            raise self.misuse("a stream is used that does not exist, or the default stream")
        if stream.device != self._device():
            raise self.misuse("a stream is used while its device is not that of the thread")
        return stream

    def bytes(self, address: int, size: int) -> np.ndarray:
        """Return device memory; fails unless it lies within one allocation that is not freed."""
        with self._fake.lock:
            for start, (_, memory) in self._fake.memory.items():
                if start <= address and address + size <= start + len(memory):
                    return memory[address - start : address - start + size]
        raise self.misuse(f"device memory {address:#x} of {size} bytes is used, but not allocated")

    def device(self) -> int:
        return self._device()

    # Functions of the CUDA runtime.

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        if not 0 <= device < self._fake.devices:
            raise self.misuse(f"device {device} does not exist")
        self._fake.thread.device = device
        return (cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, error.name.removeprefix("cudaError").encode()

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if status := self._failure("cudaMalloc"):
            return status, None
        self._not_while_capturing("cudaMalloc")
        if size < 1:
            raise self.misuse("no memory is allocated")
        d = self._fake
        with d.lock:
            address, d.next = d.next, d.next + (size // _PAGE + 2) * _PAGE
            d.memory[address] = (self._device(), np.full(size, POISON, np.uint8))
        return cudaError_t.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        self._not_while_capturing("cudaFree")
        with self._fake.lock:
            if int(devPtr) not in self._fake.memory:
                raise self.misuse("device memory is freed that is not allocated")
            del self._fake.memory[int(devPtr)]
        return (cudaError_t.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        if status := self._failure("cudaMallocHost"):
            return status, None
        self._not_while_capturing("cudaMallocHost")
        memory = np.full(size, POISON, np.uint8)
        self._fake.pinned[memory.ctypes.data] = memory
        return cudaError_t.cudaSuccess, memory.ctypes.data

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        self._not_while_capturing("cudaFreeHost")
        memory = self._fake.pinned.pop(int(ptr), None)
        if memory is None:
            raise self.misuse("host memory is freed that is not allocated")
        memory.fill(POISON)
        self._fake.freed.append(memory)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        if flags != self.cudaStreamNonBlocking:
            raise self.misuse("a stream that waits for the default stream")
        stream = Stream(self._device())
        self._fake.streams[int(stream)] = stream
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        if self._fake.streams.pop(int(stream), None) is None:
            raise self.misuse("a stream is destroyed twice")
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        if status := self._failure("cudaStreamSynchronize"):
            stream.work.clear()
            return (status,)
        stream = self.stream(int(stream))
        if stream.recorded is not None:
            raise self.misuse("a stream is synchronized while it is captured")
        if not stream.lock.acquire(blocking=False):
            raise self.misuse("two threads use a stream at the same time")
        try:
            while stream.work:
                stream.work.pop(0)()
        finally:
            stream.lock.release()
        return (cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(
        self,
        devPtr: int,
        value: int,
        count: int,
        stream: Stream,
    ) -> tuple[Any, ...]:
        self.stream(int(stream)).add(lambda: self.bytes(devPtr, count).fill(value))
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Stream
    ) -> tuple[Any, ...]:
        if status := self._failure("cudaMemcpyAsync"):
            return (status,)
        queue = self.stream(int(stream))
        self._fake.copies += 1
        to_device = kind != cudaMemcpyKind.cudaMemcpyDeviceToHost
        from_device = kind != cudaMemcpyKind.cudaMemcpyHostToDevice
        pageable = (
            not (to_device and from_device)
            and self._pinned(src if to_device else dst, count) is None
        )
        if pageable and queue.recorded is not None:
            raise self.misuse("a copy of memory that is not page-locked is captured")

        def copy() -> None:
            source = self.bytes(src, count) if from_device else self._host(src, count)
            target = self.bytes(dst, count) if to_device else self._host(dst, count)
            target[:] = source

        queue.add(copy)
        if pageable:  # CUDA copies pageable memory before the call returns
            self.cudaStreamSynchronize(stream)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(
        self, stream: Stream, mode: cudaStreamCaptureMode
    ) -> tuple[Any, ...]:
        queue = self.stream(int(stream))
        if queue.recorded is not None:
            raise self.misuse("a stream is captured twice")
        queue.recorded, queue.mode = [], (int(mode), threading.get_ident())
        queue.invalidated = False
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        queue = self.stream(int(stream))
        if queue.recorded is None:
            return cudaError_t.cudaErrorIllegalState, None
        work, queue.recorded = queue.recorded, None
        if queue.invalidated or (status := self._failure("cudaStreamEndCapture")):
            return (
                status if not queue.invalidated else cudaError_t.cudaErrorStreamCaptureInvalidated
            ), None
        return cudaError_t.cudaSuccess, self._kept(Graph(work))

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[Any, ...]:
        if status := self._failure("cudaGraphInstantiate"):
            return status, None
        if int(graph) not in self._fake.graphs or flags:
            raise self.misuse("a graph is instantiated that does not exist")
        return cudaError_t.cudaSuccess, self._kept(Graph(list(graph.work)))

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> tuple[Any, ...]:
        if int(graphExec) not in self._fake.graphs:
            raise self.misuse("a graph is launched that does not exist")
        self._fake.launches += 1
        for work in graphExec.work:
            self.stream(int(stream)).add(work)
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Graph) -> tuple[Any, ...]:
        return self._forget(graph)

    def cudaGraphExecDestroy(self, graphExec: Graph) -> tuple[Any, ...]:
        return self._forget(graphExec)

    def _kept(self, graph: Graph) -> Graph:
        self._fake.graphs.add(int(graph))
        return graph

    def _forget(self, graph: Graph) -> tuple[Any, ...]:
        if int(graph) not in self._fake.graphs:
            raise self.misuse("a graph is destroyed twice")
        self._fake.graphs.discard(int(graph))
        return (cudaError_t.cudaSuccess,)

    def _device(self) -> int:
        return getattr(self._fake.thread, "device", 0)

    def _pinned(self, address: int, size: int) -> np.ndarray | None:
        with self._fake.lock:
            for start, memory in self._fake.pinned.items():
                if start <= address and address + size <= start + len(memory):
                    return memory[address - start : address - start + size]
        return None

    def _host(self, address: int, size: int) -> np.ndarray:
        import ctypes

        if any(m.ctypes.data <= address < m.ctypes.data + len(m) for m in self._fake.freed):
            raise self.misuse("host memory is used that was freed")
        pinned = self._pinned(address, size)
        if pinned is not None:
            return pinned
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def _failure(self, function: str) -> cudaError_t | None:
        for planned in self._fake.fail:
            if planned[0] == function:
                planned[2] -= 1
                if planned[2] < 0:
                    self._fake.fail.remove(planned)
                    return planned[1]
        return None

    def _not_while_capturing(self, function: str) -> None:
        for stream in list(self._fake.streams.values()):
            mode, thread = stream.mode
            mine = thread == threading.get_ident()
            if stream.recorded is not None and (mode == 0 or (mode == 1 and mine)):
                stream.invalidated = True
                raise self.misuse(f"{function} while a stream is captured")

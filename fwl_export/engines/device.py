"""Ask the CUDA driver for its version and devices, without loading a framework."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_DRIVER_LIBRARY = "libcuda.so.1"

# From cuda.h: CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
      name: The name that the driver reports.
      sm: Compute capability without the dot, e.g. 89.
    """

    name: str
    sm: int


@dataclass(frozen=True)
class Driver:
    """What the CUDA driver reports.

    Attributes:
      version: Newest version of CUDA that it supports, e.g. "13.0"; "" if there is no driver.
      devices: The GPUs that it finds.
      reason: Why there are no GPUs, or "".
    """

    version: str
    devices: tuple[Device, ...]
    reason: str


def query_driver(library: str = _DRIVER_LIBRARY) -> Driver:
    """Ask the CUDA driver for its version and devices; never raises."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver("", (), f"{library} is not installed")
    status = cuda.cuInit(0)
    number, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    status = status or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return Driver(version, (), f"the driver answers with error {status}")
    devices = tuple(_device(cuda, index) for index in range(count.value))
    return Driver(version, devices, "" if devices else "the driver finds no GPU")


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle, value = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(value.value)
    return Device(name.value.decode(errors="replace"), 10 * capability[0] + capability[1])

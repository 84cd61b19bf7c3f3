"""Describes this machine, for reports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Return the properties of the machine that measurements depend on, as data for JSON.

    Keys are "processor", "cores", "load" (one-minute average), "system", and the versions of
    "onnxruntime" and "torch", which are None if not installed.
    """
    versions = installed_versions(("torch", "onnxruntime", "onnxruntime-gpu"))
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "onnxruntime": versions.get("onnxruntime", versions.get("onnxruntime-gpu")),
        "torch": versions.get("torch"),
        "system": platform.platform(),
    }


def available_memory() -> int | None:
    """Return how many bytes of memory programs can still take, or None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def release_memory() -> None:
    """Give memory that nothing uses any more back to the system.

    Objects that refer to each other are collected. Then glibc, which otherwise keeps freed blocks
    of less than 32 MB, returns their pages.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def processor_name() -> str:
    """Return the processor's own name for itself, e.g. "AMD EPYC 7763 64-Core Processor"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name.

    Args:
      packages: Names of distributions, as pip knows them.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions

"""The two variants of TensorRT: TensorRT and TensorRT-RTX.

They share one API, but have their own Python modules and build for other GPUs. A process can use
only one of them: Polygraphy chooses its module once, when it is imported, and the libraries of both
define the same symbols. So engines are built in a process of their own, see
`fwl_export.engines.worker`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwl_export.engines.device import query_driver
from fwl_export.errors import EngineError, MissingDependencyError


@dataclass(frozen=True)
class Variant:
    """One of NVIDIA's two inference compilers.

    Attributes:
      name: Its name on the command line and in the names of engines.
      title: NVIDIA's name for it.
      module: Name of its Python module.
      extra: The extra of fwl-export that installs it.
      needs_device: Whether it builds only for the GPU that is present.
      libraries: Name of the Python package with its shared libraries.
      library: File name of the main library, without a version.
    """

    name: str
    title: str
    module: str
    extra: str
    needs_device: bool
    libraries: str
    library: str

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'fwl-export[{self.extra}]'"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "rtx",
            "TensorRT-RTX",
            "tensorrt_rtx",
            "rtx",
            needs_device=False,
            libraries="tensorrt_rtx_libs",
            library="libtensorrt_rtx.so",
        ),
        Variant(
            "tensorrt",
            "TensorRT",
            "tensorrt",
            "gpu",
            needs_device=True,
            libraries="tensorrt_libs",
            library="libnvinfer.so",
        ),
    )
}


@dataclass(frozen=True)
class LoadedVariant:
    """A variant whose module is imported, and which Polygraphy's loaders use.

    Attributes:
      variant: The variant that is loaded.
      trt: Its Python module.
      version: Version of the module, e.g. "1.7.1.116".
      polygraphy_version: Version of Polygraphy.
    """

    variant: Variant
    trt: Any
    version: str
    polygraphy_version: str


def find_variant(name: str) -> Variant:
    """Return a variant by its name.

    Raises:
      EngineError: There is no variant of this name.
    """
    if name not in VARIANTS:
        raise EngineError(f"variant '{name}' is unknown; expected {' or '.join(VARIANTS)}")
    return VARIANTS[name]


def check_installed(variant: Variant) -> None:
    """Check that the packages of a variant are installed, without importing them.

    Raises:
      MissingDependencyError: A package is not installed.
    """
    for module in (variant.module, "polygraphy"):
        _check_package(variant, module)


def _check_package(variant: Variant, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(
            f"{variant.title} engines need the package {module}, which is not installed; "
            f"{variant.remedy}"
        )


def import_variant(variant: Variant) -> Any:
    """Import a variant's module, for the life of this process; running engines needs no more.

    Raises:
      EngineError: The process already uses the other variant.
      MissingDependencyError: The variant is not installed, or its libraries cannot be loaded.
    """
    _check_package(variant, variant.module)
    for other in VARIANTS.values():
        if other != variant and other.module in sys.modules:
            raise EngineError(
                f"this process already uses {other.title}; {variant.title} needs a process of its "
                "own"
            )
    try:
        return importlib.import_module(variant.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"{variant.title} is installed, but its libraries cannot be loaded ({error}); "
            f"{variant.remedy}"
        ) from None


def load_variant(name: str) -> LoadedVariant:
    """Import a variant's module and make Polygraphy use it, for the life of this process.

    Raises:
      EngineError: The name is unknown, or the process already uses the other variant.
      MissingDependencyError: A package is not installed, or its libraries cannot be loaded.
    """
    variant = find_variant(name)
    check_installed(variant)
    trt = import_variant(variant)
    import polygraphy
    from polygraphy import config

    config.USE_TENSORRT_RTX = variant.module == "tensorrt_rtx"
    return LoadedVariant(variant, trt, str(trt.__version__), str(polygraphy.__version__))


@contextmanager
def plugin_environment(variant: Variant) -> Iterator[dict[str, str]]:
    """Yield environment variables for a process whose parser uses a plugin.

    Such a parser opens TensorRT's main library by a file name without a version, and aborts the
    process if there is no such file. The packages have only names with versions, so this makes a
    link in a temporary folder; the process must end before the context does.
    """
    spec = importlib.util.find_spec(variant.libraries)
    folders = map(Path, spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in folder.glob(f"{variant.library}*")]
    with tempfile.TemporaryDirectory(prefix="fwl-export-") as folder:
        for file in files[:1]:
            Path(folder, variant.library).symlink_to(file)
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def buildable_sms(loaded: LoadedVariant) -> list[int]:
    """Return the compute capabilities that a variant can build for on this machine, ascending."""
    if loaded.variant.needs_device:
        return sorted({device.sm for device in query_driver().devices})
    names = (re.fullmatch(r"SM(\d+)", name) for name in loaded.trt.ComputeCapability.__members__)
    return sorted(int(match[1]) for match in names if match)

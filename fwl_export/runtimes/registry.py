"""The one table of runtimes: what each takes, what it needs, and which module loads it.

`open_session`, the candidates of `check` and `bisect`, and the help text of `--runtime` follow from
it. Importing this module imports no runtime, nor NumPy: `fwl-export --help` reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwl_export.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from fwl_export.bundle.manifest import Bundle
    from fwl_export.runtimes.base import Loaded


@dataclass(frozen=True)
class Options:
    """What a user may choose about a runtime; see `open_session` for what each option means."""

    precision: str | None = None
    threads: int | None = None
    plugin: str | Path = "auto"
    device: str | None = None
    variant: str | None = None
    cuda_graph: bool = True


# Values that ask for nothing special: every runtime accepts them, also one without the option.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "precision": (None,),
    "threads": (None,),
    "plugin": ("auto", "none"),
    "device": (None, "cpu"),
    "variant": (None,),
    "cuda_graph": (True, False),
}


@dataclass(frozen=True)
class Runtime:
    """One way to run a bundle.

    Attributes:
      module: Full name of the module that defines `load(bundle, options) -> Loaded`.
      takes: Names of the `Options` that it takes.
      packages: Distributions that provide it; those that are installed appear in reports.
      extra: Extra of fwl-export that installs what it needs, e.g. "cpu".
      candidate_options: What a user may write after a colon when naming it as a candidate, e.g.
        "no-plugin", and the `Options` which that stands for.
      runs_graph: Whether it runs the bundle's ONNX graph operator by operator, so that `bisect` can
        look at every tensor.
    """

    module: str
    takes: frozenset[str]
    packages: tuple[str, ...]
    extra: str
    candidate_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runs_graph: bool = False


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        module="fwl_export.runtimes.onnxruntime",
        takes=frozenset({"threads", "plugin", "device"}),
        packages=("onnxruntime", "onnxruntime-gpu"),
        extra="cpu",
        candidate_options={
            "plugin": {"plugin": "required"},
            "no-plugin": {"plugin": "none"},
            "cpu": {"device": "cpu"},
            "cuda": {"device": "cuda"},
        },
        runs_graph=True,
    ),
    "tensorrt": Runtime(
        module="fwl_export.runtimes.tensorrt.runner",
        takes=frozenset({"plugin", "device", "variant", "cuda_graph"}),
        packages=("tensorrt-rtx", "tensorrt"),
        extra="rtx",
        candidate_options={"rtx": {"variant": "rtx"}, "tensorrt": {"variant": "tensorrt"}},
    ),
    "torch": Runtime(
        module="fwl_export.runtimes.torch",
        takes=frozenset({"precision"}),
        packages=("torch",),
        extra="export",
        candidate_options={
            "float64": {"precision": "fp64"},
            "float32": {"precision": "fp32"},
            "float16": {"precision": "fp16"},
        },
    ),
    "onnx-reference": Runtime(
        module="fwl_export.runtimes.onnx_reference",
        takes=frozenset(),
        packages=("onnx",),
        extra="export",
        runs_graph=True,
    ),
}


def load(name: str, bundle: Bundle, options: Options) -> Loaded:
    """Load a bundle's model into a runtime.

    Args:
      name: A key of `RUNTIMES`.
      bundle: Bundle that holds the model; the runtime checks the files that it reads.
      options: What the user chose.

    Raises:
      ConfigError: There is no such runtime, or it does not take one of the options.
      MissingDependencyError: A package of the runtime is not installed.
      FwlError: Whatever the runtime raises; see `open_session`.
    """
    runtime = RUNTIMES.get(name)
    if runtime is None:
        raise ConfigError(f"runtime '{name}' is unknown; expected {', '.join(RUNTIMES)}")
    _check_options(name, runtime, options)
    try:
        module = importlib.import_module(runtime.module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"runtime '{name}' needs '{error.name}'; pip install 'fwl-export[{runtime.extra}]'"
        ) from None
    loaded: Loaded = module.load(bundle, options)
    return loaded


def _check_options(name: str, runtime: Runtime, options: Options) -> None:
    for option, value in vars(options).items():
        if option not in runtime.takes and value not in _NEUTRAL[option]:
            others = [f"'{other}'" for other, each in RUNTIMES.items() if option in each.takes]
            raise ConfigError(
                f"{option} can be chosen for runtime{'s' * (len(others) > 1)} "
                f"{' and '.join(others)} only; received {option}={str(value)!r} for runtime "
                f"'{name}'"
            )

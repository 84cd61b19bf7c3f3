"""Runtimes: open a bundle and feed it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.bundle.state import TensorSpec
from fwl_export.deprecations import renamed_arguments
from fwl_export.errors import ConfigError, MissingDependencyError
from fwl_export.runtimes.base import Runner
from fwl_export.runtimes.sampling import Sampler
from fwl_export.runtimes.session import Session
from fwl_export.runtimes.slots import Slots

RUNTIMES = ("onnxruntime", "tensorrt", "torch", "onnx-reference")

_NO_CHOICE = [(None, None, plugin, None) for plugin in ("auto", "none")]


@renamed_arguments(backend="runtime", flavour="variant")
def open_session(
    bundle: str | Path | Bundle,
    runtime: str = "onnxruntime",
    batch: int = 1,
    precision: Literal["fp32", "fp16", "fp64"] | None = None,
    threads: int | None = None,
    plugin: str | Path = "auto",
    device: str | None = None,
    variant: str | None = None,
    cuda_graph: bool = True,
) -> Session:
    """Open a bundle for reading text.

    Args:
      bundle: its folder, or a bundle that was read.
      runtime: "onnxruntime"; "tensorrt", an engine of the bundle, on the GPU it was built for;
        "torch"; or "onnx-reference", ONNX's own evaluator, a slow second opinion.
      batch: rows, each a session of its own.
      precision: runtime "torch" only: compute in this precision instead of the bundle's.
      threads: runtime "onnxruntime" only: threads inside one operator.
      plugin: not for runtime "torch": the library with our kernel for the fast-weight update.
        "auto" takes the package's own where there is one, else the model's standard operators;
        "none" takes those; "required" is an error without the library; or a library's path. An
        engine was built for one or the other; "auto" is what it needs.
      device: "cpu", "cuda" or, say, "cuda:1"; None is "cuda" for runtime "tensorrt", else "cpu".
        Runtime "torch" knows only that.
      variant: runtime "tensorrt" only: "rtx" or "tensorrt"; None takes one that has an engine for
        this GPU and is installed.
      cuda_graph: runtime "tensorrt" only: replay calls with one token as CUDA graphs.

    Raises:
      BundleError: the bundle is missing, changed or cannot be loaded.
      DeviceError, EngineError: runtime "tensorrt": there is no GPU, or no engine for it.
      PluginError: the library is missing and was asked for, or cannot be loaded.
      MissingDependencyError: the runtime's package is not installed, or without the device.
      ConfigError: there is no such runtime, or an argument is for another one.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle))
    manifest = opened.manifest
    specs: list[TensorSpec] = list(manifest.state)
    max_tokens = manifest.max_tokens
    runner: Runner
    if precision is not None and runtime in ("onnxruntime", "tensorrt"):
        raise ConfigError("precision can be chosen for runtime 'torch' only")
    if threads is not None and runtime in ("tensorrt", "torch"):
        raise ConfigError("threads can be chosen for runtime 'onnxruntime' only")
    if variant is not None and runtime != "tensorrt":
        raise ConfigError("a variant can be chosen for runtime 'tensorrt' only")
    with opened.unchanged():
        if runtime == "onnxruntime":
            from fwl_export.runtimes import onnxruntime

            loaded = onnxruntime.load_model(opened, threads, plugin, device or "cpu")
            runner = onnxruntime.OnnxRuntimeRunner(loaded)
        elif runtime == "tensorrt":
            from fwl_export.runtimes.tensorrt import engine as engines
            from fwl_export.runtimes.tensorrt.runner import TensorRTRunner

            engine = engines.load_model(opened, variant, plugin, device, cuda_graph)
            runner, max_tokens = TensorRTRunner(engine), engine.max_tokens
        elif runtime == "torch":
            if plugin not in ("auto", "none"):
                raise ConfigError("a plugin cannot be chosen for runtime 'torch'")
            if device not in (None, "cpu"):
                raise ConfigError("a device cannot be chosen for runtime 'torch'")
            try:
                from fwl_export.runtimes import torch
            except ModuleNotFoundError as error:
                raise MissingDependencyError(
                    f"runtime 'torch' needs '{error.name}'; pip install 'fwl-export[export]'"
                ) from None
            model = torch.load_model(opened, precision)
            runner, specs = torch.TorchRunner(model), model.specs
        elif runtime == "onnx-reference":
            if (precision, threads, str(plugin), device) not in _NO_CHOICE:
                raise ConfigError(
                    "runtime 'onnx-reference' takes no precision, threads, plugin or device"
                )
            from fwl_export.runtimes import onnx_reference

            evaluator = onnx_reference.load_model(opened)
            runner = onnx_reference.OnnxReferenceRunner(evaluator, specs)
        else:
            raise ConfigError(f"runtime '{runtime}' is unknown; expected {', '.join(RUNTIMES)}")
    return Session(
        runner,
        specs,
        manifest.config.vocab_size,
        max_tokens,
        batch,
        manifest.config.fast_weights.anchor_interval,
        manifest.model_id,
        manifest.config.backbone.max_positions,
    )


__all__ = ["RUNTIMES", "Sampler", "Session", "Slots", "open_session"]

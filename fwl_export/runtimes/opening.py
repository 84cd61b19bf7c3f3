"""Opening a bundle as a session."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

from fwl_export.bundle.defaults import DEFAULT_MAX_LEARNING_WEIGHT
from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.deprecations import renamed_arguments
from fwl_export.runtimes import registry
from fwl_export.runtimes.arguments import check_threads, check_types, checked_batch
from fwl_export.runtimes.limits import LearningLimits
from fwl_export.runtimes.registry import Options
from fwl_export.runtimes.session import Session, SessionSpec

_log = logging.getLogger(__name__)


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
    max_learning_weight: float = DEFAULT_MAX_LEARNING_WEIGHT,
    max_update_norm: float = math.inf,
    clip_update_norm: float = math.inf,
) -> Session:
    """Open a bundle for reading text: load its model, and start `batch` fresh rows of state.

        session = open_session("demo-bundle")
        logits = session.feed([11, 42, 7])  # [1, 3, V]: what may follow each of the tokens

    Loading takes seconds and the memory of the weights. `Session.another` opens more sessions on
    the same loaded model, at the cost of their state only.

    Args:
      bundle: Path of the bundle's folder, or a bundle that was read with `read_bundle`.
      runtime: What computes: "onnxruntime"; "tensorrt", which runs the bundle's engine for this
        machine's GPU; "torch", the PyTorch model from the bundle's checkpoint; or
        "onnx-reference", ONNX's own evaluator, very slow, as a second opinion.
      batch: Number of rows, 1 or more. Each row is a text of its own with its own state.
      precision: For "torch" only: precision to compute in. None means the bundle's own; "fp64"
        returns float64 logits, as a reference.
      threads: For "onnxruntime" only: threads inside one operator. None lets ONNX Runtime choose.
      plugin: For "onnxruntime" and "tensorrt": the library with this project's kernel for the
        fast-weight update. "auto" uses the one in the package if it is there, otherwise standard
        operators; "none" uses standard operators; "required" fails without the library; a path
        names another library. It runs inside this process: only load one you trust. A TensorRT
        engine was built with the kernel or without; "auto" is always right for it.
      device: Where to compute: "cpu", "cuda" or, for example, "cuda:1" for "onnxruntime"; "cuda" or
        "cuda:1" for "tensorrt". None means "cuda" for "tensorrt", else "cpu".
      variant: For "tensorrt" only: "rtx" (TensorRT-RTX) or "tensorrt". None takes one that is
        installed and has an engine for this GPU.
      cuda_graph: For "tensorrt": replay calls of one token as CUDA graphs, which is faster.
      max_learning_weight: Largest product of a token's label weight and its row's learning-rate
        scale, and largest scale; `math.inf` means no limit. A token with a product of 1000 or more
        can spoil the predictions of all that follow, see docs/concepts/limits.md.
      max_update_norm: Largest norm of what a row has learned, as `Session.learned` tells it; a call
        or a state that exceeds it is refused. Choose it for your model from the norms over texts
        that it should read. `math.inf`, no limit, costs no time.
      clip_update_norm: Norm to which what a row has learned is scaled down, if it is larger, after
        every 32 tokens of the row: for those who cannot refuse a text. Calls of the model are then
        no longer than that. `math.inf`, no clipping, costs no time.

    Returns:
      A session whose rows have read nothing yet.

    Raises:
      BundleError: The bundle is missing, was changed on disk, or cannot be loaded.
      ConfigError: There is no such runtime or device, the runtime does not take an argument, or an
        argument has the wrong type or is out of range.
      ShapeError: `batch` is less than 1, or more than the engine or the memory takes.
      DeviceError: Runtime "tensorrt": there is no such GPU, or it refused a call.
      EngineError: Runtime "tensorrt": the bundle has no engine for this GPU, or it cannot be
        loaded. The message names the command that builds one.
      PluginError: The plugin library is required and missing, or cannot be loaded.
      MissingDependencyError: The runtime's package is not installed, or not for that device.
    """
    check_types(
        bundle=bundle,
        runtime=runtime,
        precision=precision,
        plugin=plugin,
        device=device,
        variant=variant,
        cuda_graph=cuda_graph,
    )
    check_threads(threads)
    rows = checked_batch(batch)  # before the model is loaded, which takes seconds
    limits = LearningLimits(max_learning_weight, max_update_norm, clip_update_norm)
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle))
    options = Options(precision, threads, plugin, device, variant, cuda_graph)
    with opened.unchanged():
        loaded = registry.load(runtime, opened, options)
    _log.info("opened '%s' in runtime %s, batch %d", opened.folder, runtime, rows)
    config = opened.manifest.config
    spec = SessionSpec(
        loaded.state,
        config.vocab_size,
        loaded.max_tokens,
        config.fast_weights.anchor_interval,
        opened.manifest.model_id,
        config.backbone.max_positions,
        precision or opened.manifest.precision,
    )
    return Session(loaded.runner, spec, rows, limits)

"""Write a bundle from a checkpoint: trace, check, run once, hash, rename into place."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fwl_export.bundle import manifest as bundles
from fwl_export.bundle.defaults import DEFAULT_MAX_TOKENS, DEFAULT_OPSET
from fwl_export.bundle.manifest import Bundle, Manifest, describe_file, is_bundle, read_bundle
from fwl_export.bundle.state import PAST, PRESENT, TensorSpec, zeros
from fwl_export.errors import ExportError
from fwl_export.export.trace import UPDATES_PER_MODEL, example_inputs, export_onnx
from fwl_export.files import check_output, replaced_folder
from fwl_export.machine import installed_versions
from fwl_export.model.checkpoint import TOKENIZER_FILE, load_checkpoint
from fwl_export.model.stored import CONFIG_FILE, WEIGHTS_FILE
from fwl_export.model.streaming import INPUTS
from fwl_export.op.spec import DOMAIN, NAME, VERSION
from fwl_export.ort import import_onnxruntime
from fwl_export.precision.policy import EXPORTED, PrecisionPolicy, write_policy

_log = logging.getLogger(__name__)

_TOOLS = ("fwl-export", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_bundle(
    checkpoint: Path,
    output: Path,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    force: bool = False,
    include_checkpoint: bool = True,
    progress: Callable[[str], None] = lambda message: None,
    policy: PrecisionPolicy | None = None,
) -> Bundle:
    """Export a checkpoint folder to a bundle folder, all of it or nothing.

    Args:
      checkpoint: folder with config.json, model.safetensors and tokenizer.json.
      output: the bundle; must not exist unless `force`.
      precision: "fp32" or "fp16".
      opset: of the ONNX file.
      max_tokens: largest number of tokens per call; longer reads are split. Never more than
        the model's anchor interval.
      force: replace what is at `output`.
      include_checkpoint: put the PyTorch weights in, which runtime 'torch' and `check` read.
      progress: called with what is being done.
      policy: lower some products of a float32 model, see `fwl_export.precision.policy`.

    Raises:
      OutputExistsError: `output` exists and `force` is off, or holds something too precious.
      ExportError: the written file fails a check.
      CheckpointError, ConfigError: see `load_checkpoint`; the policy is of another model.
    """
    if precision not in EXPORTED:
        raise ExportError(f"precision is '{precision}'; expected {' or '.join(EXPORTED)}")
    if max_tokens < 1:
        raise ExportError(f"max_tokens is {max_tokens}; expected 1 or more")
    _check_policy(policy, precision)
    check_bundle_output(output, force)
    progress("reading the checkpoint")
    loaded = load_checkpoint(checkpoint)
    _log.info("read checkpoint '%s', %s", checkpoint, loaded.config.backbone.type)
    if interval := loaded.config.fast_weights.anchor_interval:
        max_tokens = min(max_tokens, interval)  # no call may cross an anchor
    if limit := loaded.config.backbone.max_positions:
        max_tokens = min(max_tokens, limit)
    with replaced_folder(output) as folder:
        progress("tracing the model (10 s and more, by its layers)")
        model_path = folder / bundles.MODEL_FILE
        chosen = policy or precision
        specs = export_onnx(loaded.model, model_path, chosen, max_tokens, opset)
        progress("running it once in ONNX Runtime")
        run_once(model_path, specs)
        progress("writing the manifest")
        shutil.copyfile(checkpoint / TOKENIZER_FILE, folder / bundles.TOKENIZER_FILE)
        if include_checkpoint:
            (folder / bundles.CHECKPOINT_FOLDER).mkdir()
            for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
                shutil.copyfile(checkpoint / name, folder / bundles.CHECKPOINT_FOLDER / name)
        if policy:
            write_policy(folder / bundles.PRECISION_FILE, policy)
        manifest = Manifest(
            config=loaded.config,
            precision=policy.precision if policy else precision,
            max_tokens=max_tokens,
            opset=opset,
            op={
                "domain": DOMAIN,
                "name": NAME,
                "version": VERSION,
                "nodes": UPDATES_PER_MODEL,
            },
            state=specs,
            model_id=_model_id(checkpoint, chosen),
            versions=installed_versions(_TOOLS),
            files={
                path.relative_to(folder).as_posix(): describe_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        )
        bundles.write_manifest(folder, manifest.to_dict())
    return read_bundle(output)


def check_bundle_output(output: Path, force: bool) -> None:
    """Refuse an output folder that exists, unless it may be replaced; see `files.check_output`.

    Raises:
      OutputExistsError: It exists and `force` is off, or it holds the current or home folder.
    """
    check_output(output, "a bundle", is_bundle, force, over_anything=True)


def run_once(model_path: Path, specs: list[TensorSpec]) -> None:
    """Run one call in ONNX Runtime: two rows, two tokens, fresh state.

    Raises:
      ExportError: it does not load or run, or something comes out NaN or with another shape.
      MissingDependencyError: onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime("export, which runs the file once,")
    feeds = dict(zip(INPUTS, (t.numpy() for t in example_inputs(2, 2)), strict=True))
    feeds |= {PAST + name: array for name, array in zeros(specs, 2).items()}
    try:
        session = onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # onnxruntime's own exceptions share no narrower base
        raise ExportError(f"ONNX Runtime cannot run {model_path.name}: {error}") from None
    for spec in specs:
        found = results[PRESENT + spec.name]
        if found.shape != (2, *spec.shape) or not np.isfinite(found).all():
            raise ExportError(
                f"{model_path.name}: state '{spec.name}' came out as {list(found.shape)}, "
                f"finite: {bool(np.isfinite(found).all())}; expected {[2, *spec.shape]}"
            )


def _check_policy(policy: PrecisionPolicy | None, precision: str) -> None:
    if policy is None:
        return
    if precision != "fp32":
        raise ExportError(
            f"a precision policy lowers parts of an fp32 model, and precision is '{precision}'; "
            "give one of the two"
        )
    if policy.target == "bf16":
        raise ExportError(
            "a bf16 policy can be measured, in PyTorch, but not exported: ONNX Runtime's CPU "
            "provider, which every export is run in, has no bf16 kernels; make a policy for fp16"
        )


def _model_id(checkpoint: Path, precision: str | PrecisionPolicy) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(describe_file(checkpoint / name)["sha256"].encode())
    if isinstance(precision, PrecisionPolicy):
        digest.update(json.dumps([precision.target, sorted(precision.quantized)]).encode())
    else:
        digest.update(json.dumps(precision).encode())
    return digest.hexdigest()

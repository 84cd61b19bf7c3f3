"""Write a bundle from a checkpoint: trace it, check it, run it once, hash it."""

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
from fwl_export.bundle.repetition import repeated_tokens, repetitions
from fwl_export.bundle.state import PAST, PRESENT, TensorSpec, zeros
from fwl_export.bundle.text_tokenizer import OPTIONAL_FILES
from fwl_export.errors import ExportError, OutputExistsError
from fwl_export.export.inline import write_inlined
from fwl_export.export.repetition import RepeatedReading, refusal
from fwl_export.export.trace import UPDATES_PER_MODEL, example_inputs, export_onnx
from fwl_export.files import check_output, replaced_folder
from fwl_export.machine import installed_versions
from fwl_export.model.checkpoint import (
    TOKENIZER_FILE,
    Checkpoint,
    check_complete,
    load_checkpoint,
)
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
    inline: bool = False,
) -> Bundle:
    """Export a checkpoint folder to a bundle folder. On failure, nothing is written.

    Args:
      checkpoint: Folder with config.json, model.safetensors and tokenizer.json.
      output: Folder of the bundle to write; must not exist, unless `force` is set.
      precision: Precision of weights and activations, "fp32" or "fp16".
      opset: ONNX opset of the file.
      max_tokens: Largest number of tokens per call; sessions split longer reads. It is reduced to
        the model's anchor interval and context, where these are smaller.
      force: Whether to replace what is at `output`.
      include_checkpoint: Whether to put the PyTorch weights into the bundle. Runtime 'torch' and
        `fwl-export check` need them.
      progress: Called with a line of text about what is being done.
      policy: The parts of a float32 model to quantize, see `fwl_export.precision.policy`; None
        exports all parts in `precision`.
      inline: Whether `model.onnx` itself has no local functions. Otherwise a second file,
        `model.inlined.onnx`, has none; it shares the weights of the first.

    Returns:
      The bundle, read again from its folder.

    Raises:
      OutputExistsError: `output` exists and `force` is off, or it is a folder that is never
        replaced, such as the home folder or one that holds the checkpoint.
      OutputBusyError: Another process is exporting to the same folder.
      ExportError: An argument is not supported, the written file fails a check, or the checkpoint
        was changed meanwhile.
      CheckpointError, ConfigError: The checkpoint cannot be read, see `load_checkpoint`, or the
        policy belongs to another model.
    """
    if precision not in EXPORTED:
        raise ExportError(f"precision is '{precision}'; expected {' or '.join(EXPORTED)}")
    if max_tokens < 1:
        raise ExportError(f"max_tokens is {max_tokens}; expected 1 or more")
    _check_policy(policy, precision)
    check_bundle_output(output, force)
    _check_source(checkpoint, output, include_checkpoint)
    progress("reading the checkpoint")
    chosen = policy or precision
    check_complete(checkpoint)
    model_id = _model_id(checkpoint, chosen)
    loaded = load_checkpoint(checkpoint)
    _log.info("read checkpoint '%s', %s", checkpoint, loaded.config.backbone.type)
    if interval := loaded.config.fast_weights.anchor_interval:
        max_tokens = min(max_tokens, interval)  # a call must not cross an anchor
    if limit := loaded.config.backbone.max_positions:
        max_tokens = min(max_tokens, limit)
    with replaced_folder(output) as folder:
        model_path = folder / bundles.MODEL_FILE
        specs = export_onnx(loaded.model, model_path, chosen, max_tokens, opset, progress)
        inlined = model_path if inline else folder / bundles.INLINED_FILE
        write_inlined(model_path, inlined)
        progress("running it once in ONNX Runtime")
        for written in dict.fromkeys((model_path, inlined)):
            run_once(written, specs)
        if chosen != "fp32":
            progress("reading repeated tokens, on which numbers grow largest")
            _read_repeated(model_path, specs, loaded, max_tokens, policy or precision)
        progress("writing the manifest")
        _copy_checkpoint(checkpoint, folder, include_checkpoint)
        source = folder / bundles.CHECKPOINT_FOLDER if include_checkpoint else checkpoint
        if _model_id(source, chosen) != model_id:
            raise ExportError(
                f"checkpoint '{checkpoint}' was changed while it was exported; export it again"
            )
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
                "nodes": 0 if inline else UPDATES_PER_MODEL,
            },
            state=specs,
            model_id=model_id,
            versions=installed_versions(_TOOLS),
            files={
                path.relative_to(folder).as_posix(): describe_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        )
        bundles.write_manifest(folder, manifest.to_dict())
    return read_bundle(output)


def _check_source(checkpoint: Path, output: Path, include_checkpoint: bool) -> None:
    """Check that the bundle does not take the place of the only copy of its checkpoint."""
    inside = checkpoint.resolve().is_relative_to(output.resolve())
    if inside and not (include_checkpoint and is_bundle(output)):
        raise OutputExistsError(
            f"output '{output}' holds the checkpoint '{checkpoint}' that is to be exported, and "
            "would be replaced as a whole; choose another name"
        )


def _copy_checkpoint(checkpoint: Path, folder: Path, include_checkpoint: bool) -> None:
    """Copy what a checkpoint says about text into a bundle, and its other files if wanted."""
    text = (TOKENIZER_FILE, *(name for name in OPTIONAL_FILES if (checkpoint / name).is_file()))
    for name in text:
        shutil.copyfile(checkpoint / name, folder / name)
    if include_checkpoint:
        (folder / bundles.CHECKPOINT_FOLDER).mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE, *text):
            shutil.copyfile(checkpoint / name, folder / bundles.CHECKPOINT_FOLDER / name)


def check_bundle_output(output: Path, force: bool) -> None:
    """Check that a bundle may be written to a folder; see `files.check_output`.

    Raises:
      OutputExistsError: The folder exists and `force` is off, or it contains the current folder or
        the home folder.
    """
    check_output(output, "a bundle", is_bundle, force, over_anything=True)


def run_once(model_path: Path, specs: list[TensorSpec]) -> None:
    """Run one call of two rows and two tokens, from a fresh state, in ONNX Runtime.

    Args:
      model_path: Path of the ONNX file.
      specs: The state tensors of the model.

    Raises:
      ExportError: The file does not load or run, or a state tensor comes out with another shape
        or with NaN.
      MissingDependencyError: onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime("export, which runs the file once,")
    feeds = dict(zip(INPUTS, (t.numpy() for t in example_inputs(2, 2)), strict=True))
    feeds |= {PAST + name: array for name, array in zeros(specs, 2).items()}
    try:
        session = onnxruntime.InferenceSession(
            str(model_path), providers=["CPUExecutionProvider"], enable_fallback=0
        )
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # onnxruntime's own exceptions share no narrower base
        raise ExportError(f"ONNX Runtime cannot run {model_path.name}: {error}") from None
    for spec in specs:
        found = results[PRESENT + spec.name]
        if found.shape != (2, *spec.shape) or not np.isfinite(found).all():
            raise ExportError(
                f"{model_path.name}: state '{spec.name}' came out with shape {list(found.shape)}"
                f"{'' if np.isfinite(found).all() else ' and NaN or infinite values'}; expected "
                f"finite values of shape {[2, *spec.shape]}"
            )


def _read_repeated(
    model_path: Path,
    specs: list[TensorSpec],
    checkpoint: Checkpoint,
    max_tokens: int,
    precision: str | PrecisionPolicy,
) -> None:
    """Check that texts of repeated tokens leave the output finite; see `export.repetition`.

    Raises:
      ExportError: They do not. The message names token and position.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    texts = repetitions(repeated_tokens(tokenizer), np.zeros(0, np.int64), config.vocab_size)
    reading = RepeatedReading.of(model_path, specs, config, max_tokens)
    if found := reading.first_not_finite(list(dict.fromkeys(texts))):
        name = precision if isinstance(precision, str) else precision.target
        text = tokenizer.decode([found.token_id], skip_special_tokens=False)
        raise refusal(found, name, text)


def _check_policy(policy: PrecisionPolicy | None, precision: str) -> None:
    if policy is None:
        return
    if precision != "fp32":
        raise ExportError(
            "a precision policy quantizes parts of an fp32 model, but precision is "
            f"'{precision}'; give one of the two"
        )
    if policy.target == "bf16":
        raise ExportError(
            "a bf16 policy can be measured in PyTorch, but not exported: every export is run once "
            "in ONNX Runtime's CPU provider, which has no bf16 kernels; make a policy for fp16"
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

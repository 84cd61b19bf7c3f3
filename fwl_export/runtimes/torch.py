"""Runtime "torch": PyTorch, from the bundle's checkpoint; the reference for all other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fwl_export.bundle.manifest import CHECKPOINT_FOLDER, PRECISION_FILE, Bundle
from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import BundleError
from fwl_export.machine import release_memory
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.streaming import StreamingModel
from fwl_export.precision.policy import (
    PrecisionPolicy,
    read_policy,
    streaming_model,
    with_stored_weights,
)
from fwl_export.runtimes.base import Call, Loaded, Rows, index
from fwl_export.runtimes.registry import Options
from fwl_export.runtimes.session import Session

Buffers = dict[str, torch.Tensor]


def load(bundle: Bundle, options: Options) -> Loaded:
    """Load a bundle's model for sessions; raises what `load_model` raises."""
    model = load_model(bundle, options.precision)
    return Loaded(TorchRunner(model), model.specs, bundle.manifest.max_tokens)


def load_model(bundle: Bundle, precision: str | None = None) -> StreamingModel:
    """Load the model of a bundle's checkpoint.

    Args:
      bundle: Bundle with a checkpoint, whose files are checked first.
      precision: Precision to compute in: "fp32", "fp16" or "fp64"; None means the bundle's own. If
        the bundle has a precision policy, the weights are the quantized ones in any case, since
        they are part of the model.

    Raises:
      BundleError: The bundle has no checkpoint, or one of its files was changed.
      CheckpointError: The checkpoint cannot be loaded.
    """
    bundle.require_checkpoint()
    model = load_checkpoint(
        bundle.checkpoint,
        lambda name: bundle.read_file(f"{CHECKPOINT_FOLDER}/{name}"),
    ).model
    if model.config != bundle.manifest.config:
        raise BundleError(
            f"bundle '{bundle.folder}' holds the checkpoint of a model with another configuration "
            "than its manifest; export the model again"
        )
    chosen: str | PrecisionPolicy = precision or bundle.manifest.precision
    if PRECISION_FILE in bundle.manifest.files:
        policy = read_policy(bundle.folder / PRECISION_FILE, bundle.read_file(PRECISION_FILE))
        if precision in (None, bundle.manifest.precision):
            chosen = policy
        else:
            model = with_stored_weights(model, policy)
    streaming = streaming_model(model, chosen, bundle.manifest.max_tokens)
    del model
    release_memory()  # modules refer to each other: the model as it was loaded would stay
    return streaming


def short_session(session: Session, slots: int, batch: int) -> Session | None:
    """Open another session for short texts, whose ring buffers take little memory.

    Args:
      session: Session of a loaded model.
      slots: Number of tokens that each row reads at most.
      batch: Number of fresh rows.

    Returns:
      The session, or None if the model is not in this runtime.
    """
    runner = session._runner
    if not isinstance(runner, TorchRunner):
        return None
    short = TorchRunner(runner.streaming, slots)
    return Session(short, replace(session.spec, state=short.specs), batch, session.limits)


def _with_slots(spec: TensorSpec, slots: int) -> TensorSpec:
    if not spec.name.startswith("cache."):
        return spec
    heads, capacity, size = spec.shape
    return replace(spec, shape=(heads, min(capacity, slots), size))


class TorchRunner:
    """Runs the streaming form of the PyTorch model."""

    def __init__(self, model: StreamingModel, slots: int | None = None) -> None:
        """Share a loaded model.

        Args:
          model: Streaming form of the model, which other runners may share.
          slots: Slots per ring buffer, where a buffer has more; enough for texts of as many tokens.
        """
        self.streaming = model
        self._slots = slots
        self.specs = [_with_slots(spec, slots) for spec in model.specs] if slots else model.specs

    def another(self) -> TorchRunner:
        """See `Runner.another`."""
        return TorchRunner(self.streaming, self._slots)

    def new_buffers(self, batch: int) -> Buffers:
        """See `Runner.new_buffers`. A call replaces these tensors by new ones."""
        return {
            spec.name: torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype))
            for spec in self.specs
        }

    def run(self, call: Call, past: Buffers, present: Buffers) -> Array:
        """See `Runner.run`."""
        present.clear()  # before the call, which needs memory for new tensors
        with torch.inference_mode():
            logits, *tensors = self.streaming(
                *map(torch.from_numpy, vars(call).values()),
                *(past[spec.name] for spec in self.specs),
            )
        present.update(zip((spec.name for spec in self.specs), tensors, strict=True))
        result: Array = logits.numpy()
        return result

    def read(self, buffers: Buffers, rows: Rows) -> State:
        """See `Runner.read`."""
        return {name: tensor.numpy()[index(rows)] for name, tensor in buffers.items()}

    def write(self, buffers: Buffers, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """See `Runner.write`."""
        for name, tensor in buffers.items():
            tensor.numpy()[list(rows)] = state[name]

    def release(self, buffers: Buffers) -> None:
        """See `Runner.release`; there is nothing to drop."""

"""Backend: PyTorch, from the checkpoint in the bundle. What every other is compared to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fwl_export.bundle import CHECKPOINT_FOLDER, Bundle
from fwl_export.errors import BundleError
from fwl_export.export.precision import in_precision
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.streaming import StreamingModel
from fwl_export.state import State

Array = npt.NDArray[Any]
Buffers = dict[str, torch.Tensor]


class TorchRunner:
    """Runs the streaming form of the PyTorch model."""

    def __init__(self, bundle: Bundle, precision: str | None = None) -> None:
        """Load the model.

        Args:
          bundle: must hold the checkpoint; its files are checked first.
          precision: "fp32", "fp16" or "fp64"; None is the bundle's own.
        """
        names = [n for n in bundle.manifest.files if n.startswith(CHECKPOINT_FOLDER + "/")]
        if not names:
            raise BundleError(
                f"bundle '{bundle.folder}' was exported without its checkpoint, which the torch "
                "backend reads; export it again without --no-checkpoint"
            )
        for name in names:
            bundle.file(name)
        model = load_checkpoint(bundle.folder / CHECKPOINT_FOLDER).model
        self.streaming = StreamingModel(
            in_precision(model, precision or bundle.manifest.precision),
            bundle.manifest.max_tokens,
        )
        self.specs = self.streaming.specs

    def new_buffers(self, batch: int) -> Buffers:
        """Return an empty table; a call fills it with the tensors it returns."""
        return {}

    def run(
        self,
        input_ids: Array,
        label_weights: Array,
        lengths: Array,
        past: Buffers,
        present: Buffers,
    ) -> Array:
        """See `Runner.run`."""
        inputs = (torch.from_numpy(np.ascontiguousarray(a)) for a in (input_ids, label_weights))
        with torch.inference_mode():
            logits, *tensors = self.streaming(
                *inputs, torch.from_numpy(lengths), *(past[spec.name] for spec in self.specs)
            )
        present.update(zip((spec.name for spec in self.specs), tensors, strict=True))
        result: Array = logits.numpy()
        return result

    def read(self, buffers: Buffers) -> State:
        """See `Runner.read`."""
        return {name: tensor.numpy().copy() for name, tensor in buffers.items()}

    def write(self, buffers: Buffers, state: Mapping[str, Array]) -> None:
        """See `Runner.write`."""
        buffers.update({spec.name: torch.tensor(state[spec.name]) for spec in self.specs})

"""Runtime "onnx-reference": ONNX's own evaluator in NumPy, slow, as a second opinion.

It runs every operator as the ONNX standard defines it, and the fast-weight update as the function
body in the file. It shares no kernel with any other runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper
from onnx.reference import ReferenceEvaluator

from fwl_export.bundle import state as states
from fwl_export.bundle.manifest import MODEL_FILE, Bundle
from fwl_export.bundle.state import PAST, PRESENT, Array, State, TensorSpec
from fwl_export.errors import BundleError
from fwl_export.runtimes.base import Call, Loaded, Rows, index
from fwl_export.runtimes.registry import Options


class OnnxReferenceRunner:
    """Runs a bundle's ONNX file operator by operator; buffers are NumPy arrays by name."""

    def __init__(self, evaluator: Any, specs: Sequence[TensorSpec]) -> None:
        """Share a loaded evaluator.

        Args:
          evaluator: ONNX's `ReferenceEvaluator` of the model.
          specs: Specs of the state's tensors, in the model's order.
        """
        self._evaluator = evaluator
        self._specs = specs

    def another(self) -> OnnxReferenceRunner:
        """See `Runner.another`."""
        return OnnxReferenceRunner(self._evaluator, self._specs)

    def new_buffers(self, batch: int) -> State:
        """See `Runner.new_buffers`."""
        return states.zeros(self._specs, batch)

    def run(self, call: Call, past: State, present: State) -> Array:
        """See `Runner.run`."""
        inputs = vars(call) | {PAST + name: array for name, array in past.items()}
        with np.errstate(all="ignore"):  # the model takes log(0), and exp of that, on purpose
            values = self._evaluator.run(None, inputs)
        outputs = dict(zip(self._evaluator.output_names, values, strict=True))
        for spec in self._specs:
            # The evaluator may return a scalar as a plain number.
            present[spec.name] = np.asarray(outputs[PRESENT + spec.name])
        logits: Array = outputs["logits"]
        return logits

    def read(self, buffers: State, rows: Rows) -> State:
        """See `Runner.read`."""
        return {name: array[index(rows)] for name, array in buffers.items()}

    def write(self, buffers: State, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """See `Runner.write`."""
        for name in buffers:
            array = np.array(buffers[name])  # a copy: an operator may return its input itself
            array[list(rows)] = state[name]
            buffers[name] = array

    def release(self, buffers: State) -> None:
        """See `Runner.release`; there is nothing to drop."""


def load(bundle: Bundle, options: Options) -> Loaded:
    """Load a bundle's model for sessions; this runtime takes no options.

    Raises:
      BundleError: The evaluator cannot load the model.
    """
    path = bundle.folder / MODEL_FILE
    content, data = bundle.read_model()
    try:
        model = onnx.load_model_from_string(content)
        _put_inside(model, data)
        evaluator = ReferenceEvaluator(model)
    except Exception as error:  # an operator may raise anything
        raise BundleError(f"ONNX's reference evaluator cannot load '{path}': {error}") from None
    manifest = bundle.manifest
    runner = OnnxReferenceRunner(evaluator, manifest.state)
    return Loaded(runner, manifest.state, manifest.max_tokens)


def _put_inside(model: onnx.ModelProto, data: Mapping[str, bytes]) -> None:
    """Move external data into a model.

    Args:
      model: The model, changed in place.
      data: Content of each file of external data, by its name in the model.
    """
    for tensor in external_data_helper._get_all_tensors(model):
        if external_data_helper.uses_external_data(tensor):
            place: Any = external_data_helper.ExternalDataInfo(tensor)
            begin, content = place.offset or 0, data[place.location]
            tensor.raw_data = content[begin : begin + place.length if place.length else None]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]

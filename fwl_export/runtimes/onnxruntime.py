"""Backend: ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle import Bundle
from fwl_export.errors import BundleError, MissingDependencyError, PluginError
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.state import PAST, PRESENT, State, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]
Buffers = dict[str, "onnxruntime.OrtValue"]


class OnnxRuntimeRunner:
    """Runs the bundle's ONNX file; the state stays in buffers that are bound, not copied.

    Past and present are never one buffer: ONNX Runtime accepts that and silently computes
    wrong results for graphs that read the past after they have written the present.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, plugin: str | Path = "auto"
    ) -> None:
        """Load the model.

        Args:
          bundle: its ONNX file and external data are checked first.
          threads: inside one operator; None lets ONNX Runtime choose.
          plugin: see `open_session`.

        Raises:
          BundleError: ONNX Runtime cannot load the model.
          PluginError: the library is missing and was asked for, or cannot be loaded.
        """
        self._ort = import_onnxruntime()
        options = self._ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self.plugin = find_plugin(ONNXRUNTIME, plugin)
        if self.plugin is not None:
            _register(options, self.plugin)
        path = bundle.model_files()
        try:
            self._session = self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
            raise BundleError(f"ONNX Runtime cannot load '{path}': {error}") from None
        self._specs: Sequence[TensorSpec] = bundle.manifest.state

    def new_buffers(self, batch: int) -> Buffers:
        """Return one buffer for each state tensor."""
        return {
            spec.name: self._ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, *spec.shape), spec.dtype)
            )
            for spec in self._specs
        }

    def run(
        self,
        input_ids: Array,
        label_weights: Array,
        lengths: Array,
        past: Buffers,
        present: Buffers,
    ) -> Array:
        """See `Runner.run`."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids))
        binding.bind_cpu_input("label_weights", np.ascontiguousarray(label_weights))
        binding.bind_cpu_input("lengths", lengths)
        for name in past:
            binding.bind_ortvalue_input(PAST + name, past[name])
            binding.bind_ortvalue_output(PRESENT + name, present[name])
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: Array = binding.get_outputs()[-1].numpy()
        return logits

    def read(self, buffers: Buffers) -> State:
        """See `Runner.read`."""
        return {name: value.numpy().copy() for name, value in buffers.items()}

    def write(self, buffers: Buffers, state: Mapping[str, Array]) -> None:
        """See `Runner.write`."""
        for name, value in buffers.items():
            value.update_inplace(np.ascontiguousarray(state[name]))


def _register(options: onnxruntime.SessionOptions, plugin: Path) -> None:
    try:
        options.register_custom_ops_library(str(plugin))
    except Exception as error:  # onnxruntime's own exceptions share no narrower base
        raise PluginError(
            f"ONNX Runtime cannot load plugin '{plugin}': {error}; leave it out with plugin='none'"
        ) from None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, silent about what is no error.

    Raises:
      MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "backend 'onnxruntime' needs ONNX Runtime; pip install 'fwl-export[cpu]'"
        ) from None
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime

"""What is known about an engine. It is written beside the engine, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fwl_export.bundle.onnx_file import op_inputs
from fwl_export.bundle.state import PAST
from fwl_export.errors import EngineError
from fwl_export.json_files import check_schema
from fwl_export.op.spec import DOMAIN, NAME

SCHEMA_VERSION = 1

FUNCTION_BODY = "function body"
PLUGIN = "plugin"

# Keys of the file that differ from the attributes' names.
_KEYS = {"variant": "flavour"}


@dataclass(frozen=True)
class TensorMetadata:
    """An input or output of a network.

    Attributes:
      name: The tensor's name in the ONNX file.
      shape: The sizes of its axes; -1 where the size is dynamic.
      dtype: numpy's name of its type, e.g. "float32".
    """

    name: str
    shape: Sequence[int]
    dtype: str


@dataclass(frozen=True)
class ProfileMetadata:
    """An optimization profile: the input sizes that an engine accepts, and is fastest at.

    Attributes:
      name: "decode" or "prefill". The profile's index is its place in the list of profiles.
      inputs: The "min", "opt" and "max" shape of every input, by the input's name.
    """

    name: str
    inputs: Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class NetworkMetadata:
    """What a build knows about the network that it compiled.

    Attributes:
      inputs: The input tensors, in the network's order.
      outputs: The output tensors, in the network's order.
      profiles: The optimization profiles, by their index.
      layers: Number of layers before the build; the built engine can be inspected only on a GPU.
      plugin_layers: How many of these layers are plugins.
      tf32: Whether products of float32 matrices may round their factors to TF32 (10 bits).
      build_seconds: Time that parser and builder took.
    """

    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]
    profiles: Sequence[ProfileMetadata]
    layers: int
    plugin_layers: int
    tf32: bool
    build_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkMetadata:
        """Read what `to_dict` returned."""
        return cls(**_typed(data))


@dataclass(frozen=True)
class EngineMetadata:
    """What is known about an engine.

    Attributes:
      name: The engine's file name without ".engine".
      variant: Name of the TensorRT variant that built it, "rtx" or "tensorrt"; "flavour" in the
        file.
      version: Version of the variant; only the same version runs the engine.
      sm: Compute capability that the engine was built for, without the dot.
      precision: Precision of the activations, "fp32" or "fp16"; sums are always float32.
      tf32: Whether products of float32 matrices may round their factors to TF32 (10 bits).
      inputs: The input tensors, in the network's order.
      outputs: The output tensors, in the network's order.
      profiles: The optimization profiles, by their index.
      layers: Number of layers of the network before the build; the built engine can be inspected
        only on a GPU.
      plugin_layers: How many of these layers are plugins.
      plugin_sha256: SHA-256 of the plugin library that the build used, or "". The library that is
        loaded where the engine runs may differ.
      plugin_embedded: Whether the engine carries that library.
      in_place_state: Whether the fast-weight updates write `present` over `past`. If so, the caller
        must bind both to one buffer.
      update_path: What computes the fast-weight updates: "plugin", or "function body" for standard
        operators.
      build_seconds: Time that parser and builder took.
      engine_bytes: Size of the engine file.
      sha256: SHA-256 of the engine file.
      model_id: Identity of the model, as in the bundle's manifest.
      versions: Versions of the tools that built the engine, by package.
      in_place_tensors: Names of the state tensors whose `present` overwrites `past`. None in files
        of earlier versions; `op_state_tensors` then finds them in the ONNX file.
    """

    name: str
    variant: str
    version: str
    sm: int
    precision: str
    tf32: bool
    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]
    profiles: Sequence[ProfileMetadata]
    layers: int
    plugin_layers: int
    plugin_sha256: str
    plugin_embedded: bool
    in_place_state: bool
    update_path: str
    build_seconds: float
    engine_bytes: int
    sha256: str
    model_id: str
    versions: Mapping[str, str]
    in_place_tensors: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        data = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Any, source: str) -> EngineMetadata:
        """Read what `to_dict` returned.

        Args:
          data: What the JSON file holds.
          source: Name of the file, for error messages.

        Raises:
          EngineError: The schema version is another one, or a part is missing or malformed.
        """
        remedy = "build the engine again with `fwl-export build`"
        check_schema(data, SCHEMA_VERSION, source, EngineError, remedy)
        try:
            known = {
                f.name: data[_KEYS.get(f.name, f.name)] for f in fields(cls) if f.default is MISSING
            }
            known["in_place_tensors"] = data.get("in_place_tensors")
            return cls(**_typed(known))
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"{source} is malformed ({type(error).__name__}: {error}); {remedy}"
            ) from None


def op_state_tensors(model: Path) -> list[str]:
    """Return the names of the state tensors that the op updates.

    Args:
      model: Path of the bundle's ONNX file.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    return [inputs[-1].removeprefix(PAST) for inputs in op_inputs(model, DOMAIN, NAME)]


def _typed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with its tensors and profiles as objects."""
    return {
        **data,
        "inputs": [TensorMetadata(**tensor) for tensor in data["inputs"]],
        "outputs": [TensorMetadata(**tensor) for tensor in data["outputs"]],
        "profiles": [ProfileMetadata(**profile) for profile in data["profiles"]],
    }

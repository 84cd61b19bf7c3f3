"""What is known about an engine. It is written beside the engine, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

from msgspec import Meta

from fwl_export.bundle.onnx_file import op_inputs
from fwl_export.bundle.state import PAST
from fwl_export.errors import EngineError
from fwl_export.json_files import Count, Finite, Name, check_schema, typed
from fwl_export.op.spec import DOMAIN, NAME

SCHEMA_VERSION = 1

FUNCTION_BODY = "function body"
PLUGIN = "plugin"

Axis = Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]

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

    name: Name
    shape: Sequence[Axis]
    dtype: Name


@dataclass(frozen=True)
class ProfileMetadata:
    """An optimization profile: the input sizes that an engine accepts, and is fastest at.

    Attributes:
      name: "decode" or "prefill". The profile's index is its place in the list of profiles.
      inputs: The "min", "opt" and "max" shape of every input, by the input's name.
    """

    name: Name
    inputs: Mapping[Name, Mapping[Name, Sequence[Count]]]


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
    layers: Count
    plugin_layers: Count
    tf32: bool
    build_seconds: Finite

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkMetadata:
        """Read what `to_dict` returned."""
        return typed(data, cls, "the worker's answer", EngineError)


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

    name: Name
    variant: Name
    version: Name
    sm: Count
    precision: Name
    tf32: bool
    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]
    profiles: Sequence[ProfileMetadata]
    layers: Count
    plugin_layers: Count
    plugin_sha256: Name
    plugin_embedded: bool
    in_place_state: bool
    update_path: Name
    build_seconds: Finite
    engine_bytes: Count
    sha256: Name
    model_id: Name
    versions: Mapping[Name, Name]
    in_place_tensors: Sequence[Name] | None = None

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
        values = typed(data, _stored(), f"{source} is malformed", EngineError, remedy)
        for profile in values["profiles"]:
            for name, shapes in profile.inputs.items():
                if missing := sorted({"min", "opt", "max"} - set(shapes)):
                    raise EngineError(
                        f"{source} is malformed: profile '{profile.name}' has no '{missing[0]}' of "
                        f"'{name}'; {remedy}"
                    )
        named = {key: name for name, key in _KEYS.items()}
        return cls(**{named.get(key, key): value for key, value in values.items()})


def _stored() -> Any:
    """Return the type of the file: the attributes of `EngineMetadata`, under the file's keys."""
    hints = get_type_hints(EngineMetadata, include_extras=True)
    keys = {_KEYS.get(name, name): hint for name, hint in hints.items()}
    keys["in_place_tensors"] = NotRequired[keys["in_place_tensors"]]
    return TypedDict("_Stored", keys)  # type: ignore[operator] # the keys are the attributes


def op_state_tensors(model: Path) -> list[str]:
    """Return the names of the state tensors that the op updates.

    Args:
      model: Path of the bundle's ONNX file.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    return [inputs[-1].removeprefix(PAST) for inputs in op_inputs(model, DOMAIN, NAME)]

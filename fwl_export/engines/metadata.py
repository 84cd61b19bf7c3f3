"""What is known about an engine, as written beside it."""

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
    """An input or output.

    Attributes:
      name: as in the ONNX file.
      shape: -1 where it is free.
      dtype: numpy's name, e.g. "float32".
    """

    name: str
    shape: Sequence[int]
    dtype: str


@dataclass(frozen=True)
class ProfileMetadata:
    """An optimisation profile.

    Attributes:
      name: "decode" or "prefill"; the profile's index is its place in the list.
      inputs: "min", "opt" and "max" shape of every input, by its name.
    """

    name: str
    inputs: Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class EngineMetadata:
    """An engine.

    Attributes:
      name: of its file, without ".engine".
      variant: "rtx" or "tensorrt".
      version: of the variant; an engine runs in this version.
      sm: compute capability that it was built for, without the dot.
      precision: of the activations, "fp32" or "fp16"; sums are float32 always.
      tf32: whether products of float32 matrices may round their factors to 10 bits.
      inputs: in the network's order.
      outputs: in the network's order.
      profiles: by their index.
      layers: of the network before the build. Without a GPU nothing can look into an engine.
      plugin_layers: how many of them are plugins.
      plugin_sha256: of the plugin library that the build used, or "". The library that is loaded
        where the engine runs may be another.
      plugin_embedded: whether the engine carries that library.
      in_place_state: whether the updates write `present` over `past`, so that both must be bound
        to one buffer.
      update_path: "plugin" if the fast-weight updates are computed by ours, "function body" if
        by standard operators.
      build_seconds: of parser and builder.
      engine_bytes: size of the file.
      sha256: of the file.
      model_id: of the bundle's manifest.
      versions: of the tools that built it.
      in_place_tensors: Names of the state tensors whose `present` overwrites `past`. None in files
        of earlier versions, where `op_state_tensors` tells them.
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
        """Read what `to_dict` wrote.

        Raises:
          EngineError: the schema is another one, or a part is missing or malformed.
        """
        check_schema(data, SCHEMA_VERSION, source, EngineError, "build the engine again")
        try:
            known = {
                f.name: data[_KEYS.get(f.name, f.name)] for f in fields(cls) if f.default is MISSING
            }
            known["in_place_tensors"] = data.get("in_place_tensors")
            for name in ("inputs", "outputs"):
                known[name] = [TensorMetadata(**tensor) for tensor in known[name]]
            known["profiles"] = [ProfileMetadata(**profile) for profile in known["profiles"]]
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"{source} is malformed ({type(error).__name__}: {error}); build the engine again"
            ) from None
        return cls(**known)


def op_state_tensors(model: Path) -> list[str]:
    """Return the names of the state tensors that the op updates.

    Args:
      model: Path of the bundle's ONNX file.

    Raises:
      BundleError: If the file is not an ONNX model.
    """
    return [inputs[-1].removeprefix(PAST) for inputs in op_inputs(model, DOMAIN, NAME)]

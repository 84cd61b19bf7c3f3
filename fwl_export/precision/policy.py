"""Precision of the exported model: one for the whole model, or one per matrix product.

`in_precision` converts a whole model. A `PrecisionPolicy` instead quantizes chosen parts of a
float32 model to a target type. With "fp16" and "bf16", a quantized part stores its weight and
computes its product in the target type; its inputs and outputs are cast on the way in and out. With
"int8w" (weights only), it stores its weight in int8 with one scale per output channel and computes
in float32. All else stays in float32: the excluded parts, the activations between parts, norms,
softmax, sums and the state.

The parts that can be quantized are the model's matrices, named by the path of their module or
parameter, and the fast-weight updates (`UPDATE`), which then take their queries, keys and values in
the target type.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from fwl_export.errors import ConfigError
from fwl_export.files import replaced_file
from fwl_export.json_files import Name, check_schema, read_json, typed
from fwl_export.model.language_model import FWLModel
from fwl_export.model.numerics import UpdateOp, linear, narrowed
from fwl_export.model.streaming import StreamingModel
from fwl_export.op.torch_op import linear_attention_update
from fwl_export.precision.int8 import Int8Weight, dequantize, quantize

# Names used on the command line, in manifests and in file names.
EXPORTED = ("fp32", "fp16")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}

SCHEMA_VERSION = 1
TARGETS = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8w": torch.int8}
UPDATE = "fast_weights.update"

# Keys of the file that differ from the attributes' names.
_QUANTIZED_KEY = "lowered"
_EXCLUDED_KEY = "kept"


@dataclass(frozen=True)
class PrecisionPolicy:
    """Which parts of a float32 model are quantized, and to which type.

    Attributes:
      target: The type of the quantized parts: "fp16", "bf16" or "int8w".
      quantized: Names of the parts in the target type; "lowered" in the file.
      excluded: Names of the parts that stay in float32; "kept" in the file. Together with
        `quantized` these are all parts of the model, see `parts`.
      measured: The measurements behind the choice, for people to read; the package ignores them.
    """

    target: str
    quantized: Sequence[str]
    excluded: Sequence[str]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The name of the precision in manifests: "int8w", or "mix16" for 16-bit products."""
        return "int8w" if self.target == "int8w" else "mix16"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            _EXCLUDED_KEY: list(self.excluded),
            _QUANTIZED_KEY: list(self.quantized),
            "measured": dict(self.measured),
        }

    def check(self, model: FWLModel) -> None:
        """Check that the policy names exactly the parts of a model.

        Raises:
          ConfigError: The policy names a part that the model lacks, or omits one that it has.
        """
        named, there = {*self.quantized, *self.excluded}, set(parts(model, self.target))
        if wrong := sorted(named ^ there):
            lacks = "the model has no part" if wrong[0] in named else "the policy lacks the part"
            raise ConfigError(
                f"the precision policy belongs to another model: {lacks} '{wrong[0]}'; make a "
                "policy for this model with `fwl-export precision`"
            )


def read_policy(path: Path, content: bytes | None = None) -> PrecisionPolicy:
    """Read a policy from its JSON file.

    Args:
      path: Path of the file.
      content: Content of the file, if it was read already.

    Raises:
      ConfigError: The file is not a policy, or has another schema version.
    """
    remedy = "make it again with `fwl-export precision`"
    data = read_json(path, ConfigError, remedy, content)
    check_schema(data, SCHEMA_VERSION, f"precision policy '{path}'", ConfigError, remedy)
    stored = typed(data, _Stored, f"precision policy '{path}'", ConfigError, remedy)
    excluded, quantized = stored["kept"], stored["lowered"]
    if both := sorted({*excluded} & {*quantized}):
        raise ConfigError(
            f"precision policy '{path}' lists '{both[0]}' in both '{_EXCLUDED_KEY}' and "
            f"'{_QUANTIZED_KEY}'; a part belongs in one of the two"
        )
    return PrecisionPolicy(stored["target"], quantized, excluded, stored.get("measured") or {})


class _Stored(TypedDict):
    """What `read_policy` reads of a policy's file; its keys are `_EXCLUDED_KEY` etc."""

    target: Literal["fp16", "bf16", "int8w"]
    kept: list[Name]
    lowered: list[Name]
    measured: NotRequired[dict[str, Any] | None]


def write_policy(path: Path, policy: PrecisionPolicy) -> None:
    """Write a policy to a JSON file; a crash leaves either the old file or the new one."""
    with replaced_file(path) as beside:
        beside.write_text(json.dumps(policy.to_dict(), indent=2) + "\n", encoding="utf-8")


class Part(NamedTuple):
    """A matrix of a model that can be quantized.

    Attributes:
      module: The module that holds the matrix.
      parameter: The matrix's name in the module. If it is "weight", the module has no submodules.
      channels: The axis of the output channels, 0 or 1; in int8, each channel has its own scale.
    """

    module: nn.Module
    parameter: str
    channels: int

    @property
    def weight(self) -> Tensor:
        """The matrix itself, [n, m] float32."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor


def parts(model: FWLModel, target: str) -> dict[str, Part | None]:
    """Return the parts that can be quantized, by name and in the model's order.

    Args:
      model: The float32 model.
      target: "fp16", "bf16" or "int8w"; in "int8w" the fast-weight updates are not a part, because
        they have no weights.

    Returns:
      The matrices, and None for `UPDATE`.
    """
    found: dict[str, Part | None] = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2:
            # Hugging Face's Conv1D is a dense layer that stores its weight transposed.
            found[name] = Part(module, "weight", int(type(module).__name__ == "Conv1D"))
    layer = model.fast_weights
    for name, channels in (("up_kernel", 1), ("down_kernel", 1), ("unembed", 0)):
        found[f"fast_weights.{name}"] = Part(layer, name, channels)
    if target != "int8w":
        found[UPDATE] = None
    return found


def in_precision(model: FWLModel, precision: str) -> FWLModel:
    """Return a copy of the model whose weights and activations have the given precision.

    In "fp32", the copy shares its weights with the model.

    Args:
      model: The float32 model.
      precision: "fp32", "fp16", or "fp64", which serves as a reference and is not exported.
    """
    dtype = PRECISIONS[precision]
    # Parameters are converted one by one, so that no second copy in float32 takes memory.
    converted = copy.deepcopy(model, {id(p): _in_type(p, dtype) for p in model.parameters()})
    converted.to(dtype)
    if dtype == torch.float16:
        # The layer reads its vectors in float32. In float16, a step size divided by a large
        # loss_normalizer would underflow, and a large bias would lose what tells it from others.
        original = dict(model.fast_weights.named_parameters())
        for name, parameter in converted.fast_weights.named_parameters():
            if parameter.ndim < 2:
                parameter.data = original[name].data.clone()
    return converted


def _in_type(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Return the parameter itself if it has the type, else a converted copy."""
    if parameter.dtype == dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)


def streaming_model(
    model: FWLModel,
    precision: str | PrecisionPolicy,
    max_tokens: int,
    update: UpdateOp = linear_attention_update,
) -> StreamingModel:
    """Return the streaming form of the model in a precision; the model itself stays as it is.

    Args:
      model: The float32 model.
      precision: A precision's name, see `in_precision`, or a policy.
      max_tokens: Largest number of tokens per call.
      update: The implementation of the fast-weight update.

    Raises:
      ConfigError: The policy belongs to another model.
    """
    if isinstance(precision, str):
        return StreamingModel(in_precision(model, precision), max_tokens, update)
    if UPDATE in precision.quantized:
        update = narrowed(update, TARGETS[precision.target])
    return StreamingModel(_quantized(model, precision), max_tokens, update)


def with_stored_weights(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    """Return a float32 copy of the model with the weights rounded as the policy stores them.

    Computed in float64, this copy shows the effect of rounding the weights alone.
    """
    rounded = _copy_for(model, policy)
    for part in _quantized_parts(rounded, policy):
        if policy.target == "int8w":
            part.weight.data = dequantize(*quantize(part.weight, part.channels), part.channels)
        else:
            part.weight.data = part.weight.to(TARGETS[policy.target]).float()
    return rounded


def int8_weights(model: FWLModel, policy: PrecisionPolicy) -> dict[str, Int8Weight]:
    """Return the quantized matrices of an "int8w" policy, by the names of the parts."""
    there = parts(model, policy.target)
    weights = {}
    for name in policy.quantized:
        if part := there[name]:
            values, scale = quantize(part.weight, part.channels)
            weights[name] = Int8Weight(values.numpy(), scale.numpy(), part.channels)
    return weights


def _quantized(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    if policy.target == "int8w":
        return with_stored_weights(model, policy)
    converted = _copy_for(model, policy)
    for part in _quantized_parts(converted, policy):
        part.weight.data = part.weight.to(TARGETS[policy.target])
        if isinstance(part.module, nn.Embedding):
            part.module.register_forward_hook(_cast_output)
        elif part.parameter == "weight":
            part.module.forward = _computed_in_half(part)
    return converted


def _copy_for(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    """Return a copy of the model that shares the excluded weights with the original."""
    policy.check(model)
    own = {id(part.weight) for part in _quantized_parts(model, policy)}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def _quantized_parts(model: FWLModel, policy: PrecisionPolicy) -> list[Part]:
    there = parts(model, policy.target)
    return [part for name in policy.quantized if (part := there[name]) is not None]


def _computed_in_half(part: Part) -> Callable[[Tensor], Tensor]:
    """Return the forward of a dense layer that computes in the dtype of its weight."""
    bias = getattr(part.module, "bias", None)

    def forward(x: Tensor) -> Tensor:
        weight = part.weight.T if part.channels else part.weight
        return linear(x, weight, bias)

    return forward


def _cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()

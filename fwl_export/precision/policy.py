"""Precision of the exported model: of all activations, or of chosen matrix products.

`in_precision` converts a whole model. A `PrecisionPolicy` lowers a float32 model product by
product: a lowered weight is stored in the target type, its product is computed in that type, and
what goes in and comes out is cast at its border. Activations between, norms, softmax, sums and
the state stay in float32. With the target "int8w" weights are stored as int8 with one scale per
output channel and computed with in float32.

Parts of a model that can be lowered are its matrices, by the path of their module or parameter,
and the fast-weight updates (`UPDATE`), whose queries, keys and values are then of the target type.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fwl_export.errors import ConfigError
from fwl_export.files import replaced_file
from fwl_export.json_files import check_schema, read_json
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import StreamingModel, UpdateOp
from fwl_export.op.torch_op import linear_attention_update
from fwl_export.precision.int8 import Int8Weight, dequantize, quantize

# Names used on the command line, in manifests and in file names.
EXPORTED = ("fp32", "fp16")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}

SCHEMA_VERSION = 1
TARGETS = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8w": torch.int8}
UPDATE = "fast_weights.update"


@dataclass(frozen=True)
class PrecisionPolicy:
    """Which parts of a float32 model are lowered to what.

    Attributes:
      target: "fp16", "bf16" or "int8w".
      lowered: parts in the target's type.
      kept: parts in float32; with `lowered` they are all parts of the model.
      measured: what the choice rests on, for people; nothing reads it.
    """

    target: str
    lowered: Sequence[str]
    kept: Sequence[str]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """Name for manifests: weight-only policies compute in float32, others mix types."""
        return "int8w" if self.target == "int8w" else "mix16"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "kept": list(self.kept),
            "lowered": list(self.lowered),
            "measured": dict(self.measured),
        }

    def check(self, model: FWLModel) -> None:
        """Check that the policy is for a model of these parts.

        Raises:
          ConfigError: it names a part the model lacks, or does not name one it has.
        """
        named, there = {*self.lowered, *self.kept}, set(parts(model, self.target))
        if wrong := sorted(named ^ there):
            lacks = "the model has no" if wrong[0] in named else "the policy does not name"
            raise ConfigError(
                f"the precision policy is of another model: {lacks} '{wrong[0]}'; make one with "
                "`fwl-export precision`"
            )


def read_policy(path: Path) -> PrecisionPolicy:
    """Read a policy's JSON file.

    Raises:
      ConfigError: it is no policy, or of another schema.
    """
    remedy = "make it again with `fwl-export precision`"
    data = read_json(path, ConfigError, remedy)
    check_schema(data, SCHEMA_VERSION, f"precision policy '{path}'", ConfigError, remedy)
    kept, lowered = (data.get(key) for key in ("kept", "lowered"))
    for key, names in (("kept", kept), ("lowered", lowered)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"precision policy '{path}': '{key}' must be a list of names")
    if both := sorted({*kept} & {*lowered}):
        raise ConfigError(f"precision policy '{path}' keeps and lowers '{both[0]}'")
    if data.get("target") not in TARGETS:
        raise ConfigError(
            f"precision policy '{path}': target is {data.get('target')!r}; expected "
            f"{' or '.join(TARGETS)}"
        )
    return PrecisionPolicy(data["target"], lowered, kept, data.get("measured") or {})


def write_policy(path: Path, policy: PrecisionPolicy) -> None:
    """Write a policy as JSON, beside and then renamed."""
    with replaced_file(path) as beside:
        beside.write_text(json.dumps(policy.to_dict(), indent=2) + "\n", encoding="utf-8")


class Part(NamedTuple):
    """A matrix of a model.

    Attributes:
      module: that holds it.
      parameter: its name there. "weight": the module is a leaf and is lowered with its bias.
      channels: the axis of its output channels: one int8 scale each.
    """

    module: nn.Module
    parameter: str
    channels: int

    @property
    def weight(self) -> Tensor:
        """The matrix, float32 [n, m]."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor


def parts(model: FWLModel, target: str) -> dict[str, Part | None]:
    """Return what can be lowered, by name in the model's order; None stands for `UPDATE`."""
    found: dict[str, Part | None] = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2:
            # Hugging Face's Conv1D is a dense layer with its weight the other way round.
            found[name] = Part(module, "weight", int(type(module).__name__ == "Conv1D"))
    layer = model.fast_weights
    for name, channels in (("up_kernel", 1), ("down_kernel", 1), ("unembed", 0)):
        found[f"fast_weights.{name}"] = Part(layer, name, channels)
    if target != "int8w":
        found[UPDATE] = None
    return found


def in_precision(model: FWLModel, precision: str) -> FWLModel:
    """Return a copy of the model with activations of the given precision.

    Args:
      model: float32.
      precision: "fp32", "fp16", or "fp64" (for checking; it is not exported).
    """
    dtype = PRECISIONS[precision]
    converted = copy.deepcopy(model).to(dtype)
    if dtype == torch.float16:
        # A step size over a large loss_normalizer would underflow; they are read in float32.
        original, layer = model.fast_weights, converted.fast_weights
        for name, step in original.steps.items():
            layer.steps[name].data = step.data.clone()
        if original.config.decay == "learned":
            layer.horizon.data = original.horizon.data.clone()
    return converted


def streaming_model(
    model: FWLModel,
    precision: str | PrecisionPolicy,
    max_tokens: int,
    update: UpdateOp = linear_attention_update,
) -> StreamingModel:
    """Return the streaming form of a copy of the model in a precision.

    Args:
      model: float32.
      precision: see `in_precision`, or a policy.
      max_tokens: largest T of a call.
      update: the op.

    Raises:
      ConfigError: the policy is of another model.
    """
    if isinstance(precision, str):
        return StreamingModel(in_precision(model, precision), max_tokens, update)
    if UPDATE in precision.lowered:
        update = _update_in(TARGETS[precision.target], update)
    return StreamingModel(_lowered(model, precision), max_tokens, update)


def with_stored_weights(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    """Return a float32 copy of the model whose weights are what the policy stores: rounded.

    This in float64 is what a model under the policy would compute without any rounding but that
    of its weights.
    """
    rounded = _copy_for(model, policy)
    for part in _lowered_parts(rounded, policy):
        if policy.target == "int8w":
            part.weight.data = dequantize(*quantize(part.weight, part.channels), part.channels)
        else:
            for parameter in _parameters(part):
                parameter.data = parameter.to(TARGETS[policy.target]).float()
    return rounded


def int8_weights(model: FWLModel, policy: PrecisionPolicy) -> dict[str, Int8Weight]:
    """Return the lowered matrices of a policy for int8 weights, by the names of the parts."""
    there = parts(model, policy.target)
    weights = {}
    for name in policy.lowered:
        if part := there[name]:
            values, scale = quantize(part.weight, part.channels)
            weights[name] = Int8Weight(values.numpy(), scale.numpy(), part.channels)
    return weights


def _lowered(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    if policy.target == "int8w":
        return with_stored_weights(model, policy)
    converted = _copy_for(model, policy)
    for part in _lowered_parts(converted, policy):
        for parameter in _parameters(part):
            parameter.data = parameter.to(TARGETS[policy.target])
        if part.parameter == "weight":
            part.module.register_forward_pre_hook(_cast_inputs)
            part.module.register_forward_hook(_cast_output)
    return converted


def _copy_for(model: FWLModel, policy: PrecisionPolicy) -> FWLModel:
    """Return a copy that shares the weights which the policy keeps."""
    policy.check(model)
    own = {id(p) for part in _lowered_parts(model, policy) for p in _parameters(part)}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def _lowered_parts(model: FWLModel, policy: PrecisionPolicy) -> list[Part]:
    there = parts(model, policy.target)
    return [part for name in policy.lowered if (part := there[name]) is not None]


def _parameters(part: Part) -> list[nn.Parameter]:
    if part.parameter == "weight":
        return list(part.module.parameters(recurse=False))
    return [getattr(part.module, part.parameter)]


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


def _update_in(dtype: torch.dtype, update: UpdateOp) -> UpdateOp:
    """Return the op with query, key and value cast to a type, and its output to float32."""

    def lowered(
        query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
        output, present_state = update(q, k, v, decay, past_state)
        return output.float(), present_state

    return lowered

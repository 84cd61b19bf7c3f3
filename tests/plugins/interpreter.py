"""Run the GPU kernels on the CPU, in Triton's interpreter, in a process of its own.

TRITON_INTERPRET selects the interpreter when triton is first imported, and from then on the process
can compile no kernel.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plugins.kernels.gpu.plan import plan

Array = npt.NDArray[np.generic]


@contextlib.contextmanager
def interpreter() -> Iterator[Executor]:
    """Yield an executor whose process can execute `run`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start) as executor:
        yield executor


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter as triton_interpreter

    # The interpreter stores bfloat16 as integers and multiplies these, and it truncates where GPUs
    # round.
    plain_dot = triton_interpreter.InterpreterBuilder.create_dot
    plain_convert = triton_interpreter._convert_float

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        import triton.language as tl

        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return plain_dot(self, a, b, *rest)

    def convert_float(data: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return plain_convert(data, source, target, rounding)

    triton_interpreter.InterpreterBuilder.create_dot = create_dot
    triton_interpreter._convert_float = convert_float


def run(
    inputs: dict[str, Array], dtype: str, sm: int, in_place: bool = False, **options: Any
) -> tuple[Array, Array, list[str]]:
    """Run the op with the plan for a compute capability. Outputs and workspace start as NaN.

    Args:
      inputs: Inputs of the op in float32. Query, key and value are rounded to `dtype` here.
      dtype: Type of the activations.
      sm: Compute capability whose plan is run.
      in_place: Whether past_state and present_state are the same memory.
      options: Further arguments of `plan`.

    Returns:
      The output in float64, present_state in float32, and the names of the variants that ran.
    """
    from plugins.kernels.gpu.launch import launch

    tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    for name in ("query", "key", "value"):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    batch, length, size_k = tensors["query"].shape
    size_v = tensors["value"].shape[2]
    steps = plan(batch, length, size_k, size_v, dtype, sm, **options)
    nan = float("nan")
    tensors["output"] = torch.full_like(tensors["value"], nan, dtype=torch.float32)
    tensors["present_state"] = (
        tensors["past_state"] if in_place else torch.full_like(tensors["past_state"], nan)
    )
    tensors["workspace"] = torch.full((steps.workspace,), nan)
    launch(steps, tensors)
    names = [step.variant.name for step in steps.launches]
    return tensors["output"].double().numpy(), tensors["present_state"].numpy(), names

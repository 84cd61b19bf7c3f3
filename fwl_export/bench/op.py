"""Measure the op's implementations against each other and against what the machine can do.

The implementations, all in float32, with a decay of 0.97 where there is one:

- `ours`: the custom op in ONNX Runtime. `one`: past and present state share one buffer; `two`: they
  have a buffer each.
- `microsoft linear`, `microsoft gated`: ONNX Runtime's own com.microsoft.LinearAttention, without
  and with decay, on one buffer and on two.
- `onnx linear`, `onnx gated`: LinearAttention of ONNX opset 27, as ONNX Runtime runs it.
- `body`: the op's function body, in standard operators of opset 20, in ONNX Runtime.
- `torch`, `torch compiled`: the op in PyTorch, eager and with torch.compile.
- `numpy`: a loop over the tokens.
- `limit`: the least time the machine needs. Decode (T = 1): reading and writing a buffer of the
  state's size, with warm or cold caches as for the others. Prefill: a float32 matrix product in
  PyTorch, [T, 2 Dk] by [2 Dk, Dv], with as many operations as the call needs, 4 T Dk Dv.

Each round runs all of them once, in a random order, so that disturbances on the machine affect all
of them alike. A time is the median over the rounds; the fastest round is given too, for machines
that are not quiet. A ratio is the median of the ratios within the rounds, so that a slow minute
does not change one side only. An implementation that takes longer than a quarter of the time
budget is timed once.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from fwl_export.bundle.state import Array
from fwl_export.op import spec
from fwl_export.op.onnx_function import append_function
from fwl_export.op.torch_op import linear_attention_update, run_chunked
from fwl_export.ort import import_onnxruntime, register_plugin

if TYPE_CHECKING:
    import onnxruntime

Run = Callable[[], object]
Make = Callable[[], Run]

OURS = ("ours, one", "ours, two")
LIMIT = "limit"

_RULES = ("linear", "gated")

_OPSET = 20
_STANDARD_OPSET = 27  # the first with LinearAttention
_DECAY = 0.97
_COLD_BYTES = 256 << 20
REST_SECONDS = 0.02


@dataclass(frozen=True)
class OpSize:
    """Size of one call of the op.

    Attributes:
      batch: Number of rows, B.
      tokens: Number of tokens, T.
      key_size: Size of a key, Dk.
      value_size: Size of a value, Dv.
      threads: Threads of each implementation.
    """

    batch: int
    tokens: int
    key_size: int
    value_size: int
    threads: int


@dataclass(frozen=True)
class OpTimes:
    """Times of the implementations.

    Attributes:
      size: Size of the call.
      cold: Whether the caches were flushed before each run.
      median: Median time over the rounds in milliseconds, by implementation.
      fastest: Fastest round in milliseconds, by implementation.
      ratios: For each of `OURS`: time of each implementation divided by its time, as the median
        over the rounds.
      missing: Why an implementation cannot run here, by its name.
    """

    size: OpSize
    cold: bool
    median: dict[str, float]
    fastest: dict[str, float]
    ratios: dict[str, dict[str, float]]
    missing: dict[str, str]


def bench_op(
    size: OpSize,
    library: Path | None,
    rounds: int = 30,
    budget: float = 20.0,
    cold: bool = False,
    compiled: bool = True,
) -> OpTimes:
    """Measure all implementations of the op on one size.

    Args:
      size: Size of the call.
      library: Path of libfwl_ort, or None to leave out `ours`.
      rounds: Largest number of rounds.
      budget: Approximate time to spend, in seconds.
      cold: Whether to flush the caches before each run.
      compiled: Whether to include torch.compile, which takes 10 to 30 seconds to compile.

    Raises:
      MissingDependencyError: ONNX Runtime is not installed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(size.threads)
    try:
        with torch.inference_mode():
            runs, missing = _runs(library, size, compiled)
            seconds = _measure(runs, rounds, budget, cold)
    finally:
        torch.set_num_threads(before)
    return OpTimes(
        size,
        cold,
        _milliseconds(seconds, statistics.median),
        _milliseconds(seconds, min),
        {name: _ratios(seconds, name) for name in OURS if name in seconds},
        missing,
    )


Arrays = dict[str, Array]


def _runs(
    library: Path | None, size: OpSize, compiled: bool
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the implementations by name, and why the others cannot run here, by name."""
    arrays = _arrays(size)
    makers: dict[str, Make] = {
        **_onnx_makers(library, size, arrays),
        **_torch_makers(arrays, compiled),
        "numpy": lambda: lambda: _numpy_loop(arrays),
        LIMIT: lambda: _limit(size),
    }
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
        except Exception as error:  # older runtimes lack operators; torch.compile lacks compilers
            missing[name] = " ".join(str(error).split())[:120]
        else:
            runs[name] = run
    return runs, missing


def _arrays(size: OpSize) -> Arrays:
    """Return the op's inputs by name."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32) * np.float32(0.1)

    return {
        "query": normal(size.batch, size.tokens, size.key_size),
        "key": normal(size.batch, size.tokens, size.key_size),
        "value": normal(size.batch, size.tokens, size.value_size),
        "decay": np.full((size.batch, size.tokens), _DECAY, np.float32),
        "past_state": _aligned(normal(size.batch, size.key_size, size.value_size)),
    }


def _onnx_makers(library: Path | None, size: OpSize, arrays: Arrays) -> dict[str, Make]:
    """Return what loads each implementation that runs in ONNX Runtime, by name."""
    peer = {
        **arrays,
        "decay": np.full((size.batch, size.tokens, 1), math.log(_DECAY), np.float32),
        "past_state": arrays["past_state"].reshape(size.batch, 1, size.key_size, size.value_size),
    }
    makers: dict[str, Make] = {}
    for buffers in ("one", "two"):
        if library is not None:
            arguments = (arrays, buffers, size.threads, library)
            makers[f"ours, {buffers}"] = partial(_bound, _node_model(), *arguments)
        for rule in _RULES:
            model = _peer_model(rule)
            makers[f"microsoft {rule}, {buffers}"] = partial(
                _bound, model, peer, buffers, size.threads
            )
    for rule in _RULES:
        model = _peer_model(rule, standard=True)
        makers[f"onnx {rule}"] = partial(_bound, model, peer, "two", size.threads)
    makers["body"] = lambda: _bound(_node_model(with_body=True), arrays, "two", size.threads)
    return makers


def _torch_makers(arrays: Arrays, compiled: bool) -> dict[str, Make]:
    """Return what prepares each implementation in PyTorch, by name."""
    tensors = [torch.from_numpy(arrays[a.name]) for a in spec.INPUTS]

    def compiled_op() -> Run:
        torch.compiler.reset()
        function = torch.compile(run_chunked, dynamic=False)
        return lambda: function(*tensors)

    makers: dict[str, Make] = {"torch": lambda: lambda: linear_attention_update(*tensors)}
    return makers | ({"torch compiled": compiled_op} if compiled else {})


def _limit(size: OpSize) -> Run:
    """Return what the machine can do at best, see the top of the file."""
    if size.tokens == 1:
        memory = torch.zeros(size.batch * size.key_size * size.value_size)
        return lambda: memory.mul_(1.0)
    a = torch.randn(size.batch, size.tokens, 2 * size.key_size)
    b = torch.randn(2 * size.key_size, size.value_size)
    product = torch.empty(size.batch, size.tokens, size.value_size)
    return lambda: torch.matmul(a, b, out=product)


def _numpy_loop(arrays: Arrays) -> tuple[Array, Array]:
    state = arrays["past_state"].copy()
    output = np.empty_like(arrays["value"])
    for t in range(output.shape[1]):
        query, key, value = (arrays[name][:, t] for name in ("query", "key", "value"))
        state *= arrays["decay"][:, t, None, None]
        state += key[:, :, None] * value[:, None, :]
        output[:, t] = (query[:, None] @ state)[:, 0]
    return output, state


def _measure(
    runs: dict[str, Run], rounds: int, budget: float, cold: bool
) -> dict[str, list[float]]:
    """Return the times of each implementation over the rounds, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
        if elapsed > budget / 4 > 0:
            times[name].append(elapsed)
        repeats[name] = 1 if cold else max(1, min(200, int(5e-3 / max(elapsed, 1e-6))))
    flush = np.zeros(_COLD_BYTES // 4, np.float32) if cold else None
    order = [name for name in runs if not times[name]]
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + budget
    for done in range(rounds):
        shuffle(order)
        for name in order:
            # Warm up until the idle threads of the previous implementation no longer spin on the
            # cores, and its data has left the caches.
            rested = time.perf_counter() + REST_SECONDS
            while time.perf_counter() < rested:
                runs[name]()
            if flush is not None:
                flush += 1
            start = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
        if done >= 2 and time.perf_counter() > end:
            break
    return times


def _bound(
    model: onnx.ModelProto,
    arrays: Arrays,
    buffers: str,
    threads: int,
    library: Path | None = None,
) -> Run:
    """Load a model in ONNX Runtime and bind all its inputs and outputs.

    Args:
      model: Model to run.
      arrays: Its inputs by name.
      buffers: "one" if past and present state share a buffer, else "two".
      threads: Threads inside one operator.
      library: Custom-op library to register, or None.
    """
    ort = import_onnxruntime()
    options: onnxruntime.SessionOptions = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        register_plugin(options, library)
    session = ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,
    )
    output = np.zeros_like(arrays["value"])
    past = _aligned(arrays["past_state"])
    present = past if buffers == "one" else _aligned(past)
    binding = session.io_binding()
    held = {**arrays, "past_state": past, "output": output, "present_state": present}
    for value in session.get_inputs():
        array = held[value.name]
        binding.bind_input(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for value in session.get_outputs():
        array = held[value.name]
        binding.bind_output(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(_keep: object = held) -> None:
        session.run_with_iobinding(binding)

    return run


def _aligned(array: Array) -> Array:
    """Return a copy aligned to a memory page, about as a runtime's own buffers are."""
    memory = np.empty(array.nbytes + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _node_model(with_body: bool = False) -> onnx.ModelProto:
    def value(argument: spec.Argument) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(argument.name, TensorProto.FLOAT, argument.shape)

    node = helper.make_node(
        spec.NAME,
        [a.name for a in spec.INPUTS],
        [a.name for a in spec.OUTPUTS],
        domain=spec.DOMAIN,
        **spec.NODE_ATTRIBUTES,
    )
    model = _model([node], [value(a) for a in spec.INPUTS], [value(a) for a in spec.OUTPUTS])
    if with_body:
        append_function(model)
    return model


def _peer_model(rule: str, standard: bool = False) -> onnx.ModelProto:
    def value(name: str, rank: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)]
        )

    names = ["query", "key", "value", "past_state"] + (["decay"] if rule == "gated" else [])
    node = helper.make_node(
        "LinearAttention",
        names,
        ["output", "present_state"],
        domain="" if standard else "com.microsoft",
        q_num_heads=1,
        kv_num_heads=1,
        update_rule=rule,
        scale=1.0,
    )
    inputs = [value(name, 4 if name == "past_state" else 3) for name in names]
    outputs = [value("output", 3), value("present_state", 4)]
    return _model([node], inputs, outputs, _STANDARD_OPSET if standard else _OPSET)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    opset: int = _OPSET,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "bench", inputs, outputs)
    opsets = [
        helper.make_opsetid("", opset),
        helper.make_opsetid(spec.DOMAIN, spec.VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _milliseconds(
    seconds: dict[str, list[float]], choose: Callable[[list[float]], float]
) -> dict[str, float]:
    return {name: round(choose(values) * 1e3, 4) for name, values in seconds.items()}


def _ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Return the time of each implementation divided by that of `base`.

    Args:
      seconds: Times by implementation. Equal places from the end belong to the same round; a single
        time belongs to none.
      base: Name of the implementation to divide by.
    """
    found = {}
    for name, values in seconds.items():
        rounds = min(len(values), len(seconds[base]))
        pairs = zip(values[-rounds:], seconds[base][-rounds:], strict=True)
        found[name] = round(
            statistics.median(value / other for value, other in pairs)
            if rounds > 1
            else statistics.median(values) / statistics.median(seconds[base]),
            4,
        )
    return found

"""Measure the op's implementations against each other and against what the machine can do.

    python tools/bench_op.py                        # the sizes and lengths of the targets
    python tools/bench_op.py --sizes 1024x4096 --tokens 1,256 --threads 1,2 --rounds 20

What is compared, all float32, with a decay of 0.97 where there is one:

- `ours`: the custom op in ONNX Runtime; `one` with past and present state on one buffer, `two`
  on two buffers;
- `microsoft linear`, `microsoft gated`: ONNX Runtime's own com.microsoft.LinearAttention, without
  and with decay, on one buffer and on two;
- `body`: the op's function body in ONNX Runtime;
- `torch`: the op in PyTorch;
- `limit`: decode, the time to read and write a buffer of the state's size, which is warm or cold
  as the state is; prefill, a float32 matrix product with the useful operations of the call,
  4 T Dk Dv, as T x 2 Dk by 2 Dk x Dv in PyTorch.

One round runs all of them once, in a random order; a figure is the median over the rounds, so that
whatever else the machine does meets all alike. The fastest round stands beside it, for machines
that are not quiet. The other columns are ratios to `ours` on one buffer and on two. Prints a table
per size, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from fwl_export.op import spec
from fwl_export.op.onnx_function import append_function
from fwl_export.op.torch_op import linear_attention_update
from fwl_export.runtimes.plugins import ONNXRUNTIME, find_plugin

_OPSET = 20
_DECAY = 0.97
_COLD_BYTES = 256 << 20
_REST_SECONDS = 0.02

Run = Callable[[], object]


def main() -> int:
    """Run the benchmark that the command line describes."""
    arguments = _parser().parse_args()
    library = find_plugin(ONNXRUNTIME, arguments.plugin)
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for size_k, size_v in arguments.sizes:
            for batch in arguments.batch:
                for tokens in arguments.tokens:
                    runs = _runs(library, (batch, tokens, size_k, size_v), threads)
                    seconds = _measure(runs, arguments.rounds, arguments.budget, arguments.cold)
                    result = {
                        "batch": batch,
                        "tokens": tokens,
                        "key_size": size_k,
                        "value_size": size_v,
                        "threads": threads,
                        "cold": arguments.cold,
                        "milliseconds": _rounded(seconds, statistics.median),
                        "fastest_milliseconds": _rounded(seconds, min),
                    }
                    results.append(result)
                    _print(result)
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "system": platform.platform(),
    }
    print(json.dumps({"machine": machine, "rounds": arguments.rounds, "results": results}))
    return 0


def _parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def sizes(text: str) -> list[tuple[int, int]]:
        pairs = (part.split("x") for part in text.split(","))
        return [(int(key), int(value)) for key, value in pairs]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=sizes, default=[(768, 3072), (1024, 4096)], help="DkxDv")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--threads", type=numbers, default=[2])
    parser.add_argument("--rounds", type=int, default=30, help="the most of a size")
    parser.add_argument("--budget", type=float, default=20, help="seconds for a size, about")
    parser.add_argument("--cold", action="store_true", help="flush caches before every run")
    parser.add_argument("--plugin", default="required", help="path of libfwl_ort")
    return parser


def _runs(library: Path | None, sizes: tuple[int, int, int, int], threads: int) -> dict[str, Run]:
    """Return what is compared, by name."""
    batch, tokens, size_k, size_v = sizes
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.1)

    arrays = {
        "query": normal(batch, tokens, size_k),
        "key": normal(batch, tokens, size_k),
        "value": normal(batch, tokens, size_v),
        "decay": np.full((batch, tokens), _DECAY, np.float32),
        "past_state": _aligned(normal(batch, size_k, size_v)),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    ours, body = _node_model(), _node_model(with_body=True)
    state = (batch, 1, size_k, size_v)
    peer = {
        **arrays,
        "decay": np.full((batch, tokens, 1), math.log(_DECAY), np.float32),
        "past_state": arrays["past_state"].reshape(state),
    }
    runs: dict[str, Run] = {}
    for buffers in ("one", "two"):
        runs[f"ours, {buffers}"] = _bound(ours, arrays, buffers, threads, library)
        for rule in ("linear", "gated"):
            try:
                runs[f"microsoft {rule}, {buffers}"] = _bound(
                    _peer_model(rule), peer, buffers, threads
                )
            except Exception as error:  # older runtimes have no such operator
                print(f"microsoft {rule}: {str(error)[:200]}", file=sys.stderr)
    runs["body"] = _bound(body, arrays, "two", threads)
    tensors = [torch.from_numpy(arrays[a.name]) for a in spec.INPUTS]
    assert shapes["query"] == tuple(tensors[0].shape)
    runs["torch"] = lambda: linear_attention_update(*tensors)
    if tokens == 1:
        memory = torch.zeros(batch * size_k * size_v)
        runs["limit"] = lambda: memory.mul_(1.0)
    else:
        a, b = torch.randn(batch, tokens, 2 * size_k), torch.randn(2 * size_k, size_v)
        product = torch.empty(batch, tokens, size_v)
        runs["limit"] = lambda: torch.matmul(a, b, out=product)
    return runs


def _measure(
    runs: dict[str, Run], rounds: int, budget: float, cold: bool
) -> dict[str, list[float]]:
    """Return the times of each, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
        repeats[name] = 1 if cold else max(1, min(200, int(5e-3 / max(elapsed, 1e-6))))
    flush = np.zeros(_COLD_BYTES // 4, np.float32) if cold else None
    order = list(runs)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + budget
    for done in range(rounds):
        shuffle(order)
        for name in order:
            # Until the threads of the one before have stopped waiting for work on a core that this
            # one needs, and what it left in the caches is gone.
            rested = time.perf_counter() + _REST_SECONDS
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
    arrays: dict[str, np.ndarray],
    buffers: str,
    threads: int,
    library: Path | None = None,
) -> Run:
    """Return a run of a model with all inputs and outputs in place beforehand."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
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


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that starts a page, as what a runtime allocates about does."""
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
        append_function(model, "float32")
    return model


def _peer_model(rule: str) -> onnx.ModelProto:
    def value(name: str, rank: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)]
        )

    names = ["query", "key", "value", "past_state"] + (["decay"] if rule == "gated" else [])
    node = helper.make_node(
        "LinearAttention",
        names,
        ["output", "present_state"],
        domain="com.microsoft",
        q_num_heads=1,
        kv_num_heads=1,
        update_rule=rule,
        scale=1.0,
    )
    inputs = [value(name, 4 if name == "past_state" else 3) for name in names]
    return _model([node], inputs, [value("output", 3), value("present_state", 4)])


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "bench", inputs, outputs)
    opsets = [
        helper.make_opsetid("", _OPSET),
        helper.make_opsetid(spec.DOMAIN, spec.VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _rounded(
    seconds: dict[str, list[float]], choose: Callable[[list[float]], float]
) -> dict[str, float]:
    return {name: round(choose(values) * 1e3, 4) for name, values in seconds.items()}


def _print(result: dict[str, Any]) -> None:
    times = result["milliseconds"]
    sizes = f"B {result['batch']}, T {result['tokens']}, "
    sizes += f"S {result['key_size']}x{result['value_size']}, {result['threads']} threads"
    print(sizes + (", cold" if result["cold"] else ""))
    fastest = result["fastest_milliseconds"]
    for name, milliseconds in times.items():
        against = "  ".join(
            f"{milliseconds / times[ours]:6.2f}" for ours in ("ours, one", "ours, two")
        )
        print(f"  {name:24} {milliseconds:10.3f} ms  {against}  (fastest {fastest[name]:.3f} ms)")
    print(flush=True)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())

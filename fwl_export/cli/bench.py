"""`fwl-export bench`: compare implementations with each other and with the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.cli.commands import add_verb, new_application
from fwl_export.cli.options import BundleArgument, JsonOption, PluginOption
from fwl_export.cli.terminal import note, print_json, spinner, table

if TYPE_CHECKING:
    from fwl_export.bench.op import OpSize, OpTimes
    from fwl_export.bench.session import SessionMemory, SessionTimes

bench = new_application(name="bench", help="Measure the op, or whole sessions, on this CPU.")


def bench_op_command(
    sizes: Annotated[
        str, typer.Option(metavar="LIST", help="State sizes, DkxDv.")
    ] = "768x3072,1024x4096",
    tokens: Annotated[str, typer.Option(metavar="LIST", help="Tokens per call.")] = "1,64,256,1024",
    batch: Annotated[str, typer.Option(metavar="LIST", help="Rows per call.")] = "1",
    threads: Annotated[
        str, typer.Option(metavar="LIST", help="Threads of each implementation.")
    ] = "2",
    rounds: Annotated[int, typer.Option(help="Largest number of rounds per size.", min=1)] = 30,
    budget: Annotated[
        float, typer.Option(help="Approximate time per size, in seconds.", min=0)
    ] = 20.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="Flush the CPU's caches before every run.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--no-compiled", help="Measure torch.compile too, which is slow to start."
        ),
    ] = True,
    plugin: PluginOption = "auto",
    json: JsonOption = False,
) -> None:
    """Compare implementations of the fast-weight update.

    Measures in turns our kernel, the LinearAttention operators of ONNX Runtime and of the ONNX
    standard, the op's function body, PyTorch and NumPy; and the limits of this machine: memory
    bandwidth for decode, a matrix product for prefill. Lists are separated by commas; every
    combination of their values is measured. The last line printed is JSON.

    Example:
      fwl-export bench op --sizes 1024x4096 --tokens 1,256 --threads 2
    """
    from dataclasses import asdict

    from fwl_export.bench.op import bench_op
    from fwl_export.machine import describe_machine
    from fwl_export.plugins import ONNXRUNTIME, find_plugin

    library = find_plugin(ONNXRUNTIME, plugin)
    calls = _calls(sizes, tokens, batch, threads)
    results = []
    with spinner("bench") as say:
        for number, call in enumerate(calls):
            say(f"size {number + 1} of {len(calls)}: {_title(call)}")
            result = bench_op(call, library, rounds, budget, cold, compiled)
            results.append(asdict(result))
            if not json:
                print(_report(result), flush=True)
    if library is None and not json:
        note("Measured without our kernel: `fwl-export doctor` says how to build it.")
    found = {"machine": describe_machine(), "rounds": rounds, "results": results}
    print_json(found, indent=None)


def bench_session_command(
    bundle: BundleArgument,
    tokens: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens per call, separated by commas.")
    ] = "1,64,256",
    batch: Annotated[
        str, typer.Option(metavar="LIST", help="Rows per call, separated by commas.")
    ] = "1,8",
    threads: Annotated[int, typer.Option(help="Threads inside one operator.", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds per size.", min=2)] = 40,
    plugin: PluginOption = "auto",
    libfwl: Annotated[
        Path | None,
        typer.Option(
            help="Path of libfwl.so, to measure the C library too.", show_default="not measured"
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare sessions with bare ONNX Runtime.

    Prints the median latency of a call, its 99th percentile, tokens per second, and the memory of
    a session relative to the size of its state. The last line is JSON.

    Example:
      fwl-export bench session demo-bundle --tokens 1 --batch 1
    """
    from dataclasses import asdict

    from fwl_export.bench.session import bench_session, session_memory
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.machine import describe_machine

    opened = read_bundle(bundle)
    rows_and_tokens = _rows_and_tokens(batch, tokens, opened.manifest.max_tokens)
    results = []
    with spinner("bench") as say:
        say("memory of a session")
        memory = session_memory(opened, plugin)
        if not json:
            print(_memory(memory))
        for rows, size in rows_and_tokens:
            title = f"rows {rows}, tokens per call {size}, threads {threads}"
            say(title)
            result = bench_session(opened, size, rows, threads, plugin, rounds, libfwl)
            results.append(asdict(result))
            if not json:
                print(f"{title}\n{_session_table(result)}\n", flush=True)
    found = {"machine": describe_machine(), "results": results, "memory": asdict(memory)}
    print_json(found, indent=None)


add_verb(bench, bench_op_command, "op")
add_verb(bench, bench_session_command, "session")


def _calls(sizes: str, tokens: str, batch: str, threads: str) -> list[OpSize]:
    from fwl_export.bench.op import OpSize

    return [
        OpSize(rows, length, key_size, value_size, count)
        for count in _numbers("--threads", threads)
        for key_size, value_size in _sizes(sizes)
        for rows in _numbers("--batch", batch)
        for length in _numbers("--tokens", tokens)
    ]


def _rows_and_tokens(batch: str, tokens: str, largest: int) -> list[tuple[int, int]]:
    sizes = _numbers("--tokens", tokens)
    if any(size > largest or largest % size for size in sizes):
        raise typer.BadParameter(
            f"--tokens is '{tokens}'; expected divisors of {largest}, the bundle's largest call"
        )
    return [(rows, size) for rows in _numbers("--batch", batch) for size in sizes]


def _memory(memory: SessionMemory) -> str:
    return (
        f"memory of a session: {memory.measured / 1e6:.2f} MB, "
        f"{memory.measured / memory.state:.3f} times the {memory.state / 1e6:.2f} MB of\n"
        "the two copies of its state that a call reads and writes\n"
    )


def _session_table(result: SessionTimes) -> str:
    rows = [
        [
            name,
            f"{result.p50[name]:.3f}",
            f"{result.p99[name]:.3f}",
            f"{result.ratio[name]:.3f}",
            f"{result.tokens_per_second[name]:.0f}",
        ]
        for name in result.p50
    ]
    return table(["", "p50 ms", "p99 ms", "/ raw", "tokens/s"], rows)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{option} is '{text}'; expected whole numbers of 1 or more, separated by commas"
        )
    return [int(part) for part in parts]


def _sizes(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("x") for part in text.split(",")]
    if not all(len(p) == 2 and all(n.strip().isdecimal() and int(n) > 0 for n in p) for p in pairs):
        raise typer.BadParameter(f"--sizes is '{text}'; expected sizes such as 768x3072,1024x4096")
    return [(int(key_size), int(value_size)) for key_size, value_size in pairs]


def _title(size: OpSize) -> str:
    threads = f"{size.threads} thread{'s' if size.threads > 1 else ''}"
    return f"B {size.batch}, T {size.tokens}, S {size.key_size}x{size.value_size}, {threads}"


def _report(result: OpTimes) -> str:
    """Return the table of one size: times, and their ratios to those of our kernel."""
    header = ["implementation", "median ms", "fastest ms"]
    header += [f"/ {name}" for name in result.ratios]
    rows = []
    for name, milliseconds in result.median.items():
        ratios = [f"{of[name]:.2f}" for of in result.ratios.values()]
        rows.append([name, f"{milliseconds:.3f}", f"{result.fastest[name]:.3f}", *ratios])
    lines = [_title(result.size) + (", cold" if result.cold else ""), table(header, rows)]
    lines += [f"{name}: cannot run here: {why[:50]}" for name, why in result.missing.items()]
    return "\n".join(lines) + "\n"

"""Report what the GPU kernels use and what should limit them: a model, not a measurement.

python -m tools.kernel_report build/gpu_kernels

Needs no GPU. Prints two tables and one JSON line. The first has registers, spills, shared memory
and theoretical occupancy of every variant in a folder that tools/compile_kernels.py wrote. The
second has, for a few shapes, the bytes and FLOPs of a call and the least time that each limit of
an H100 and an RTX 4090 allows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plugins.kernels.gpu.compile import MANIFEST
from plugins.kernels.gpu.plan import Launch, Plan, plan


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, compute capabilities).

    Attributes:
      warps: Most warps that are resident at once.
      programs: Most thread blocks that are resident at once.
      shared: Shared memory in bytes.
      reserved: Bytes of shared memory that the driver takes per thread block.
    """

    warps: int
    programs: int
    shared: int
    reserved: int


# All have 65536 registers, allocated per warp in units of 256, for four warps at a time.
MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10, 0),
    80: Multiprocessor(64, 32, 164 << 10, 1 << 10),
    86: Multiprocessor(48, 16, 100 << 10, 1 << 10),
    89: Multiprocessor(48, 24, 100 << 10, 1 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 1 << 10),
    100: Multiprocessor(64, 32, 228 << 10, 1 << 10),
    120: Multiprocessor(48, 24, 100 << 10, 1 << 10),
}


@dataclass(frozen=True)
class Gpu:
    """Peak figures from a data sheet: dense, with float32 accumulation.

    Attributes:
      name: Name of the product.
      sm: Compute capability, such as 90.
      bandwidth: Memory bandwidth in bytes per second.
      cache: Size of the second-level cache in bytes.
      rates: FLOP per second by unit: "fp32" for ordinary cores, "tf32" and "half" for tensor cores.
    """

    name: str
    sm: int
    bandwidth: float
    cache: int
    rates: dict[str, float]


GPUS = (
    Gpu("H100 SXM", 90, 3.35e12, 50 << 20, {"fp32": 67e12, "tf32": 494e12, "half": 989e12}),
    Gpu("RTX 4090", 89, 1.008e12, 72 << 20, {"fp32": 82.6e12, "tf32": 82.6e12, "half": 165.2e12}),
)

# Time of a kernel that does nothing: launch, start and drain.
LAUNCH_SECONDS = 3e-6

# B, T, Dk, Dv, type
SHAPES = (
    (1, 1, 768, 3072, "float16"),
    (8, 1, 768, 3072, "float16"),
    (64, 1, 768, 3072, "float16"),
    (1, 1, 1024, 4096, "float32"),
    (1, 16, 768, 3072, "float16"),
    (1, 256, 768, 3072, "float16"),
    (1, 1024, 768, 3072, "float16"),
    (8, 1024, 768, 3072, "bfloat16"),
    (1, 1024, 768, 3072, "float32"),
)


def occupancy(entry: dict[str, Any]) -> tuple[int, float, str]:
    """Return the programs on one multiprocessor, their share of its warps, and what limits them.

    Args:
      entry: Manifest entry of a variant.
    """
    limits = MULTIPROCESSORS[entry["sm"]]
    per_warp = -(-entry["registers"] // 8) * 8 * 32
    warps = 65536 // per_warp // 4 * 4
    shared = entry["shared_bytes"] + limits.reserved
    possible = {
        "warps": limits.warps // entry["warps"],
        "programs": limits.programs,
        "registers": warps // entry["warps"],
        "shared memory": limits.shared // shared if shared else limits.programs,
    }
    limiter = min(possible, key=lambda name: possible[name])
    programs = possible[limiter]
    return programs, programs * entry["warps"] / limits.warps, limiter


@dataclass(frozen=True)
class Work:
    """What one call moves and computes.

    Attributes:
      bytes_moved: Bytes of all inputs and outputs, each moved once; the state once per segment.
      workspace_bytes: Bytes written to the workspace and read back, in all.
      resident_bytes: Size of the workspace. If it fits the second-level cache, its traffic does not
        reach the memory.
      flops: Operations issued, by unit: split products count twice, masked edges in full.
      launches: Number of kernels launched.
    """

    bytes_moved: int
    workspace_bytes: int
    resident_bytes: int
    flops: dict[str, int]
    launches: int

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Return the least seconds that each limit allows, by its name."""
        spilled = self.workspace_bytes if self.resident_bytes > gpu.cache else 0
        seconds = {"memory": (self.bytes_moved + spilled) / gpu.bandwidth}
        # The same tensor cores serve all types.
        seconds["tensor cores"] = sum(
            count / gpu.rates[unit] for unit, count in self.flops.items() if unit != "fp32"
        )
        seconds["fp32 cores"] = self.flops.get("fp32", 0) / gpu.rates["fp32"]
        seconds["launches"] = self.launches * LAUNCH_SECONDS
        return seconds


def work(rows: int, tokens: int, size_k: int, size_v: int, dtype: str, sm: int) -> Work:
    """Return the work of one call, from its launch plan."""
    steps = plan(rows, tokens, size_k, size_v, dtype, sm)
    element = 4 if dtype == "float32" else 2
    per_token = (2 * size_k + size_v) * element + 4 * size_v + 4  # output and decay are float32
    flops: dict[str, int] = {}
    for step in steps.launches:
        for unit, count in _flops(step).items():
            flops[unit] = flops.get(unit, 0) + count
    passes = sum(s.variant.kernel in {"decode", "prefill_state"} for s in steps.launches)
    return Work(
        rows * (passes * 2 * 4 * size_k * size_v + tokens * per_token),
        2 * 4 * _partials(steps, rows, tokens, size_v),
        4 * steps.workspace,
        flops,
        len(steps.launches),
    )


def _flops(step: Launch) -> dict[str, int]:
    block, scalars = step.variant.block, step.scalars
    if step.variant.kernel == "sum_partials":
        return {"fp32": step.grid * scalars["splits"] * block["block_v"]}
    if step.variant.kernel == "decode":
        # Decay, write, read: one product and two fused multiply-adds per element.
        return {"fp32": 5 * step.grid * scalars["rows"] * block["block_v"]}
    chunk, block_k, block_v = (block[name] for name in ("chunk", "block_k", "block_v"))
    wide, passes = ("tf32", 2) if block["split_tf32"] else ("fp32", 1)
    if step.variant.kernel == "prefill_state":
        chunks = -(-scalars["length"] // chunk)
        return {wide: step.grid * chunks * passes * 2 * (2 * chunk * block_k * block_v)}
    inner = -(-scalars["size_k"] // block_k) * block_k
    scores = step.grid * 2 * chunk * chunk * inner
    values = step.grid * passes * 2 * chunk * chunk * block_v
    narrow = "half" if block["native"] else "fp32"
    return {wide: values + scores} if narrow == wide else {wide: values, narrow: scores}


def _partials(steps: Plan, rows: int, tokens: int, size_v: int) -> int:
    """Return the number of elements written to the workspace, in all."""
    if tokens == 1:
        return steps.workspace
    return steps.launches[1].scalars["tiles_k"] * rows * tokens * size_v


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", type=Path, help="folder that tools/compile_kernels.py wrote")
    parser.add_argument("--all", action="store_true", help="show variants for unaligned sizes too")
    options = parser.parse_args()
    path = options.kernels / MANIFEST
    if not path.is_file():
        parser.exit(1, f"{path} does not exist; compile: python -m tools.compile_kernels -o DIR\n")
    entries = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    print("sm   kernel                         regs  spill B  shared KiB  programs  warps  limiter")
    for entry in entries:
        if not (options.all or entry["aligned"] or entry["kernel"] == "sum_partials"):
            continue
        programs, share, limiter = occupancy(entry)
        print(
            f"{entry['sm']:<4} {entry['name']:<30} {entry['registers']:>4}  "
            f"{entry['spill_store_bytes']:>7}  {entry['shared_bytes'] / 1024:>10.1f}  "
            f"{programs:>8}  {share:>4.0%}   {limiter}"
        )
    print("\nModel of one call in µs, from data-sheet peaks; nothing was measured.")
    print(
        "gpu       B   T     Dk    Dv    type      MB moved  MB between GFLOP  launches  "
        "memory  compute  roofline  limiter"
    )
    rows = []
    for gpu in GPUS:
        for shape in SHAPES:
            call = work(*shape, gpu.sm)
            seconds = call.limits(gpu)
            limiter = max(seconds, key=lambda name: seconds[name])
            compute = max(seconds["tensor cores"], seconds["fp32 cores"])
            roofline = max(seconds["memory"], compute)
            batch, tokens, size_k, size_v, dtype = shape
            print(
                f"{gpu.name:<9} {batch:<3} {tokens:<5} {size_k:<5} {size_v:<5} {dtype:<9} "
                f"{call.bytes_moved / 1e6:>8.1f}  {call.workspace_bytes / 1e6:>10.1f}  "
                f"{sum(call.flops.values()) / 1e9:>5.2f}  {call.launches:>8}  "
                f"{seconds['memory'] * 1e6:>6.1f}  {compute * 1e6:>7.1f}  {roofline * 1e6:>8.1f}  "
                f"{limiter}"
            )
            rows.append(
                {"gpu": gpu.name, "shape": shape, **asdict(call), "seconds": seconds}
                | {"limiter": limiter}
            )
    spills = sum(entry["spill_store_bytes"] > 0 for entry in entries)
    print(json.dumps({"variants": len(entries), "variants_that_spill": spills, "calls": rows}))


if __name__ == "__main__":
    main()

"""Decide which GPU kernels run for given sizes, with which blocks, grids and workspace.

This is plain Python that needs nothing but the op's spec, so that launchers in other languages can
follow it: launcher/plan.cpp does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fwl_export.op.spec import ACTIVATION_TYPES

# Compute capability -> number of multiprocessors of the GPU that grids are sized for: T4, A100,
# RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090. Other GPUs of the same capability run the same plan.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}

# Parameters of each kernel, in order: name -> "T" (pointer to activations), "f32" (pointer to
# float32) or "i32" (integer). In linear_attention.py, the constants of the variant follow them.
SIGNATURES: dict[str, dict[str, str]] = {
    "decode": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "past", "present", "output", "partial"), "f32"),
        **dict.fromkeys(("size_k", "size_v", "splits", "rows"), "i32"),
    },
    "sum_partials": {
        **dict.fromkeys(("partial", "output"), "f32"),
        **dict.fromkeys(("size_v", "splits"), "i32"),
    },
    "prefill_state": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "past", "present", "partial"), "f32"),
        **dict.fromkeys(("rows", "tokens", "start", "length", "size_k", "size_v"), "i32"),
    },
    "prefill_output": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "partial", "output"), "f32"),
        **dict.fromkeys(("rows", "tokens", "start", "length"), "i32"),
        **dict.fromkeys(("tiles_k", "size_k", "size_v"), "i32"),
    },
}

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# A split needs a second kernel, so a state is split only to keep every multiprocessor busy.
MAX_SPLITS = 64
# The workspace of a segment should fit into the second-level cache of large GPUs.
WORKSPACE_BYTES = 32 << 20
# Kernels compute offsets inside one row's state with 32 bits.
_MAX_STATE = 2**31


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
      kernel: Name of the kernel in linear_attention.py.
      dtype: Type of the activations, one of ACTIVATION_TYPES.
      sm: Compute capability without the dot, such as 90.
      aligned: Whether Dk, Dv and every pointer (in bytes) must be multiples of 16, so that loads
        can be wide.
      constants: Compile-time arguments as pairs of name and value, in order.
      warps: Warps per program.
      stages: Pipeline stages of the kernel's loop; 1 means that nothing is loaded ahead.
    """

    kernel: str
    dtype: str
    sm: int
    aligned: bool
    constants: tuple[tuple[str, int | bool], ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Name, unique among the variants of one SM, such as `decode_split_fp16_aligned`."""
        parts = [self.kernel, _SHORT[self.dtype], "aligned" if self.aligned else "any"]
        if dict(self.constants).get("split"):
            parts.insert(1, "split")
        return "_".join(parts)

    @property
    def block(self) -> dict[str, int]:
        """Values of the constants, by name."""
        return {name: int(value) for name, value in self.constants}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
      variant: Variant to launch.
      grid: Number of programs; grids have one axis.
      scalars: Values of the i32 parameters, by name.
      first_segment: Whether `past` is the op's past_state. In later segments it is present_state,
        which an earlier launch has written.
    """

    variant: Variant
    grid: int
    scalars: dict[str, int]
    first_segment: bool = True


@dataclass(frozen=True)
class Plan:
    """The launches of one call of the op.

    Attributes:
      launches: Launches in stream order.
      workspace: Number of float32 elements in `partial`, which need no initial value; 0 if the
        launches do not use it.
    """

    launches: tuple[Launch, ...]
    workspace: int


def variant(kernel: str, dtype: str, sm: int, aligned: bool, split: bool = False) -> Variant:
    """Return the compiled form of a kernel, with its blocks.

    Args:
      kernel: Name of the kernel, a key of SIGNATURES.
      dtype: Type of the activations, one of ACTIVATION_TYPES.
      sm: Compute capability without the dot, a key of MULTIPROCESSORS.
      aligned: Whether sizes and pointers are multiples of 16; see `Variant`.
      split: Whether several programs share the rows of a state; for `decode` only.

    Raises:
      ValueError: If the kernel, type or compute capability is unknown.
    """
    if dtype not in ACTIVATION_TYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(ACTIVATION_TYPES)}")
    if sm not in MULTIPROCESSORS:
        raise ValueError(f"sm is {sm}; expected one of {', '.join(map(str, MULTIPROCESSORS))}")
    # From SM 80 on, Triton uses tensor cores for tf32, float16 and bfloat16. float32 activations
    # are multiplied in float32 everywhere, and SM 75 multiplies everything on the ordinary cores.
    tensor_cores = sm >= 80 and dtype != "float32"
    constants: dict[str, int | bool]
    stages = 1
    if kernel == "decode":
        constants, warps = {"block_k": 16, "block_v": 128, "split": split}, 4
    elif kernel == "sum_partials":
        constants, warps = {"block_v": 128}, 4
    elif kernel == "prefill_state":
        # A larger block_k means less traffic through the workspace; this is the largest that does
        # not spill registers. Two stages need more shared memory than SM 86, 89 and 120 have.
        if tensor_cores:
            constants = {"chunk": 64, "block_k": 128 if aligned else 64, "block_v": 32}
            stages = 2 if aligned and sm in {80, 90, 100} else 1
            warps = 4 if sm == 90 and not aligned else 8
        else:
            constants, warps = {"chunk": 32, "block_k": 64, "block_v": 32}, 8
        constants["split_tf32"] = tensor_cores
    elif kernel == "prefill_output":
        if tensor_cores:
            constants = {"chunk": 64, "block_k": 64, "block_v": 128}
        else:
            constants = {"chunk": 32, "block_k": 32, "block_v": 64}
        constants |= {"native": tensor_cores, "split_tf32": tensor_cores}
        warps, stages = 8, 2
    else:
        raise ValueError(f"kernel is {kernel!r}; expected one of {', '.join(SIGNATURES)}")
    return Variant(kernel, dtype, sm, aligned, tuple(constants.items()), warps, stages)


def variants(sm: int) -> Iterator[Variant]:
    """Yield every variant that a plan for a compute capability can use."""
    for dtype in ACTIVATION_TYPES:
        yield variant("sum_partials", dtype, sm, False)
        for aligned in (True, False):
            yield variant("decode", dtype, sm, aligned)
            yield variant("decode", dtype, sm, aligned, split=True)
            yield variant("prefill_state", dtype, sm, aligned)
            yield variant("prefill_output", dtype, sm, aligned)


def plan(
    rows: int,
    tokens: int,
    size_k: int,
    size_v: int,
    dtype: str,
    sm: int,
    aligned: bool = True,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Plan:
    """Return the launches of one call of the op.

    Args:
      rows: Batch size B, 1 or more.
      tokens: Tokens T per row, 1 or more.
      size_k: Size Dk of queries and keys.
      size_v: Size Dv of values.
      dtype: Type of the activations, one of ACTIVATION_TYPES.
      sm: Compute capability without the dot, a key of MULTIPROCESSORS.
      aligned: Whether every pointer is a multiple of 16 bytes. The sizes are checked here.
      workspace_bytes: Limit of the workspace. Prefill runs in segments of as many tokens as fit,
        but at least two chunks.

    Raises:
      ValueError: If a size is below 1, a state has 2^31 elements or more, or the type or compute
        capability is unknown.
    """
    sizes = {"B": rows, "T": tokens, "Dk": size_k, "Dv": size_v}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    if size_k * size_v >= _MAX_STATE:
        raise ValueError(f"Dk * Dv is {size_k * size_v}; expected less than 2^31")
    aligned = aligned and size_k % 16 == 0 and size_v % 16 == 0
    if tokens == 1:
        return _decode(rows, size_k, size_v, dtype, sm, aligned)
    return _prefill(rows, tokens, size_k, size_v, dtype, sm, aligned, workspace_bytes)


def _decode(rows: int, size_k: int, size_v: int, dtype: str, sm: int, aligned: bool) -> Plan:
    block = variant("decode", dtype, sm, aligned).block
    programs = rows * _tiles(size_v, block["block_v"])
    # Four programs of four warps keep enough loads in flight on one multiprocessor.
    wanted = min(_tiles(4 * MULTIPROCESSORS[sm], programs), MAX_SPLITS)
    lines = _tiles(_tiles(size_k, wanted), block["block_k"]) * block["block_k"]
    splits = _tiles(size_k, lines)
    scalars = {"size_k": size_k, "size_v": size_v, "splits": splits, "rows": lines}
    chosen = variant("decode", dtype, sm, aligned, split=splits > 1)
    launches = [Launch(chosen, programs * splits, scalars)]
    if splits > 1:
        chosen = variant("sum_partials", dtype, sm, False)
        grid = rows * _tiles(size_v, chosen.block["block_v"])
        launches.append(Launch(chosen, grid, {"size_v": size_v, "splits": splits}))
    return Plan(tuple(launches), rows * splits * size_v if splits > 1 else 0)


def _prefill(
    rows: int,
    tokens: int,
    size_k: int,
    size_v: int,
    dtype: str,
    sm: int,
    aligned: bool,
    workspace_bytes: int,
) -> Plan:
    state = variant("prefill_state", dtype, sm, aligned)
    output = variant("prefill_output", dtype, sm, aligned)
    chunk = state.block["chunk"]
    tiles_k = _tiles(size_k, state.block["block_k"])
    # At least two chunks: with one per segment, every chunk would read and write the state.
    per_chunk = tiles_k * rows * chunk * size_v
    segment = max(workspace_bytes // (4 * per_chunk), 2) * chunk
    launches = []
    for start in range(0, tokens, segment):
        length = min(segment, tokens - start)
        scalars = {"rows": rows, "tokens": tokens, "start": start, "length": length}
        scalars |= {"size_k": size_k, "size_v": size_v}
        grid = tiles_k * rows * _tiles(size_v, state.block["block_v"])
        launches.append(Launch(state, grid, scalars, first_segment=start == 0))
        grid = rows * _tiles(length, chunk) * _tiles(size_v, output.block["block_v"])
        launches.append(Launch(output, grid, scalars | {"tiles_k": tiles_k}))
    return Plan(tuple(launches), tiles_k * rows * min(segment, tokens) * size_v)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)

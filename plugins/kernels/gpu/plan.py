"""Which GPU kernels run for given sizes, with which blocks, grids and workspace.

Plain Python and no package but the op's spec: launchers in other languages take the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fwl_export.op.spec import ACTIVATION_TYPES

# Compute capability -> multiprocessors of the GPU that grids are sized for: T4, A100, RTX 3090,
# RTX 4090, H100 SXM, B200, RTX 5090. Others of the same capability run the same plan.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}

# Parameters of each kernel, in order: name -> "T" (pointer to activations), "f32" (pointer) or
# "i32". What follows them in linear_attention.py are constants of the variant.
SIGNATURES: dict[str, dict[str, str]] = {
    "decode": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "past", "present"), "f32"),
        "output": "T",
        "partial": "f32",
        **dict.fromkeys(("size_k", "size_v", "splits", "rows"), "i32"),
    },
    "sum_partials": {"partial": "f32", "output": "T", "size_v": "i32", "splits": "i32"},
    "prefill_state": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "past", "present", "partial"), "f32"),
        **dict.fromkeys(("rows", "tokens", "start", "length", "size_k", "size_v"), "i32"),
    },
    "prefill_output": {
        **dict.fromkeys(("query", "key", "value"), "T"),
        **dict.fromkeys(("decay", "partial"), "f32"),
        "output": "T",
        **dict.fromkeys(("rows", "tokens", "start", "length"), "i32"),
        **dict.fromkeys(("tiles_k", "size_k", "size_v"), "i32"),
    },
}

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# A split costs a second kernel, so no more of them than keep every multiprocessor busy.
MAX_SPLITS = 64
# A segment's workspace should fit the second-level cache of large GPUs.
WORKSPACE_BYTES = 32 << 20
# Offsets inside one row's state are 32 bits wide in the kernels.
_MAX_STATE = 2**31


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
      kernel: its name in linear_attention.py.
      dtype: type of the activations, a name of ACTIVATION_TYPES.
      sm: compute capability, e.g. 90.
      aligned: whether Dk, Dv and every pointer are multiples of 16 (the pointers in bytes),
        so that loads can be wide.
      constants: compile-time arguments, in order.
      warps: warps of a program.
      stages: loads in flight in the kernel's loop, 1 for none ahead.
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
        """Unique among the variants of one SM, e.g. `decode_split_fp16_aligned`."""
        parts = [self.kernel, _SHORT[self.dtype], "aligned" if self.aligned else "any"]
        if dict(self.constants).get("split"):
            parts.insert(1, "split")
        return "_".join(parts)

    @property
    def block(self) -> dict[str, int]:
        """The constants by name."""
        return {name: int(value) for name, value in self.constants}


@dataclass(frozen=True)
class Launch:
    """One kernel call. `first_segment` tells whether `past` is the op's past_state.

    Attributes:
      variant: what to launch.
      grid: programs, on one axis.
      scalars: values of the i32 parameters, by name.
      first_segment: otherwise `past` is present_state, which the launch before wrote.
    """

    variant: Variant
    grid: int
    scalars: dict[str, int]
    first_segment: bool = True


@dataclass(frozen=True)
class Plan:
    """What one call of the op launches, in order.

    Attributes:
      launches: in stream order.
      workspace: float32 elements of `partial`, not initialised; 0 if unused.
    """

    launches: tuple[Launch, ...]
    workspace: int


def variant(kernel: str, dtype: str, sm: int, aligned: bool, split: bool = False) -> Variant:
    """Return the compiled form of a kernel with its blocks.

    Raises:
      ValueError: an unknown type or compute capability.
    """
    if dtype not in ACTIVATION_TYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(ACTIVATION_TYPES)}")
    if sm not in MULTIPROCESSORS:
        raise ValueError(f"sm is {sm}; expected one of {', '.join(map(str, MULTIPROCESSORS))}")
    # From SM 80 on the compiler has tensor cores for tf32 and the half types. float32 stays
    # float32 everywhere; on SM 75 it makes ordinary arithmetic of every product.
    tensor_cores = sm >= 80 and dtype != "float32"
    constants: dict[str, int | bool]
    stages = 1
    if kernel == "decode":
        constants, warps = {"block_k": 16, "block_v": 128, "split": split}, 4
    elif kernel == "sum_partials":
        constants, warps = {"block_v": 128}, 4
    elif kernel == "prefill_state":
        # What goes through the workspace falls with block_k: the largest that spills nothing.
        # Loads ahead need more shared memory than SM 86, 89 and 120 have.
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
    """Yield every variant of a compute capability that a plan can name."""
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
      rows: B, 1 or more.
      tokens: T, 1 or more.
      size_k: Dk.
      size_v: Dv.
      dtype: type of the activations.
      sm: compute capability of the kernels, a key of MULTIPROCESSORS.
      aligned: whether every pointer is a multiple of 16 bytes; sizes are looked at here.
      workspace_bytes: prefill goes in segments of as many tokens as fit, two chunks at least.

    Raises:
      ValueError: a size below 1, a state of 2^31 elements or more, an unknown type or SM.
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
    # Of one chunk alone, the state would be read and written for each.
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

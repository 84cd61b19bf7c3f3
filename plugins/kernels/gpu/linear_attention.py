"""GPU kernels of `fwl::LinearAttentionUpdate` in the Triton language. See README.md beside this.

Every tensor is contiguous, with the shapes of `fwl_export/op/spec.py`; T is the type of the
activations. Grids have one axis. Blocks, grids and workspaces come from `plan.py`. Each program
owns the part of the state that it writes and reads it first, so `past` and `present` may be the
same memory. No atomics: the same launch gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What varies from call to call is not specialized: Triton's launcher would compile a form of its
# own for each value that is 1 or a multiple of 16.


@triton.jit(do_not_specialize=["splits", "rows"])
def decode(
    query,
    key,
    value,
    decay,
    past,
    present,
    output,
    partial,
    size_k,
    size_v,
    splits,
    rows,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    split: tl.constexpr,
):
    """One token: write to the state and read it in one pass.

    A program takes `rows` rows of one state and `block_v` of its columns.

    Args:
      query: [B, 1, Dk] T.
      key: [B, 1, Dk] T.
      value: [B, 1, Dv] T.
      decay: [B, 1] float32.
      past: [B, Dk, Dv] float32.
      present: [B, Dk, Dv] float32, written.
      output: [B, 1, Dv] T, written unless `split`.
      partial: [B, splits, Dv] float32, written if `split`: `sum_partials` finishes.
      size_k: Dk.
      size_v: Dv.
      splits: programs that share the rows of one state.
      rows: rows of each, a multiple of block_k.
      block_k: rows in flight.
      block_v: columns of a program.
      split: whether splits > 1.
    """
    tiles_v = tl.cdiv(size_v, block_v)
    program = tl.program_id(0)
    column = (program % tiles_v) * block_v + tl.arange(0, block_v)
    share = (program // tiles_v) % splits
    row = (program // (tiles_v * splits)).to(tl.int64)
    first = share * rows
    last = tl.minimum(first + rows, size_k)
    in_v = column < size_v
    v = tl.load(value + row * size_v + column, mask=in_v, other=0.0).to(tl.float32)
    d = tl.load(decay + row)
    query += row * size_k
    key += row * size_k
    past += row * size_k * size_v
    present += row * size_k * size_v
    total = tl.zeros((block_k, block_v), dtype=tl.float32)
    for start in range(first, last, block_k):
        line = start + tl.arange(0, block_k)
        in_k = line < last
        inside = in_k[:, None] & in_v[None, :]
        place = line[:, None] * size_v + column[None, :]
        q = tl.load(query + line, mask=in_k, other=0.0).to(tl.float32)
        k = tl.load(key + line, mask=in_k, other=0.0).to(tl.float32)
        state = tl.load(past + place, mask=inside, other=0.0)
        state = d * state + k[:, None] * v[None, :]
        tl.store(present + place, state, mask=inside)
        total += q[:, None] * state
    result = tl.sum(total, axis=0)
    if split:
        tl.store(partial + (row * splits + share) * size_v + column, result, mask=in_v)
    else:
        tl.store(output + row * size_v + column, result.to(output.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize=["splits"])
def sum_partials(partial, output, size_v, splits, block_v: tl.constexpr):
    """Add what the programs of a split `decode` read, in order.

    Args:
      partial: [B, splits, Dv] float32.
      output: [B, 1, Dv] T, written.
      size_v: Dv.
      splits: terms of the sum.
      block_v: columns of a program.
    """
    tiles_v = tl.cdiv(size_v, block_v)
    program = tl.program_id(0)
    column = (program % tiles_v) * block_v + tl.arange(0, block_v)
    row = (program // tiles_v).to(tl.int64)
    in_v = column < size_v
    partial += row * splits * size_v
    total = tl.zeros((block_v,), dtype=tl.float32)
    for share in range(splits):
        total += tl.load(partial + share * size_v + column, mask=in_v, other=0.0)
    tl.store(output + row * size_v + column, total.to(output.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize=["rows", "tokens", "start", "length"])
def prefill_state(
    query,
    key,
    value,
    decay,
    past,
    present,
    partial,
    rows,
    tokens,
    start,
    length,
    size_k,
    size_v,
    chunk: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    split_tf32: tl.constexpr,
):
    """Carry one tile of the state through a segment of tokens, chunk by chunk.

    Before a chunk is written, the tile is read with the chunk's queries: that is what earlier
    chunks contribute to the output. `prefill_output` adds the tiles and the chunk's own part.

    Args:
      query: [B, tokens, Dk] T.
      key: [B, tokens, Dk] T.
      value: [B, tokens, Dv] T.
      decay: [B, tokens] float32.
      past: [B, Dk, Dv] float32.
      present: [B, Dk, Dv] float32, written.
      partial: [tiles over Dk, B, length, Dv] float32, written.
      rows: B.
      tokens: T.
      start: the segment's first token.
      length: tokens of the segment.
      size_k: Dk.
      size_v: Dv.
      chunk: tokens of a chunk.
      block_k: rows of a tile of the state.
      block_v: its columns.
      split_tf32: see `_dot_wide_left`.
    """
    tiles_v = tl.cdiv(size_v, block_v)
    program = tl.program_id(0)
    column = (program % tiles_v) * block_v + tl.arange(0, block_v)
    row = ((program // tiles_v) % rows).to(tl.int64)
    tile_k = program // (tiles_v * rows)
    line = tile_k * block_k + tl.arange(0, block_k)
    in_k = line < size_k
    in_v = column < size_v
    inside = in_k[:, None] & in_v[None, :]
    place = row * size_k * size_v + line[:, None] * size_v + column[None, :]
    query += (row * tokens + start) * size_k
    key += (row * tokens + start) * size_k
    value += (row * tokens + start) * size_v
    decay += row * tokens + start
    partial += (tile_k * rows + row) * length * size_v
    index = tl.arange(0, chunk)
    state = tl.load(past + place, mask=inside, other=0.0)
    for first in range(0, length, chunk):
        token = first + index
        in_t = token < length
        keys = token[:, None] * size_k + line[None, :]
        values = token[:, None] * size_v + column[None, :]
        d = tl.load(decay + token, mask=in_t, other=1.0)
        fade = tl.cumprod(d, axis=0)
        q = tl.load(query + keys, mask=in_t[:, None] & in_k[None, :], other=0.0)
        read = _dot_wide_right(q, state, split_tf32) * fade[:, None]
        tl.store(partial + values, read, mask=in_t[:, None] & in_v[None, :])
        # What the chunk's later decays leave of each write: a product of those alone, so
        # that a decay of 0 or of 1e-30 before them costs no precision.
        after = (token + 1 < length) & (index + 1 < chunk)
        kept = tl.cumprod(tl.load(decay + token + 1, mask=after, other=1.0), axis=0, reverse=True)
        k = tl.load(key + keys, mask=in_t[:, None] & in_k[None, :], other=0.0)
        v = tl.load(value + values, mask=in_t[:, None] & in_v[None, :], other=0.0)
        written = _dot_wide_left(tl.trans(k.to(tl.float32) * kept[:, None]), v, split_tf32)
        state = state * tl.sum(tl.where(index == chunk - 1, fade, 0.0), axis=0) + written
    tl.store(present + place, state, mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens", "start", "length", "tiles_k"])
def prefill_output(
    query,
    key,
    value,
    decay,
    partial,
    output,
    rows,
    tokens,
    start,
    length,
    tiles_k,
    size_k,
    size_v,
    chunk: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    native: tl.constexpr,
    split_tf32: tl.constexpr,
):
    """Read what each token's own chunk wrote, and add what `prefill_state` read.

    Args:
      query: [B, tokens, Dk] T.
      key: [B, tokens, Dk] T.
      value: [B, tokens, Dv] T.
      decay: [B, tokens] float32.
      partial: [tiles_k, B, length, Dv] float32.
      output: [B, tokens, Dv] T, written.
      rows: B.
      tokens: T.
      start: the segment's first token.
      length: tokens of the segment.
      tiles_k: tiles over Dk in `partial`.
      size_k: Dk.
      size_v: Dv.
      chunk: tokens of a chunk, that of `prefill_state`.
      block_k: inner size of one product of queries and keys.
      block_v: columns of a program.
      native: whether tensor cores multiply type T.
      split_tf32: see `_dot_wide_left`.
    """
    tiles_v = tl.cdiv(size_v, block_v)
    chunks = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    column = (program % tiles_v) * block_v + tl.arange(0, block_v)
    index = tl.arange(0, chunk)
    token = ((program // tiles_v) % chunks) * chunk + index
    row = (program // (tiles_v * chunks)).to(tl.int64)
    in_t = token < length
    in_v = column < size_v
    values = token[:, None] * size_v + column[None, :]
    query += (row * tokens + start) * size_k
    key += (row * tokens + start) * size_k
    value += (row * tokens + start) * size_v
    output += (row * tokens + start) * size_v
    decay += row * tokens + start
    partial += row * length * size_v
    scores = tl.zeros((chunk, chunk), dtype=tl.float32)
    for first in range(0, size_k, block_k):
        line = first + tl.arange(0, block_k)
        inside = in_t[:, None] & (line < size_k)[None, :]
        keys = token[:, None] * size_k + line[None, :]
        q = tl.load(query + keys, mask=inside, other=0.0)
        k = tl.load(key + keys, mask=inside, other=0.0)
        if native:
            scores = tl.dot(q, tl.trans(k), acc=scores)
        else:
            k = tl.trans(k.to(tl.float32))
            scores = tl.dot(q.to(tl.float32), k, acc=scores, input_precision="ieee")
    # Entry (i, j): the product of d_{j+1} ... d_i. Each column multiplies only its own decays;
    # a quotient of two products would be 0 / 0 where a decay is 0.
    d = tl.load(decay + token, mask=in_t, other=1.0)
    fade = tl.cumprod(tl.where(index[:, None] > index[None, :], d[:, None], 1.0), axis=0)
    scores = tl.where(index[:, None] >= index[None, :], scores * fade, 0.0)
    inside = in_t[:, None] & in_v[None, :]
    v = tl.load(value + values, mask=inside, other=0.0)
    result = _dot_wide_left(scores, v, split_tf32)
    # 64 bits: the tiles together may have more than 2^31 elements.
    step = rows.to(tl.int64) * length * size_v
    for _ in range(tiles_k):
        result += tl.load(partial + values, mask=inside, other=0.0)
        partial += step
    tl.store(output + values, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _tf32(x):
    """Round to the nearest number of 11 significant bits, as tensor cores take it."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_wide_left(wide, narrow, split_tf32: tl.constexpr):
    """Multiply a float32 matrix by one of type T.

    Tensor cores have no float32. With `split_tf32`, the wide one is the sum of two tf32
    numbers, good to 2^-22, and the narrow one must be of 11 significant bits or less (float16,
    bfloat16), thus exact. Without, the product is of float32 on the ordinary cores.

    Args:
      wide: [M, K] float32.
      narrow: [K, N] T.
      split_tf32: constant.

    Returns:
      [M, N] float32.
    """
    narrow = narrow.to(tl.float32)
    if split_tf32:
        high = _tf32(wide)
        low = _tf32(wide - high)
        result = tl.dot(low, narrow, input_precision="tf32")
        result = tl.dot(high, narrow, acc=result, input_precision="tf32")
    else:
        result = tl.dot(wide, narrow, input_precision="ieee")
    return result


@triton.jit
def _dot_wide_right(narrow, wide, split_tf32: tl.constexpr):
    """Multiply the other way round, [M, K] of type T by [K, N] float32. See `_dot_wide_left`."""
    narrow = narrow.to(tl.float32)
    if split_tf32:
        high = _tf32(wide)
        low = _tf32(wide - high)
        result = tl.dot(narrow, low, input_precision="tf32")
        result = tl.dot(narrow, high, acc=result, input_precision="tf32")
    else:
        result = tl.dot(narrow, wide, input_precision="ieee")
    return result

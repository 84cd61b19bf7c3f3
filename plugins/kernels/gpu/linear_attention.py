"""GPU kernels of `fwl::LinearAttentionUpdate` in the Triton language; README.md explains them.

All tensors are contiguous and have the shapes of `fwl_export/op/spec.py`. Below, the dtype of the
activations (query, key and value) is called T. Grids have one axis. Blocks, grids and
workspaces come from `plan.py`. Each program owns the part of the state that it writes, and reads it
before it writes it, so `past` and `present` may be the same memory. There are no atomics: the same
launch gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Parameters that vary from call to call are not specialized: Triton's launcher would compile
# further forms of the kernel, for values of 1 and for multiples of 16.


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
    """Update the state with one token and read it, in one pass.

    A program computes `rows` rows of one state, in `block_v` of its columns.

    Args:
      query: Query of each row, [B, 1, Dk] T.
      key: Key of each row, [B, 1, Dk] T.
      value: Value of each row, [B, 1, Dv] T.
      decay: Decay of each row, [B, 1] float32.
      past: State before the token, [B, Dk, Dv] float32.
      present: State after the token, [B, Dk, Dv] float32; written.
      output: Output, [B, 1, Dv] float32; written unless `split`.
      partial: Output of each program, [B, splits, Dv] float32; written if `split`, and then summed
        by `sum_partials`.
      size_k: Size Dk of queries and keys.
      size_v: Size Dv of values.
      splits: Number of programs that share the rows of one state.
      rows: Rows of the state per program, a multiple of block_k.
      block_k: Rows of the state that are loaded at the same time.
      block_v: Columns of the state per program.
      split: Whether `splits` is more than 1.
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
        # The longest load first; in another order, SM 120 spills registers.
        state = tl.load(past + place, mask=inside, other=0.0)
        q = tl.load(query + line, mask=in_k, other=0.0).to(tl.float32)
        k = tl.load(key + line, mask=in_k, other=0.0).to(tl.float32)
        state = d * state + k[:, None] * v[None, :]
        tl.store(present + place, state, mask=inside)
        total += q[:, None] * state
    result = tl.sum(total, axis=0)
    if split:
        tl.store(partial + (row * splits + share) * size_v + column, result, mask=in_v)
    else:
        tl.store(output + row * size_v + column, result, mask=in_v)


@triton.jit(do_not_specialize=["splits"])
def sum_partials(partial, output, size_v, splits, block_v: tl.constexpr):
    """Add the outputs of the programs of a split `decode`, in order.

    Args:
      partial: Output of each program, [B, splits, Dv] float32.
      output: Their sum, [B, 1, Dv] float32; written.
      size_v: Size Dv of values.
      splits: Number of terms in the sum.
      block_v: Columns per program.
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
    tl.store(output + row * size_v + column, total, mask=in_v)


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
    """Update one tile of the state with a segment of tokens, chunk by chunk.

    Before each update, the tile is read with the chunk's queries, which gives the contribution of
    earlier chunks to the output. `prefill_output` adds the contributions of all tiles and of the
    chunk itself.

    Args:
      query: Queries, [B, tokens, Dk] T.
      key: Keys, [B, tokens, Dk] T.
      value: Values, [B, tokens, Dv] T.
      decay: Decays, [B, tokens] float32.
      past: State before the segment, [B, Dk, Dv] float32.
      present: State after the segment, [B, Dk, Dv] float32; written.
      partial: Contribution of each tile to the output, [tiles over Dk, B, length, Dv] float32;
        written.
      rows: Batch size B.
      tokens: Tokens per row in the tensors.
      start: First token of the segment.
      length: Tokens per row in the segment.
      size_k: Size Dk of queries and keys.
      size_v: Size Dv of values.
      chunk: Tokens per chunk.
      block_k: Rows of a tile of the state.
      block_v: Columns of a tile of the state.
      split_tf32: Whether to multiply on tensor cores; see `_dot_wide_left`.
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
        # How much each update decays until the end of the chunk: a product of later decays only,
        # so that earlier decays of 0 or 1e-30 cost no precision.
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
    """Compute what each token reads of its own chunk, and add the parts of `prefill_state`.

    Args:
      query: Queries, [B, tokens, Dk] T.
      key: Keys, [B, tokens, Dk] T.
      value: Values, [B, tokens, Dv] T.
      decay: Decays, [B, tokens] float32.
      partial: Contribution of earlier chunks, [tiles_k, B, length, Dv] float32.
      output: Output, [B, tokens, Dv] float32; written for the segment.
      rows: Batch size B.
      tokens: Tokens per row in the tensors.
      start: First token of the segment.
      length: Tokens per row in the segment.
      tiles_k: Number of tiles over Dk in `partial`.
      size_k: Size Dk of queries and keys.
      size_v: Size Dv of values.
      chunk: Tokens per chunk, as in `prefill_state`.
      block_k: Inner size of one product of queries and keys.
      block_v: Columns per program.
      native: Whether tensor cores multiply type T.
      split_tf32: Whether to multiply on tensor cores; see `_dot_wide_left`.
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
    # Entry (i, j) is the product d_{j+1} ... d_i. Each column multiplies its own decays; a quotient
    # of two products would be 0 / 0 where a decay is 0.
    d = tl.load(decay + token, mask=in_t, other=1.0)
    fade = tl.cumprod(tl.where(index[:, None] > index[None, :], d[:, None], 1.0), axis=0)
    scores = tl.where(index[:, None] >= index[None, :], scores * fade, 0.0)
    inside = in_t[:, None] & in_v[None, :]
    v = tl.load(value + values, mask=inside, other=0.0)
    result = _dot_wide_left(scores, v, split_tf32)
    # 64 bits, because all tiles together may have more than 2^31 elements.
    step = rows.to(tl.int64) * length * size_v
    for _ in range(tiles_k):
        result += tl.load(partial + values, mask=inside, other=0.0)
        partial += step
    tl.store(output + values, result, mask=inside)


@triton.jit
def _tf32(x):
    """Round to 11 significant bits, which is what tensor cores use of a tf32 number."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_wide_left(wide, narrow, split_tf32: tl.constexpr):
    """Multiply a float32 matrix by a matrix of type T.

    Tensor cores cannot multiply float32. With `split_tf32`, each element of `wide` is split into a
    sum of two tf32 numbers, with a relative error of 2^-22, and `narrow` must have at most 11
    significant bits (float16, bfloat16), so that it is exact in tf32. Without `split_tf32`, the
    product is computed in float32 on the ordinary cores.

    Args:
      wide: Left matrix, [M, K] float32.
      narrow: Right matrix, [K, N] T.
      split_tf32: Whether to split `wide` and use tensor cores; a compile-time constant.

    Returns:
      The product, [M, N] float32.
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
    """Multiply a matrix [M, K] of type T by a matrix [K, N] float32; see `_dot_wide_left`."""
    narrow = narrow.to(tl.float32)
    if split_tf32:
        high = _tf32(wide)
        low = _tf32(wide - high)
        result = tl.dot(narrow, low, input_precision="tf32")
        result = tl.dot(narrow, high, acc=result, input_precision="tf32")
    else:
        result = tl.dot(narrow, wide, input_precision="ieee")
    return result

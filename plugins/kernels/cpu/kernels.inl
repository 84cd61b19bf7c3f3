// The kernels, written once for all instruction sets: with vectors of FWL_LANES floats, and tiles
// of FWL_TILE_ROWS rows by two vectors. Each instruction set has a source file, compiled with its
// own flags, which defines FWL_LANES, FWL_TILE_ROWS and FWL_INSTRUCTIONS (the name of its table)
// and then includes this file.
//
// Everything is in an unnamed namespace and calls no inline function of the standard library. The
// linker keeps one copy of such a function; a copy compiled for a wide instruction set would crash
// on a machine without it.

#include "kernels/cpu/instructions.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define FWL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FWL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fwl::cpu {
namespace {

constexpr size_t kLanes = FWL_LANES;
constexpr size_t kTileRows = FWL_TILE_ROWS;
constexpr size_t kTileColumns = 2 * kLanes;

// may_alias and aligned(4): can be loaded from and stored to any place in an array of floats.
typedef float Vector __attribute__((vector_size(FWL_LANES * 4)));
typedef float Unaligned __attribute__((vector_size(FWL_LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}
inline void store(float* to, Vector vector) {
  *reinterpret_cast<Unaligned*>(to) = vector;
}
inline Vector broadcast(float value) {
  return value - Vector{};
}
inline size_t smaller(size_t a, size_t b) {
  return a < b ? a : b;
}

#if defined(__F16C__)

inline float widen_one(uint16_t half) {
  return _cvtsh_ss(half);
}

#else

union Bits {
  uint32_t bits;
  float value;
};

inline float widen_one(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  Bits wide;
  if (magnitude >= 0x7c00u) { // infinity or NaN
    wide.bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    wide.bits = (magnitude << 13) + ((127u - 15u) << 23);
  } else { // subnormal: a whole number of 2^-24
    wide.value = static_cast<float>(magnitude) * 0x1p-24f;
  }
  wide.bits |= sign;
  return wide.value;
}

#endif

void widen(const uint16_t* half, float* wide, size_t count) {
  size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < count; ++i) {
    wide[i] = widen_one(half[i]);
  }
}

// Decode: one token.

// Rows of the state per sweep over the columns: enough rows to hide reading and writing the output
// behind them, and few enough streams for the prefetcher. Eight rows are slower.
constexpr size_t kSweepRows = 4;

template <size_t Rows> void sweep(const DecodeBlock& block, size_t row) {
  const size_t size = block.value_size;
  const float* past = block.past_state + row * size;
  float* present = block.present_state + row * size;
  const float* value = block.value;
  float* output = block.partial_output;
  const float decay = block.decay;
  Vector keys[Rows];
  Vector queries[Rows];
  FWL_UNROLL
  for (size_t r = 0; r < Rows; ++r) {
    keys[r] = broadcast(block.key[row + r]);
    queries[r] = broadcast(block.query[row + r]);
  }
  size_t column = 0;
  for (; column + kLanes <= size; column += kLanes) {
    const Vector values = load(value + column);
    Vector sum = load(output + column);
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      const Vector written = keys[r] * values;
      const Vector state = load(past + r * size + column) * decay + written;
      store(present + r * size + column, state);
      sum += queries[r] * state;
    }
    store(output + column, sum);
  }
  for (; column < size; ++column) {
    float sum = output[column];
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      const float written = block.key[row + r] * value[column];
      const float state = past[r * size + column] * decay + written;
      present[r * size + column] = state;
      sum += block.query[row + r] * state;
    }
    output[column] = sum;
  }
}

void decode(const DecodeBlock& block) {
  for (size_t column = 0; column < block.value_size; ++column) {
    block.partial_output[column] = 0;
  }
  size_t row = block.row_begin;
  for (; row + kSweepRows <= block.row_end; row += kSweepRows) {
    sweep<kSweepRows>(block, row);
  }
  for (; row < block.row_end; ++row) {
    sweep<1>(block, row);
  }
}

void reduce(const float* partials, size_t block_count, size_t stride, size_t begin, size_t end,
            float* output) {
  size_t column = begin;
  for (; column + kLanes <= end; column += kLanes) {
    Vector sum = load(partials + column);
    for (size_t block = 1; block < block_count; ++block) {
      sum += load(partials + block * stride + column);
    }
    store(output + column, sum);
  }
  for (; column < end; ++column) {
    float sum = partials[column];
    for (size_t block = 1; block < block_count; ++block) {
      sum += partials[block * stride + column];
    }
    output[column] = sum;
  }
}

// Prefill: many tokens, in tiles of Rows x kTileColumns that stay in registers.

template <size_t Rows> struct Tile {
  Vector left[Rows];
  Vector right[Rows];

  inline void clear() {
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      left[r] = Vector{};
      right[r] = Vector{};
    }
  }

  // Adds a[depth][kTileRows]^T b[depth][kTileColumns].
  inline void multiply(const float* a, const float* b, size_t depth) {
    for (size_t p = 0; p < depth; ++p) {
      const Vector b_left = load(b + p * kTileColumns);
      const Vector b_right = load(b + p * kTileColumns + kLanes);
      FWL_UNROLL
      for (size_t r = 0; r < Rows; ++r) {
        const float factor = a[p * kTileRows + r];
        left[r] += factor * b_left;
        right[r] += factor * b_right;
      }
    }
  }

  // The same for the square on the diagonal: row r adds its first r + 1 terms only, so that later
  // tokens cannot reach it, not even as 0 times infinity.
  inline void multiply_causal(const float* a, const float* b) {
    FWL_UNROLL
    for (size_t p = 0; p < Rows; ++p) {
      const Vector b_left = load(b + p * kTileColumns);
      const Vector b_right = load(b + p * kTileColumns + kLanes);
      FWL_UNROLL
      for (size_t r = 0; r < Rows; ++r) {
        if (r >= p) {
          const float factor = a[p * kTileRows + r];
          left[r] += factor * b_left;
          right[r] += factor * b_right;
        }
      }
    }
  }

  inline void scale_rows(const float* factors) {
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      left[r] *= factors[r];
      right[r] *= factors[r];
    }
  }

  inline void store_to(float* to, size_t stride) const {
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      store(to + r * stride, left[r]);
      store(to + r * stride + kLanes, right[r]);
    }
  }
};

// Calls Function<rows>::call(arguments...) for a number of rows between 1 and `Rows`.
template <template <size_t> class Function, size_t Rows, class... Arguments>
inline void with_rows(size_t rows, Arguments... arguments) {
  if constexpr (Rows > 1) {
    if (rows != Rows) {
      with_rows<Function, Rows - 1>(rows, arguments...);
      return;
    }
  }
  Function<Rows>::call(arguments...);
}

template <size_t Rows> struct Product {
  static void call(const float* a, const float* b, size_t depth, float* to) {
    Tile<Rows> tile;
    tile.clear();
    tile.multiply(a, b, depth);
    tile.store_to(to, kTileColumns);
  }
};

// A tile of the output: reads the decayed state before the chunk, then the chunk's own updates.
template <size_t Rows> struct Read {
  static void call(const float* queries, const float* state, size_t key_size, const float* fade,
                   const float* scores, const float* values, size_t token, float* to,
                   size_t stride) {
    Tile<Rows> tile;
    tile.clear();
    tile.multiply(queries, state, key_size);
    tile.scale_rows(fade);
    tile.multiply(scores, values, token);
    tile.multiply_causal(scores + token * kTileRows, values + token * kTileColumns);
    tile.store_to(to, stride);
  }
};

// A tile of the state: decays it and adds the chunk's updates.
template <size_t Rows> struct Write {
  static void call(const float* keys, const float* values, size_t tokens, float fade,
                   float* state) {
    Tile<Rows> tile;
    tile.clear();
    tile.multiply(keys, values, tokens);
    FWL_UNROLL
    for (size_t r = 0; r < Rows; ++r) {
      float* row = state + r * kTileColumns;
      store(row, load(row) * fade + tile.left[r]);
      store(row + kLanes, load(row + kLanes) * fade + tile.right[r]);
    }
  }
};

// Returns tokens [begin, end) as float32, at the same offsets: the tensor itself, or a copy in
// `scratch`.
const float* as_floats(const void* tokens, size_t begin, size_t end, size_t size,
                       Activation activation, float* scratch) {
  if (activation == Activation::kFloat32) {
    return static_cast<const float*>(tokens);
  }
  widen(static_cast<const uint16_t*>(tokens) + begin * size, scratch + begin * size,
        (end - begin) * size);
  return scratch;
}

// Sets fade[i][j] = d_{j+1} ... d_i for tokens i in [begin, end) and j <= i, fade[tokens][j] to the
// same for the last token, and of_past[i] = d_1 ... d_i. These are products, never quotients or
// differences of logarithms, so decays of 0 and 1 are exact and no decay is too small.
void fill_fade(const float* decay, size_t tokens, size_t begin, size_t end, float* fade,
               float* of_past) {
  float* current = fade + tokens * tokens;
  float past = 1;
  for (size_t i = 0; i < tokens; ++i) {
    for (size_t j = 0; j < i; ++j) {
      current[j] *= decay[i];
    }
    current[i] = 1;
    past *= decay[i];
    of_past[i] = past;
    if (i >= begin && i < end) {
      for (size_t j = 0; j <= i; ++j) {
        fade[i * tokens + j] = current[j];
      }
    }
  }
}

// Interleaves the queries of one block of tokens, so that a tile reads its operand in one stream:
// to[p][r] = query[first + r][p], and zeros behind the last token.
inline void pack_queries(const float* query, size_t first, size_t tokens, size_t size, float* to) {
  const size_t rows = smaller(kTileRows, tokens - first);
  for (size_t r = 0; r < rows; ++r) {
    const float* from = query + (first + r) * size;
    for (size_t p = 0; p < size; ++p) {
      to[p * kTileRows + r] = from[p];
    }
  }
  for (size_t r = rows; r < kTileRows; ++r) {
    for (size_t p = 0; p < size; ++p) {
      to[p * kTileRows + r] = 0;
    }
  }
}

// Interleaves kTileRows of the Dk columns of all keys, from column `first` on, times the decay of
// each token's update until the end of the chunk: to[j][r] = key[j][first + r] to_end[j].
inline void pack_keys(const float* key, const float* to_end, size_t first, size_t tokens,
                      size_t size, float* to) {
  const size_t rows = smaller(kTileRows, size - first);
  for (size_t j = 0; j < tokens; ++j) {
    const float* from = key + j * size + first;
    for (size_t r = 0; r < rows; ++r) {
      to[j * kTileRows + r] = from[r] * to_end[j];
    }
  }
}

// to[p][x] = key[first + x][p] for kTileColumns tokens, and zeros behind the last token.
inline void transpose_keys(const float* key, size_t first, size_t tokens, size_t size, float* to) {
  const size_t columns = smaller(kTileColumns, tokens - first);
  for (size_t p = 0; p < size; ++p) {
    float* row = to + p * kTileColumns;
    for (size_t x = 0; x < columns; ++x) {
      row[x] = key[(first + x) * size + p];
    }
    for (size_t x = columns; x < kTileColumns; ++x) {
      row[x] = 0;
    }
  }
}

// Writes the scores of one block of tokens, from token `first` on, against the kTileColumns keys
// from token `column` on, for pairs in which the key is not later than the query:
// scores[j][r] = (q_i . k_j) fade[i][j] with i = first + r.
inline void pack_scores(const float* queries, const float* transposed, const float* fade,
                        size_t first, size_t column, size_t tokens, size_t size, float* tile,
                        float* scores) {
  const size_t rows = smaller(kTileRows, tokens - first);
  const size_t columns = smaller(kTileColumns, tokens - column);
  Product<kTileRows>::call(queries, transposed, size, tile);
  for (size_t r = 0; r < rows; ++r) {
    const size_t i = first + r;
    for (size_t x = 0; x < columns && column + x <= i; ++x) {
      scores[(column + x) * kTileRows + r] =
          tile[r * kTileColumns + x] * fade[i * tokens + column + x];
    }
  }
}

void pack(const PackTask& task) {
  const size_t tokens = task.tokens;
  const size_t size = task.key_size;
  const size_t token_blocks = (tokens + kTileRows - 1) / kTileRows;
  const size_t first_block = token_blocks * task.part / task.part_count;
  const size_t last_block = token_blocks * (task.part + 1) / task.part_count;
  const size_t begin = first_block * kTileRows;
  const size_t end = smaller(last_block * kTileRows, tokens);

  float* transposed = task.scratch;
  float* tile = transposed + kTileColumns * size;
  float* fade = tile + kTileRows * kTileColumns;
  float* discarded = fade + (tokens + 1) * tokens;
  float* wide_keys = discarded + tokens;
  float* wide_queries = wide_keys + tokens * size;

  // Every part computes the same numbers; only the first part stores them in the chunk.
  float* of_past = task.part == 0 ? task.packed.fade : discarded;
  fill_fade(task.decay, tokens, begin, end, fade, of_past);

  const float* query = as_floats(task.query, begin, end, size, task.activation, wide_queries);
  const float* key = as_floats(task.key, 0, tokens, size, task.activation, wide_keys);
  for (size_t first = begin; first < end; first += kTileRows) {
    pack_queries(query, first, tokens, size, task.packed.queries + first * size);
  }
  const size_t key_blocks = (size + kTileRows - 1) / kTileRows;
  const size_t key_end = key_blocks * (task.part + 1) / task.part_count;
  for (size_t block = key_blocks * task.part / task.part_count; block < key_end; ++block) {
    const size_t first = block * kTileRows;
    pack_keys(key, fade + tokens * tokens, first, tokens, size, task.packed.keys + first * tokens);
  }
  for (size_t column = 0; column < end; column += kTileColumns) {
    transpose_keys(key, column, tokens, size, transposed);
    for (size_t first = begin; first < end; first += kTileRows) {
      if (column < smaller(first + kTileRows, tokens)) { // some key is not later than the block
        pack_scores(task.packed.queries + first * size, transposed, fade, first, column, tokens,
                    size, tile, task.packed.scores + first * tokens);
      }
    }
  }
}

// How many rows ahead to prefetch while a panel is copied: its rows are a whole row of the matrix
// apart, often on different pages, where hardware prefetchers do not follow.
constexpr size_t kRowsAhead = 12;

template <bool Write> inline void prefetch(const void* from, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(from) + at, Write ? 1 : 0);
  }
}

// Copies `width` columns to [blocks of columns][rows][kTileColumns], with zeros behind the last
// column.
template <class Source>
void pack_columns(const Source& source, size_t rows, size_t width, float* to) {
  for (size_t row = 0; row < rows; ++row) {
    if (row + kRowsAhead < rows) {
      prefetch<false>(source.address(row + kRowsAhead), width * sizeof(*source.from));
    }
    float* block = to + row * kTileColumns;
    for (size_t column = 0; column < width; column += kTileColumns) {
      const size_t columns = smaller(kTileColumns, width - column);
      source.load(row, column, columns, block);
      for (size_t x = columns; x < kTileColumns; ++x) {
        block[x] = 0;
      }
      block += rows * kTileColumns;
    }
  }
}

inline void copy(const float* from, float* to, size_t count) {
  if (count == kTileColumns) {
    store(to, load(from));
    store(to + kLanes, load(from + kLanes));
    return;
  }
  for (size_t x = 0; x < count; ++x) {
    to[x] = from[x];
  }
}

// Sources of pack_columns: a matrix of float32 or float16, whose rows are `stride` elements apart.
struct Floats {
  const float* from;
  size_t stride;

  const void* address(size_t row) const { return from + row * stride; }
  void load(size_t row, size_t column, size_t count, float* to) const {
    copy(from + row * stride + column, to, count);
  }
};

struct Halves {
  const uint16_t* from;
  size_t stride;

  const void* address(size_t row) const { return from + row * stride; }
  void load(size_t row, size_t column, size_t count, float* to) const {
    widen(from + row * stride + column, to, count);
  }
};

void pack_values(const PanelTask& task, size_t token, size_t tokens, float* to) {
  const size_t offset = token * task.value_size + task.column_begin;
  if (task.activation == Activation::kFloat32) {
    const Floats from{static_cast<const float*>(task.value) + offset, task.value_size};
    pack_columns(from, tokens, task.width, to);
  } else {
    const Halves from{static_cast<const uint16_t*>(task.value) + offset, task.value_size};
    pack_columns(from, tokens, task.width, to);
  }
}

// Computes the output of all tokens of a chunk in the panel's columns.
void read_panel(const PanelTask& task, const PackedChunk& chunk, size_t token, size_t tokens,
                const float* state, const float* values, float* tile) {
  const size_t size = task.value_size;
  for (size_t first = 0; first < tokens; first += kTileRows) {
    const size_t rows = smaller(kTileRows, tokens - first);
    const float* queries = chunk.queries + first * task.key_size;
    const float* scores = chunk.scores + first * tokens;
    for (size_t column = 0; column < task.width; column += kTileColumns) {
      const size_t columns = smaller(kTileColumns, task.width - column);
      const size_t offset = (token + first) * size + task.column_begin + column;
      const float* of_state = state + column * task.key_size;
      const float* of_values = values + column * tokens;
      const bool direct = columns == kTileColumns;
      float* to = direct ? task.output + offset : tile;
      with_rows<Read, kTileRows>(rows, queries, of_state, task.key_size, chunk.fade + first, scores,
                                 of_values, first, to, direct ? size : kTileColumns);
      for (size_t r = 0; !direct && r < rows; ++r) {
        copy(tile + r * kTileColumns, task.output + offset + r * size, columns);
      }
    }
  }
}

// Updates the panel with all tokens of a chunk.
void write_panel(const PanelTask& task, const PackedChunk& chunk, size_t tokens, float* state,
                 const float* values) {
  const float fade = chunk.fade[tokens - 1];
  for (size_t first = 0; first < task.key_size; first += kTileRows) {
    const size_t rows = smaller(kTileRows, task.key_size - first);
    const float* keys = chunk.keys + first * tokens;
    for (size_t column = 0; column < task.width; column += kTileColumns) {
      with_rows<Write, kTileRows>(rows, keys, values + column * tokens, tokens, fade,
                                  state + column * task.key_size + first * kTileColumns);
    }
  }
}

void panel(const PanelTask& task) {
  const size_t padded = (task.width + kTileColumns - 1) / kTileColumns * kTileColumns;
  float* state = task.scratch;
  float* values = state + task.key_size * padded;
  float* tile = values + task.chunk_tokens * padded;

  const Floats past{task.past_state + task.column_begin, task.value_size};
  pack_columns(past, task.key_size, task.width, state);
  for (size_t chunk = 0; chunk < task.chunk_count; ++chunk) {
    const size_t token = chunk * task.chunk_tokens;
    const size_t tokens = smaller(task.chunk_tokens, task.tokens - token);
    pack_values(task, token, tokens, values);
    read_panel(task, task.chunks[chunk], token, tokens, state, values, tile);
    write_panel(task, task.chunks[chunk], tokens, state, values);
  }
  for (size_t row = 0; row < task.key_size; ++row) {
    float* to = task.present_state + row * task.value_size + task.column_begin;
    if (row + kRowsAhead < task.key_size) {
      prefetch<true>(to + kRowsAhead * task.value_size, task.width * sizeof(float));
    }
    const float* from = state + row * kTileColumns;
    for (size_t column = 0; column < task.width; column += kTileColumns) {
      copy(from, to + column, smaller(kTileColumns, task.width - column));
      from += task.key_size * kTileColumns;
    }
  }
}

} // namespace

extern const Instructions FWL_INSTRUCTIONS;
const Instructions FWL_INSTRUCTIONS = {kTileRows, kTileColumns, decode, reduce, widen, pack, panel};

} // namespace fwl::cpu

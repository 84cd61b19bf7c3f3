// What one instruction set implements, and the driver combines.
#pragma once

#include "kernels/cpu/linear_attention_update.h"

namespace fwl::cpu {

// One row of the batch, one token: rows [row_begin, row_end) of the state.
struct DecodeBlock {
  const float* query; // [Dk]
  const float* key;   // [Dk]
  const float* value; // [Dv]
  float decay;
  const float* past_state; // [Dk, Dv]
  float* present_state;    // [Dk, Dv]
  float* partial_output;   // [Dv], what these rows add to the output
  size_t row_begin;
  size_t row_end;
  size_t value_size;
};

// Where the packed form of a chunk of tokens lies. A block holds `tile_rows` rows, depth first, so
// that a tile reads its operand in one stream.
struct PackedChunk {
  float* queries; // [blocks of tokens][Dk][tile_rows]
  float* keys;    // [blocks of Dk][tokens][tile_rows], faded to the end of the chunk
  float* scores;  // [blocks of tokens][tokens][tile_rows], q_i . k_j faded from j to i, j <= i
  float* fade;    // [tokens], what is left of the state before the chunk at each token
};

// Packs the blocks of queries, scores and keys that belong to `part` of `part_count`.
struct PackTask {
  const void* query; // the chunk's first token, [tokens, Dk]
  const void* key;   // [tokens, Dk]
  const float* decay;
  size_t tokens;
  size_t key_size;
  Activation activation;
  size_t part;
  size_t part_count;
  PackedChunk packed;
  float* scratch; // pack_scratch_floats()
};

// Runs chunks through `width` columns of the state, which stay in cache meanwhile.
struct PanelTask {
  const PackedChunk* chunks;
  size_t chunk_count;
  size_t chunk_tokens; // of every chunk but the last
  size_t tokens;       // of all chunks together
  size_t key_size;
  size_t value_size;
  Activation activation;
  const void* value; // the first chunk's first token, [tokens, Dv]
  void* output;
  const float* past_state; // [Dk, Dv]
  float* present_state;
  size_t column_begin;
  size_t width;
  float* scratch; // panel_scratch_floats()
};

struct Instructions {
  size_t tile_rows;
  size_t tile_columns;
  void (*decode)(const DecodeBlock& block);
  // output[j] = sum over blocks of partial[block][j], in that order.
  void (*reduce)(const float* partials, size_t block_count, size_t stride, size_t begin, size_t end,
                 Activation activation, void* output);
  void (*widen)(const uint16_t* half, float* wide, size_t count);
  void (*pack)(const PackTask& task);
  void (*panel)(const PanelTask& task);
};

extern const Instructions kPortable;
extern const Instructions kAvx2;
extern const Instructions kAvx512;

// As in linear_attention_update.h, with a table that need not be one of the three.
size_t workspace_bytes(const Sizes& sizes, const Instructions& set);
void linear_attention_update(const Sizes& sizes, const Tensors& tensors, const Instructions& set,
                             void* workspace, const ParallelFor& parallel_for);

// The table of an instruction set.
const Instructions& instructions_of(InstructionSet set);

inline size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

// Floats of scratch a PackTask needs: transposed keys, one tile, the fading of every pair of
// tokens, their fading from the start and, for half precision, the chunk's keys and queries in
// float32.
inline size_t pack_scratch_floats(const Instructions& set, size_t chunk, size_t key_size,
                                  Activation activation) {
  const size_t widened = activation == Activation::kFloat16 ? 2 * chunk * key_size : 0;
  return round_up(set.tile_columns * key_size + set.tile_rows * set.tile_columns +
                      (chunk + 2) * chunk + widened,
                  16);
}

// Floats of scratch a PanelTask needs: the columns of the state and of the chunk's values.
inline size_t panel_scratch_floats(const Instructions& set, size_t chunk, size_t key_size,
                                   size_t width) {
  return round_up((key_size + chunk) * round_up(width, set.tile_columns) +
                      set.tile_rows * set.tile_columns,
                  16);
}

} // namespace fwl::cpu

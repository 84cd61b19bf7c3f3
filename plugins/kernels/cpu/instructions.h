// What each instruction set implements, and linear_attention_update.cpp combines.
#pragma once

#include "kernels/cpu/linear_attention_update.h"

namespace fwl::cpu {

// A task of decode: rows [row_begin, row_end) of one state, for one token.
struct DecodeBlock {
  const float* query; // [Dk]
  const float* key;   // [Dk]
  const float* value; // [Dv]
  float decay;
  const float* past_state; // [Dk, Dv]
  float* present_state;    // [Dk, Dv]
  float* partial_output;   // [Dv], the contribution of these rows to the output
  size_t row_begin;
  size_t row_end;
  size_t value_size;
};

// Memory of the packed form of a chunk of tokens. Each block interleaves `tile_rows` rows, so that
// a tile reads its operand in one stream.
struct PackedChunk {
  float* queries; // [blocks of tokens][Dk][tile_rows]
  float* keys;    // [blocks of Dk][tokens][tile_rows], decayed to the end of the chunk
  float* scores;  // [blocks of tokens][tokens][tile_rows], q_i . k_j decayed from j to i, j <= i
  float* fade;    // [tokens], decay of the state before the chunk up to each token
};

// Packs the blocks of queries, scores and keys that belong to part `part` of `part_count`.
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

// Runs all chunks through `width` columns of the state, which stay in the cache meanwhile.
struct PanelTask {
  const PackedChunk* chunks;
  size_t chunk_count;
  size_t chunk_tokens; // tokens of every chunk but the last, which may be shorter
  size_t tokens;       // tokens of all chunks together
  size_t key_size;
  size_t value_size;
  Activation activation;
  const void* value; // the first chunk's first token, [tokens, Dv]
  float* output;
  const float* past_state; // [Dk, Dv]
  float* present_state;
  size_t column_begin;
  size_t width;
  float* scratch; // panel_scratch_floats()
};

// The functions of one instruction set, and the size of its tiles.
struct Instructions {
  size_t tile_rows;
  size_t tile_columns;
  void (*decode)(const DecodeBlock& block);
  // output[j] = sum of partial[block][j] over the blocks, in order, for j in [begin, end).
  void (*reduce)(const float* partials, size_t block_count, size_t stride, size_t begin, size_t end,
                 float* output);
  void (*widen)(const uint16_t* half, float* wide, size_t count);
  void (*pack)(const PackTask& task);
  void (*panel)(const PanelTask& task);
};

extern const Instructions kPortable;
extern const Instructions kAvx2;
extern const Instructions kAvx512;

// The same functions as in linear_attention_update.h, with a table that need not be one of the
// three.
size_t workspace_bytes(const Sizes& sizes, const Instructions& set);
void linear_attention_update(const Sizes& sizes, const Tensors& tensors, const Instructions& set,
                             void* workspace, const ParallelFor& parallel_for);

// Returns the table of an instruction set.
const Instructions& instructions_of(InstructionSet set);

inline size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

// Returns the floats of scratch that a PackTask needs: transposed keys, one tile, the decay between
// every two tokens and from the start to each token, and for half precision the chunk's keys and
// queries in float32.
inline size_t pack_scratch_floats(const Instructions& set, size_t chunk, size_t key_size,
                                  Activation activation) {
  const size_t widened = activation == Activation::kFloat16 ? 2 * chunk * key_size : 0;
  return round_up(set.tile_columns * key_size + set.tile_rows * set.tile_columns +
                      (chunk + 2) * chunk + widened,
                  16);
}

// Returns the floats of scratch that a PanelTask needs: its columns of the state and of the chunk's
// values, and one tile.
inline size_t panel_scratch_floats(const Instructions& set, size_t chunk, size_t key_size,
                                   size_t width) {
  return round_up((key_size + chunk) * round_up(width, set.tile_columns) +
                      set.tile_rows * set.tile_columns,
                  16);
}

} // namespace fwl::cpu

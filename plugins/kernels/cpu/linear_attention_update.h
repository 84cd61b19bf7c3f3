// The op on a CPU: update a matrix of fast weights token by token, then read it.
//
//     S_i = d_i S_{i-1} + k_i (outer) v_i        o_i = q_i^T S_i        i = 1 ... T
//
// Knows no framework, starts no thread and allocates nothing: the caller brings the memory and a
// way to run tasks in parallel. Results depend on the sizes and the instruction set only, never on
// the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwl::cpu {

// Type of query, key, value and output. The state and the decay are float32 always.
enum class Activation { kFloat32, kFloat16 };

struct Sizes {
  size_t batch;      // B, 1 or more
  size_t tokens;     // T, 1 or more
  size_t key_size;   // Dk
  size_t value_size; // Dv
  Activation activation;
};

// Pointers to contiguous tensors. `present_state` may be `past_state`; nothing else may overlap
// with an output.
struct Tensors {
  const void* query;       // [B, T, Dk]
  const void* key;         // [B, T, Dk]
  const void* value;       // [B, T, Dv]
  const float* decay;      // [B, T] in [0, 1], applied before the token's own write
  const float* past_state; // [B, Dk, Dv]
  void* output;            // [B, T, Dv]
  float* present_state;    // [B, Dk, Dv]
};

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512};

const char* name_of(InstructionSet set);

// Whether it was compiled in and this machine has it.
bool is_available(InstructionSet set);

// The widest that is available.
InstructionSet best_instruction_set();

// Runs task(context, i) for every i below count, in any order and on any threads, and returns when
// all are done.
struct ParallelFor {
  void (*run)(void* self, void (*task)(void* context, size_t index), size_t count, void* context);
  void* self;
};

// Bytes that `linear_attention_update` needs to work in; any alignment. Most of it is touched by
// long calls only, and grows with T up to a limit of some 32 MiB.
size_t workspace_bytes(const Sizes& sizes, InstructionSet set);

// Computes output and present state. `set` must be available.
void linear_attention_update(const Sizes& sizes, const Tensors& tensors, InstructionSet set,
                             void* workspace, const ParallelFor& parallel_for);

} // namespace fwl::cpu

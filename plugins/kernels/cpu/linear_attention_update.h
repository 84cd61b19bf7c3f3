// The op on the CPU: for each token, update a matrix of fast weights, then read it.
//
//     S_i = d_i S_{i-1} + k_i (outer) v_i        o_i = q_i^T S_i        i = 1 ... T
//
// The code depends on no framework, starts no threads and allocates no memory: the caller provides
// the workspace and a way to run tasks in parallel. Results depend on the sizes and the instruction
// set only, never on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwl::cpu {

// The type of query, key and value. All other tensors are always float32.
enum class Activation { kFloat32, kFloat16 };

struct Sizes {
  size_t batch;      // B, 1 or more
  size_t tokens;     // T, 1 or more
  size_t key_size;   // Dk
  size_t value_size; // Dv
  Activation activation;
};

// Pointers to contiguous tensors. `present_state` may equal `past_state`; otherwise outputs must
// not overlap with anything.
struct Tensors {
  const void* query;       // [B, T, Dk]
  const void* key;         // [B, T, Dk]
  const void* value;       // [B, T, Dv]
  const float* decay;      // [B, T] in [0, 1], applied before the token's own update
  const float* past_state; // [B, Dk, Dv]
  float* output;           // [B, T, Dv]
  float* present_state;    // [B, Dk, Dv]
};

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512};

const char* name_of(InstructionSet set);

// Returns whether an instruction set was compiled in and this machine has it.
bool is_available(InstructionSet set);

// Returns the widest instruction set that is available.
InstructionSet best_instruction_set();

// How to run tasks in parallel. `run` calls task(context, i) for every i below `count`, in any
// order and on any threads, and returns when all calls have returned.
struct ParallelFor {
  void (*run)(void* self, void (*task)(void* context, size_t index), size_t count, void* context);
  void* self;
};

// Returns the bytes of workspace that `linear_attention_update` needs, at any alignment. They grow
// with T up to some 32 MiB. Most of the workspace is touched by long calls only.
size_t workspace_bytes(const Sizes& sizes, InstructionSet set);

// Computes output and present state. `set` must be available, and `workspace` must have
// workspace_bytes(sizes, set).
void linear_attention_update(const Sizes& sizes, const Tensors& tensors, InstructionSet set,
                             void* workspace, const ParallelFor& parallel_for);

} // namespace fwl::cpu

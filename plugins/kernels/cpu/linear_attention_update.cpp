#include "kernels/cpu/linear_attention_update.h"

#include <algorithm>
#include <atomic>

#include "kernels/cpu/instructions.h"

namespace fwl::cpu {
namespace {

constexpr size_t kAlignment = 64;

// With fewer multiplications than this, a second thread costs more than it saves.
constexpr size_t kSerialWork = size_t{1} << 16;

// Decode splits the rows of a state into blocks of about this many floats...
constexpr size_t kDecodeBlockFloats = size_t{1} << 15;
// ...but into at most this many blocks: each has its own output, and they are added at the end.
constexpr size_t kDecodeBlocks = 16;
constexpr size_t kReduceColumns = 1024;

// Calls of at most this many tokens run one token at a time: that many passes over the state cost
// less than copying its panels. The limit is higher if the state fits a core's own cache.
constexpr size_t kFewTokens = 4;
constexpr size_t kFewTokensInCache = 16;
constexpr size_t kCachedFloats = size_t{1} << 15;

// Floats of a panel of the state, which shares a core's second-level cache with its operands.
constexpr size_t kPanelFloats = size_t{1} << 16;

// Floats of packed chunks that are kept at the same time.
constexpr size_t kPackedFloats = size_t{1} << 23;

// The most workers: tasks that run at the same time, each with scratch memory of its own. A worker
// takes work until none is left, so scratch is touched only for workers that really run.
constexpr size_t kMaxWorkers = 64;

size_t divide_up(size_t value, size_t by) {
  return (value + by - 1) / by;
}

// Runs function(i) for every i below count: in order on this thread if `serial`, else in parallel.
template <class Function>
void for_each(const ParallelFor& parallel_for, bool serial, size_t count,
              const Function& function) {
  if (serial || count == 1) {
    for (size_t i = 0; i < count; ++i) {
      function(i);
    }
    return;
  }
  const auto call = [](void* context, size_t i) { (*static_cast<const Function*>(context))(i); };
  parallel_for.run(parallel_for.self, call, count,
                   const_cast<void*>(static_cast<const void*>(&function)));
}

// Runs function(i, worker) likewise, with the number of the worker that runs it, below `workers`.
template <class Function>
void for_each_with_worker(const ParallelFor& parallel_for, bool serial, size_t count,
                          size_t workers, const Function& function) {
  std::atomic<size_t> next{0};
  for_each(parallel_for, serial, serial ? 1 : std::min(count, workers), [&](size_t worker) {
    for (size_t i = next++; i < count; i = next++) {
      function(i, worker);
    }
  });
}

bool is_decode(const Sizes& sizes) {
  const bool cached = sizes.key_size * sizes.value_size <= kCachedFloats;
  return sizes.tokens <= (cached ? kFewTokensInCache : kFewTokens);
}

// How a call of few tokens is divided into tasks.
struct DecodePlan {
  explicit DecodePlan(const Sizes& sizes) {
    const size_t wanted = divide_up(sizes.key_size * sizes.value_size, kDecodeBlockFloats);
    block_rows =
        round_up(divide_up(sizes.key_size, std::clamp(wanted, size_t{1}, kDecodeBlocks)), 4);
    blocks = divide_up(sizes.key_size, block_rows);
    stride = round_up(sizes.value_size, kAlignment / sizeof(float));
    widened = sizes.activation == Activation::kFloat16
                  ? round_up(2 * sizes.key_size + sizes.value_size, kAlignment / sizeof(float))
                  : 0;
    floats = sizes.batch * (blocks * stride + sizes.tokens * widened);
  }

  size_t block_rows;
  size_t blocks;  // blocks of rows of one state
  size_t stride;  // floats between the outputs of two blocks
  size_t widened; // floats of one token's query, key and value in float32; 0 if they are float32
  size_t floats;
};

// How a call of several tokens is divided into tasks.
struct PrefillPlan {
  PrefillPlan(const Sizes& sizes, const Instructions& set) {
    // Longer chunks pass over the panel less often, but spend more on products inside the chunk.
    const size_t longest = sizes.key_size > 512 ? 128 : 64;
    const size_t chunks = divide_up(sizes.tokens, longest);
    chunk = std::min(sizes.tokens, longest);
    token_blocks = divide_up(chunk, set.tile_rows);
    const size_t key_blocks = divide_up(sizes.key_size, set.tile_rows);
    query_floats = round_up(token_blocks * sizes.key_size * set.tile_rows, 16);
    key_floats = round_up(key_blocks * chunk * set.tile_rows, 16);
    score_floats = round_up(token_blocks * chunk * set.tile_rows, 16);
    slot_floats = query_floats + key_floats + score_floats + round_up(chunk, 16);

    const size_t slots = std::max<size_t>(1, kPackedFloats / slot_floats);
    step_chunks = std::min(chunks, slots);
    step_rows = std::min(sizes.batch, slots / step_chunks);

    // As wide as the cache allows, but narrow enough for many threads to have a panel each.
    const size_t fitting = kPanelFloats / std::max<size_t>(1, sizes.key_size);
    const size_t shared = divide_up(sizes.value_size * step_rows, 8);
    width =
        std::max(set.tile_columns, std::min(fitting, shared) / set.tile_columns * set.tile_columns);
    width = std::min(width, round_up(sizes.value_size, set.tile_columns));
    panels = divide_up(sizes.value_size, width);

    parts = std::clamp<size_t>(16 / (step_chunks * step_rows), 1,
                               std::max<size_t>(1, token_blocks / 4));
    pack_workers = std::min(kMaxWorkers, step_rows * step_chunks * parts);
    panel_workers = std::min(kMaxWorkers, step_rows * panels);
    pack_scratch = pack_scratch_floats(set, chunk, sizes.key_size, sizes.activation);
    panel_scratch = panel_scratch_floats(set, chunk, sizes.key_size, width);
    scratch_floats = std::max(pack_workers * pack_scratch, panel_workers * panel_scratch);
    slot_count = step_rows * step_chunks;
    table_floats = round_up(slot_count * sizeof(PackedChunk) / sizeof(float), 16);
    floats = table_floats + slot_count * slot_floats + scratch_floats;
  }

  PackedChunk slot(float* memory, size_t index) const {
    float* queries = memory + index * slot_floats;
    float* keys = queries + query_floats;
    float* scores = keys + key_floats;
    return {queries, keys, scores, scores + score_floats};
  }

  size_t chunk; // tokens of a chunk
  size_t token_blocks;
  size_t query_floats;
  size_t key_floats;
  size_t score_floats;
  size_t slot_floats; // floats of a slot, which holds one packed chunk
  size_t slot_count;
  size_t table_floats; // floats of the table of slots
  size_t step_chunks;  // chunks of each row that are packed at the same time
  size_t step_rows;    // rows of the batch that are computed at the same time
  size_t width;        // columns of a panel
  size_t panels;
  size_t parts; // tasks that pack one chunk
  size_t pack_workers;
  size_t panel_workers;
  size_t pack_scratch;
  size_t panel_scratch;
  size_t scratch_floats;
  size_t floats;
};

const void* offset(const void* tensor, size_t elements, Activation activation) {
  const size_t size = activation == Activation::kFloat16 ? 2 : 4;
  return static_cast<const char*>(tensor) + elements * size;
}

void run_decode(const Sizes& sizes, const Tensors& tensors, const Instructions& set, float* memory,
                const ParallelFor& parallel_for) {
  const DecodePlan plan(sizes);
  const size_t key_size = sizes.key_size;
  const size_t value_size = sizes.value_size;
  float* partials = memory;
  float* widened = partials + sizes.batch * plan.blocks * plan.stride;
  const float* query = static_cast<const float*>(tensors.query);
  const float* key = static_cast<const float*>(tensors.key);
  const float* value = static_cast<const float*>(tensors.value);
  if (sizes.activation == Activation::kFloat16) {
    const size_t count = sizes.batch * sizes.tokens;
    float* query32 = widened;
    float* key32 = query32 + count * key_size;
    float* value32 = key32 + count * key_size;
    set.widen(static_cast<const uint16_t*>(tensors.query), query32, count * key_size);
    set.widen(static_cast<const uint16_t*>(tensors.key), key32, count * key_size);
    set.widen(static_cast<const uint16_t*>(tensors.value), value32, count * value_size);
    query = query32;
    key = key32;
    value = value32;
  }
  const bool serial = sizes.batch * key_size * value_size < kSerialWork;
  const bool short_sums = sizes.batch * plan.blocks * value_size < kSerialWork;
  const size_t slabs = divide_up(value_size, kReduceColumns);
  for (size_t token = 0; token < sizes.tokens; ++token) {
    const float* past = token == 0 ? tensors.past_state : tensors.present_state;
    for_each(parallel_for, serial, sizes.batch * plan.blocks, [&](size_t task) {
      const size_t row = task / plan.blocks;
      const size_t at = row * sizes.tokens + token;
      const size_t state = row * key_size * value_size;
      const size_t begin = task % plan.blocks * plan.block_rows;
      set.decode({query + at * key_size, key + at * key_size, value + at * value_size,
                  tensors.decay[at], past + state, tensors.present_state + state,
                  partials + task * plan.stride, begin, std::min(begin + plan.block_rows, key_size),
                  value_size});
    });
    for_each(parallel_for, short_sums, sizes.batch * slabs, [&](size_t task) {
      const size_t row = task / slabs;
      const size_t begin = task % slabs * kReduceColumns;
      set.reduce(partials + row * plan.blocks * plan.stride, plan.blocks, plan.stride, begin,
                 std::min(begin + kReduceColumns, value_size),
                 tensors.output + (row * sizes.tokens + token) * value_size);
    });
  }
}

// Computes tokens [first, first + tokens) of `rows` rows of the batch, from `first_row` on.
void run_step(const Sizes& sizes, const Tensors& tensors, const Instructions& set,
              const PrefillPlan& plan, float* memory, const ParallelFor& parallel_for,
              size_t first_row, size_t rows, size_t first, size_t tokens) {
  const size_t chunks = divide_up(tokens, plan.chunk);
  const bool serial = rows * tokens * sizes.key_size * sizes.value_size < kSerialWork;
  PackedChunk* slots = reinterpret_cast<PackedChunk*>(memory);
  float* packed = memory + plan.table_floats;
  float* scratch = packed + plan.slot_count * plan.slot_floats;
  for (size_t slot = 0; slot < rows * chunks; ++slot) {
    slots[slot] = plan.slot(packed, slot);
  }
  const auto token_at = [&](size_t row, size_t token) {
    return (first_row + row) * sizes.tokens + first + token;
  };

  for_each_with_worker(parallel_for, serial, rows * chunks * plan.parts, plan.pack_workers,
                       [&](size_t task, size_t worker) {
                         const size_t slot = task / plan.parts;
                         const size_t token = slot % chunks * plan.chunk;
                         const size_t at = token_at(slot / chunks, token);
                         set.pack({offset(tensors.query, at * sizes.key_size, sizes.activation),
                                   offset(tensors.key, at * sizes.key_size, sizes.activation),
                                   tensors.decay + at, std::min(plan.chunk, tokens - token),
                                   sizes.key_size, sizes.activation, task % plan.parts, plan.parts,
                                   slots[slot], scratch + worker * plan.pack_scratch});
                       });

  const float* past = first == 0 ? tensors.past_state : tensors.present_state;
  const size_t state_floats = sizes.key_size * sizes.value_size;
  for_each_with_worker(parallel_for, serial, rows * plan.panels, plan.panel_workers,
                       [&](size_t task, size_t worker) {
                         const size_t row = task / plan.panels;
                         const size_t column = task % plan.panels * plan.width;
                         const size_t at = token_at(row, 0) * sizes.value_size;
                         set.panel({slots + row * chunks, chunks, plan.chunk, tokens,
                                    sizes.key_size, sizes.value_size, sizes.activation,
                                    offset(tensors.value, at, sizes.activation),
                                    tensors.output + at, past + (first_row + row) * state_floats,
                                    tensors.present_state + (first_row + row) * state_floats,
                                    column, std::min(plan.width, sizes.value_size - column),
                                    scratch + worker * plan.panel_scratch});
                       });
}

void run_prefill(const Sizes& sizes, const Tensors& tensors, const Instructions& set, float* memory,
                 const ParallelFor& parallel_for) {
  const PrefillPlan plan(sizes, set);
  const size_t step = plan.step_chunks * plan.chunk;
  for (size_t row = 0; row < sizes.batch; row += plan.step_rows) {
    const size_t rows = std::min(plan.step_rows, sizes.batch - row);
    for (size_t token = 0; token < sizes.tokens; token += step) {
      run_step(sizes, tensors, set, plan, memory, parallel_for, row, rows, token,
               std::min(step, sizes.tokens - token));
    }
  }
}

} // namespace

const Instructions& instructions_of(InstructionSet set) {
#ifdef FWL_HAVE_X86
  if (set == InstructionSet::kAvx512) {
    return kAvx512;
  }
  if (set == InstructionSet::kAvx2) {
    return kAvx2;
  }
#endif
  static_cast<void>(set);
  return kPortable;
}

const char* name_of(InstructionSet set) {
  switch (set) {
  case InstructionSet::kAvx512:
    return "AVX-512";
  case InstructionSet::kAvx2:
    return "AVX2";
  default:
    return "portable";
  }
}

bool is_available(InstructionSet set) {
  switch (set) {
#ifdef FWL_HAVE_X86
  case InstructionSet::kAvx512:
    return __builtin_cpu_supports("avx512f") && is_available(InstructionSet::kAvx2);
  case InstructionSet::kAvx2:
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  default:
    return set == InstructionSet::kPortable;
  }
}

InstructionSet best_instruction_set() {
  InstructionSet best = InstructionSet::kPortable;
  for (const InstructionSet set : kInstructionSets) {
    if (is_available(set)) {
      best = set;
    }
  }
  return best;
}

size_t workspace_bytes(const Sizes& sizes, const Instructions& set) {
  const size_t floats =
      is_decode(sizes) ? DecodePlan(sizes).floats : PrefillPlan(sizes, set).floats;
  return floats * sizeof(float) + kAlignment;
}

size_t workspace_bytes(const Sizes& sizes, InstructionSet set) {
  return workspace_bytes(sizes, instructions_of(set));
}

void linear_attention_update(const Sizes& sizes, const Tensors& tensors, const Instructions& set,
                             void* workspace, const ParallelFor& parallel_for) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  float* memory = reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
  if (is_decode(sizes)) {
    run_decode(sizes, tensors, set, memory, parallel_for);
  } else {
    run_prefill(sizes, tensors, set, memory, parallel_for);
  }
}

void linear_attention_update(const Sizes& sizes, const Tensors& tensors, InstructionSet set,
                             void* workspace, const ParallelFor& parallel_for) {
  linear_attention_update(sizes, tensors, instructions_of(set), workspace, parallel_for);
}

} // namespace fwl::cpu

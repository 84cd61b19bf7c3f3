// What a backend implements.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace fwl::embed {

// The state of all rows: one block of memory for each tensor, [rows, ...], zeros at first.
class Buffers {
public:
  Buffers(const std::vector<TensorSpec>& specs, size_t rows);

  char* tensor(size_t index) const { return start_ + offsets_[index]; }
  char* row(size_t index, size_t row, const TensorSpec& spec) const {
    return tensor(index) + row * spec.bytes();
  }

private:
  std::unique_ptr<char[]> memory_;
  char* start_; // aligned
  std::vector<size_t> offsets_;
};

// One call of the model; see fwl_export/runtimes/base.py. All arrays have `rows` rows.
struct Call {
  std::vector<int64_t> input_ids; // [rows, tokens]
  std::vector<float> label_weights;
  std::vector<int64_t> lengths;         // [rows]
  std::vector<int64_t> logit_positions; // [rows, positions]
  std::vector<float> learning_rate_scale; // [rows]
  size_t tokens;
  size_t positions;
};

// One session's way to a loaded model.
class Runner {
public:
  virtual ~Runner() = default;
  // Reads `past`, overwrites `present` (never the same) and `logits` [rows, positions, V].
  virtual void run(const Call& call, const Buffers& past, const Buffers& present,
                   std::vector<float>& logits) = 0;
  // Forgets buffers that no call will use again.
  virtual void release(const Buffers& buffers) = 0;
};

class Backend {
public:
  virtual ~Backend() = default;
  virtual std::unique_ptr<Runner> runner(size_t rows) const = 0;
};

// Throws Failure: the library is missing or too old, or refuses the model.
std::shared_ptr<const Backend> open_onnxruntime(const Bundle& bundle, const char* library,
                                                const char* plugin, int threads);

} // namespace fwl::embed

// What a backend implements.
#pragma once

#include <array>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace fwl::internal {

// The state of all rows, in the memory that a backend computes in; zeros at first.
class Buffers {
public:
  virtual ~Buffers() = default;
  // Copies a row out, its tensors one after the other.
  virtual void read(size_t row, char* state) const = 0;
  // Returns where rows are to be written: these buffers, where writing cannot fail, or else
  // `spare`, with all rows copied to it, for the caller to change over to once all is written.
  virtual Buffers& writable(Buffers& spare) = 0;
  // Copies a row in. Only on what `writable` returned.
  virtual void write(size_t row, const char* state) = 0;
};

// One call of the model; see fwl_export/runtimes/base.py. All arrays have `rows` rows.
struct Call {
  std::vector<int64_t> input_ids; // [rows, tokens]
  std::vector<float> label_weights;
  std::vector<int64_t> lengths;           // [rows]
  std::vector<int64_t> logit_positions;   // [rows, positions]
  std::vector<float> learning_rate_scale; // [rows]
  size_t tokens;
  size_t positions;
};

// An array of a call, by the model's name for it.
struct Input {
  const char* name;
  Type type;
  size_t width; // of a row; 0: one value, and no axis for it
  const void* data;
  size_t bytes;
};

inline std::array<Input, 5> inputs_of(const Call& call) {
  const auto integers = [](const char* name, size_t width, const std::vector<int64_t>& data) {
    return Input{name, Type::kInt64, width, data.data(), data.size() * sizeof(int64_t)};
  };
  const auto floats = [](const char* name, size_t width, const std::vector<float>& data) {
    return Input{name, Type::kFloat32, width, data.data(), data.size() * sizeof(float)};
  };
  return {integers("input_ids", call.tokens, call.input_ids),
          floats("label_weights", call.tokens, call.label_weights),
          integers("lengths", 0, call.lengths),
          integers("logit_positions", call.positions, call.logit_positions),
          floats("learning_rate_scale", 0, call.learning_rate_scale)};
}

// One session's way to a loaded model.
class Runner {
public:
  virtual ~Runner() = default;
  virtual std::unique_ptr<Buffers> buffers() = 0;
  // Reads `past`, overwrites `present` (never the same) and `logits` [rows, positions, V].
  virtual void run(const Call& call, const Buffers& past, Buffers& present,
                   std::vector<float>& logits) = 0;
  // Forgets buffers that no call will use again.
  virtual void release(const Buffers& buffers) = 0;
};

class Backend {
public:
  virtual ~Backend() = default;
  virtual std::unique_ptr<Runner> runner(size_t rows) const = 0;
  virtual const char* name() const = 0;
  // Of the engine, or "".
  virtual std::string engine() const { return ""; }
  // Largest call; the bundle may say less.
  virtual int64_t max_tokens() const { return std::numeric_limits<int64_t>::max(); }
};

// Throws Failure: the library is missing or too old, or refuses the model.
std::shared_ptr<const Backend> open_onnxruntime(const Bundle& bundle, const char* library,
                                                const char* plugin, int threads);

struct TensorRtOptions {
  const char* library; // path, or null
  const char* plugin;  // path, or null
  int device;
  bool allow_embedded_plugin;
};

// Throws Absent: the library, a GPU or an engine for it is not there; Failure: what is there does
// not work.
std::shared_ptr<const Backend> open_tensorrt(const Bundle& bundle, const TensorRtOptions& options);

} // namespace fwl::internal

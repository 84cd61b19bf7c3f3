// What a runtime implements: what loads a bundle's model and computes its calls.
#pragma once

#include <array>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "bundle.h"
#include "model_inputs.h"

namespace fwl::internal {

// The state of all rows, in the memory that the runtime computes in. New buffers hold zeros.
class Buffers {
public:
  virtual ~Buffers() = default;
  // Copies the state of one row to `state`, its tensors one after the other.
  virtual void read(size_t row, char* state) const = 0;
  // Returns the buffers to which rows may be written: these ones, if writing cannot fail; else
  // `spare`, after copying all rows to it, and the caller swaps the two once all is written.
  virtual Buffers& writable(Buffers& spare) = 0;
  // Copies the state of one row in. Only for buffers that `writable` returned, or that nobody needs
  // any more if it fails.
  virtual void write(size_t row, const char* state) = 0;
};

// One call of the model; see fwl_export/runtimes/base.py.
struct Call : model::Inputs {
  size_t tokens;    // second axis of inputs with one value per token
  size_t positions; // second axis of logit_positions, and of the logits
};

// One input of a call, as a runtime passes it on.
struct Input {
  const char* name;
  Type type;
  size_t width; // size of the second axis; 0 if rows are the only axis
  const void* data;
  size_t bytes;
};

inline std::array<Input, model::kInputCount> inputs_of(const Call& call) {
  std::array<Input, model::kInputCount> inputs{};
  size_t count = 0;
  call.for_each([&](const char* name, const auto& values, model::Axis axis) {
    using Value = typename std::decay_t<decltype(values)>::value_type;
    const Type type = std::is_same_v<Value, float> ? Type::kFloat32 : Type::kInt64;
    const size_t width = axis == model::Axis::kTokens      ? call.tokens
                         : axis == model::Axis::kPositions ? call.positions
                                                           : 0;
    inputs[count++] = {name, type, width, values.data(), values.size() * sizeof(Value)};
  });
  return inputs;
}

// Runs the calls of one session.
class Runner {
public:
  virtual ~Runner() = default;
  // Returns new buffers, for fresh rows.
  virtual std::unique_ptr<Buffers> buffers() = 0;
  // Reads `past`, overwrites `present` (never the same buffers) and `logits` [rows, positions, V].
  virtual void run(const Call& call, const Buffers& past, Buffers& present,
                   std::vector<float>& logits) = 0;
  // Forgets buffers that no later call will use.
  virtual void release(const Buffers& buffers) = 0;
};

// A loaded model.
class Runtime {
public:
  virtual ~Runtime() = default;
  // Returns a runner for a session of `rows` rows.
  virtual std::unique_ptr<Runner> runner(size_t rows) const = 0;
  // The runtime's name in fwl_options.backend.
  virtual const char* name() const = 0;
  // The name of the engine that runs, or "" if the runtime has no engines.
  virtual std::string engine() const { return ""; }
  // The most tokens per row of one call; the bundle may set a lower limit.
  virtual int64_t max_tokens() const { return std::numeric_limits<int64_t>::max(); }
};

// Opens ONNX Runtime and loads the model. `library` and `plugin` are paths, or null: the library is
// then found by its name, and the model runs without the plugin. With 0 `threads`, ONNX Runtime
// chooses their number. Throws Failure if the library is missing or too old, or refuses the model.
std::shared_ptr<const Runtime> open_onnxruntime(const Bundle& bundle, const char* library,
                                                const char* plugin, int threads);

struct TensorRtOptions {
  const char* library; // path of TensorRT, or null: found by its name
  const char* plugin;  // path of libfwl_trt, or null: the one beside libfwl
  int device;          // the GPU's number, from 0
  bool allow_embedded_plugin;
};

// Opens TensorRT and loads an engine of the bundle. Throws Absent if there is no library, no GPU or
// no engine for them, and Failure if one of these is there but does not work.
std::shared_ptr<const Runtime> open_tensorrt(const Bundle& bundle, const TensorRtOptions& options);

} // namespace fwl::internal

// Backend: ONNX Runtime, opened when a program asks for it.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <map>

#include "backend.h"
#include "error.h"

namespace fwl::embed {
namespace {

// The oldest that has all we call; newer runtimes serve it too.
constexpr uint32_t kApiVersion = 17;

// Runtimes are tried under these names, where the dynamic loader looks.
constexpr const char* kNames[] = {"libonnxruntime.so", "libonnxruntime.so.1"};

const OrtApi& load_api(const char* path) {
  void* library = nullptr;
  std::string reason;
  const auto attempt = [&](const char* name) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL); // never closed: it does not bear it
    if (library == nullptr) {
      const char* const text = dlerror();
      reason = text != nullptr ? text : name;
    }
  };
  if (path != nullptr) {
    attempt(path);
  } else {
    for (const char* name : kNames) {
      if (library == nullptr) {
        attempt(name);
      }
    }
  }
  if (library == nullptr) {
    throw Failure(FWL_ERROR_RUNTIME, "ONNX Runtime cannot be opened (" + reason +
                                         "); give the path of libonnxruntime.so");
  }
  using Base = const OrtApiBase* (*)();
  const auto base = reinterpret_cast<Base>(dlsym(library, "OrtGetApiBase"));
  const OrtApi* const api = base == nullptr ? nullptr : base()->GetApi(kApiVersion);
  if (api == nullptr) {
    throw Failure(FWL_ERROR_RUNTIME,
                  std::string("'") + (path != nullptr ? path : kNames[0]) +
                      "' is not ONNX Runtime 1.17 or newer; give the path of another one");
  }
  return *api;
}

// Handles of ONNX Runtime's, given back at the end.
template <class Handle> class Owned {
public:
  Owned() = default;
  Owned(Handle* handle, void (*release)(Handle*)) : handle_(handle), release_(release) {}
  Owned(Owned&& other) noexcept { *this = std::move(other); }
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) {
      release_(handle_);
    }
  }
  Handle* get() const { return handle_; }

private:
  Handle* handle_ = nullptr;
  void (*release_)(Handle*) = nullptr;
};

ONNXTensorElementDataType onnx_type(Type type) {
  return type == Type::kFloat32   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
         : type == Type::kFloat16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                  : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

class OnnxRuntime final : public Backend, public std::enable_shared_from_this<OnnxRuntime> {
public:
  OnnxRuntime(const Bundle& bundle, const char* library, const char* plugin, int threads)
      : api(load_api(library)), specs(bundle.state), vocab_size(bundle.vocab_size) {
    OrtEnv* env = nullptr;
    check(api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "fwl", &env), FWL_ERROR_RUNTIME);
    env_ = {env, api.ReleaseEnv};
    OrtSessionOptions* options = nullptr;
    check(api.CreateSessionOptions(&options), FWL_ERROR_RUNTIME);
    const Owned<OrtSessionOptions> owned_options(options, api.ReleaseSessionOptions);
    if (threads > 0) {
      check(api.SetIntraOpNumThreads(options, threads), FWL_ERROR_RUNTIME);
    }
    if (plugin != nullptr) {
      check(api.RegisterCustomOpsLibrary_V2(options, plugin), FWL_ERROR_RUNTIME);
    }
    OrtSession* opened = nullptr;
    check(api.CreateSession(env, bundle.model_path.c_str(), options, &opened), FWL_ERROR_BUNDLE);
    session_ = {opened, api.ReleaseSession};
    OrtMemoryInfo* info = nullptr;
    check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), FWL_ERROR_RUNTIME);
    memory_ = {info, api.ReleaseMemoryInfo};
  }

  std::unique_ptr<Runner> runner(size_t rows) const override;

  void check(OrtStatus* status, fwl_status kind) const {
    if (status == nullptr) {
      return;
    }
    const std::string message = std::string("ONNX Runtime: ") + api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw Failure(kind, message);
  }

  Owned<OrtValue> value(const void* data, size_t bytes, const std::vector<int64_t>& shape,
                        ONNXTensorElementDataType type) const {
    OrtValue* made = nullptr;
    check(api.CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<void*>(data), bytes,
                                             shape.data(), shape.size(), type, &made),
          FWL_ERROR_RUNTIME);
    return {made, api.ReleaseValue};
  }

  OrtSession* session() const { return session_.get(); }

  const OrtApi& api;
  const std::vector<TensorSpec> specs;
  const int64_t vocab_size;

private:
  Owned<OrtEnv> env_;
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
};

// A call whose inputs and outputs have their place; it may run again with other values.
class BoundCall {
public:
  BoundCall(const OnnxRuntime& runtime, size_t rows, const Call& call, const Buffers& past,
            const Buffers& present)
      : runtime_(runtime), call_(call),
        logits_(rows * call.positions * static_cast<size_t>(runtime.vocab_size)) {
    OrtIoBinding* binding = nullptr;
    runtime.check(runtime.api.CreateIoBinding(runtime.session(), &binding), FWL_ERROR_RUNTIME);
    binding_ = {binding, runtime.api.ReleaseIoBinding};
    const auto count = static_cast<int64_t>(rows);
    const auto tokens = static_cast<int64_t>(call.tokens);
    const auto positions = static_cast<int64_t>(call.positions);
    input("input_ids", call_.input_ids, {count, tokens}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    input("label_weights", call_.label_weights, {count, tokens},
          ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    input("lengths", call_.lengths, {count}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    input("logit_positions", call_.logit_positions, {count, positions},
          ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    input("learning_rate_scale", call_.learning_rate_scale, {count},
          ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    for (size_t i = 0; i < runtime.specs.size(); ++i) {
      const TensorSpec& spec = runtime.specs[i];
      std::vector<int64_t> shape{count};
      shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
      const size_t bytes = rows * spec.bytes();
      bind_input("past." + spec.name,
                 runtime.value(past.tensor(i), bytes, shape, onnx_type(spec.type)));
      bind_output("present." + spec.name,
                  runtime.value(present.tensor(i), bytes, shape, onnx_type(spec.type)));
    }
    bind_output("logits", runtime.value(logits_.data(), logits_.size() * sizeof(float),
                                        {count, positions, runtime.vocab_size},
                                        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
  }

  void run(const Call& call, std::vector<float>& logits) {
    // Not assigned: the memory that is bound must stay where it is.
    std::copy(call.input_ids.begin(), call.input_ids.end(), call_.input_ids.begin());
    std::copy(call.label_weights.begin(), call.label_weights.end(), call_.label_weights.begin());
    std::copy(call.lengths.begin(), call.lengths.end(), call_.lengths.begin());
    std::copy(call.logit_positions.begin(), call.logit_positions.end(),
              call_.logit_positions.begin());
    std::copy(call.learning_rate_scale.begin(), call.learning_rate_scale.end(),
              call_.learning_rate_scale.begin());
    runtime_.check(runtime_.api.RunWithBinding(runtime_.session(), nullptr, binding_.get()),
                   FWL_ERROR_RUNTIME);
    logits = logits_;
  }

private:
  template <class Value>
  void input(const char* name, const std::vector<Value>& data, const std::vector<int64_t>& shape,
             ONNXTensorElementDataType type) {
    bind_input(name, runtime_.value(data.data(), data.size() * sizeof(Value), shape, type));
  }
  void bind_input(const std::string& name, Owned<OrtValue> value) {
    runtime_.check(runtime_.api.BindInput(binding_.get(), name.c_str(), value.get()),
                   FWL_ERROR_RUNTIME);
    values_.push_back(std::move(value));
  }
  void bind_output(const std::string& name, Owned<OrtValue> value) {
    runtime_.check(runtime_.api.BindOutput(binding_.get(), name.c_str(), value.get()),
                   FWL_ERROR_RUNTIME);
    values_.push_back(std::move(value));
  }

  const OnnxRuntime& runtime_;
  Call call_;
  std::vector<float> logits_;
  std::vector<Owned<OrtValue>> values_;
  Owned<OrtIoBinding> binding_;
};

class OnnxRuntimeRunner final : public Runner {
public:
  OnnxRuntimeRunner(std::shared_ptr<const OnnxRuntime> runtime, size_t rows)
      : runtime_(std::move(runtime)), rows_(rows) {}

  void run(const Call& call, const Buffers& past, const Buffers& present,
           std::vector<float>& logits) override {
    if (call.tokens > 1) {
      BoundCall(*runtime_, rows_, call, past, present).run(call, logits);
      return;
    }
    // Of calls with one token: binding all takes as long as a small model's step.
    auto place = bound_.find({&past, &present});
    if (place == bound_.end()) {
      place = bound_
                  .emplace(Key{&past, &present},
                           std::make_unique<BoundCall>(*runtime_, rows_, call, past, present))
                  .first;
    }
    place->second->run(call, logits);
  }

  void release(const Buffers& buffers) override {
    for (auto place = bound_.begin(); place != bound_.end();) {
      const bool gone = place->first.first == &buffers || place->first.second == &buffers;
      place = gone ? bound_.erase(place) : std::next(place);
    }
  }

private:
  using Key = std::pair<const Buffers*, const Buffers*>;

  std::shared_ptr<const OnnxRuntime> runtime_;
  size_t rows_;
  std::map<Key, std::unique_ptr<BoundCall>> bound_;
};

std::unique_ptr<Runner> OnnxRuntime::runner(size_t rows) const {
  return std::make_unique<OnnxRuntimeRunner>(shared_from_this(), rows);
}

} // namespace

std::shared_ptr<const Backend> open_onnxruntime(const Bundle& bundle, const char* library,
                                                const char* plugin, int threads) {
  return std::make_shared<OnnxRuntime>(bundle, library, plugin, threads);
}

} // namespace fwl::embed

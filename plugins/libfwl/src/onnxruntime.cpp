// The runtime "onnxruntime": ONNX Runtime, opened when a program asks for it.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstring>
#include <map>

#include "error.h"
#include "host_buffers.h"
#include "runtime.h"

namespace fwl::internal {
namespace {

// The oldest version of the interface with all functions used here. Newer libraries offer it too.
constexpr uint32_t kApiVersion = 17;

// File names that the dynamic loader searches for, in this order.
constexpr const char* kNames[] = {"libonnxruntime.so", "libonnxruntime.so.1"};

const OrtApi& load_api(const char* path) {
  void* library = nullptr;
  std::string reason;
  const auto attempt = [&](const char* name) {
    library = dlopen(
        name, RTLD_NOW | RTLD_LOCAL); // never dlclosed: ONNX Runtime does not survive unloading
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
                      "' is not ONNX Runtime 1.17 or newer; give the path of a newer library");
  }
  return *api;
}

// A handle of ONNX Runtime, released at the end of the scope.
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

class OnnxRuntime final : public Runtime, public std::enable_shared_from_this<OnnxRuntime> {
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
    // By default ONNX Runtime rounds activations to int8 where weights are int8.
    check(api.AddSessionConfigEntry(options, "session.disable_quant_qdq", "1"), FWL_ERROR_RUNTIME);
    if (plugin != nullptr) {
      check(api.RegisterCustomOpsLibrary_V2(options, plugin), FWL_ERROR_RUNTIME);
    }
    load(bundle, *options);
    OrtMemoryInfo* info = nullptr;
    check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), FWL_ERROR_RUNTIME);
    memory_ = {info, api.ReleaseMemoryInfo};
  }

  std::unique_ptr<Runner> runner(size_t rows) const override;
  const char* name() const override { return "onnxruntime"; }

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
  // Loads the model. ONNX Runtime opens the files again, by name, after we have checked them, so
  // the bundle must be unchanged afterwards.
  void load(const Bundle& bundle, const OrtSessionOptions& options) {
    try {
      const std::string path = checked_model(bundle);
      OrtSession* opened = nullptr;
      check(api.CreateSession(env_.get(), path.c_str(), &options, &opened), FWL_ERROR_BUNDLE);
      session_ = {opened, api.ReleaseSession};
    } catch (const Failure&) {
      check_unchanged(bundle); // a bundle that was replaced explains the failure better
      throw;
    }
    check_unchanged(bundle);
  }

  Owned<OrtEnv> env_;
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
};

// A call whose inputs and outputs are bound to fixed memory, so that it can run again with other
// values.
class BoundCall {
public:
  BoundCall(const OnnxRuntime& runtime, size_t rows, const Call& call, const HostBuffers& past,
            HostBuffers& present)
      : runtime_(runtime), call_(call),
        logits_(rows * call.positions * static_cast<size_t>(runtime.vocab_size)) {
    OrtIoBinding* binding = nullptr;
    runtime.check(runtime.api.CreateIoBinding(runtime.session(), &binding), FWL_ERROR_RUNTIME);
    binding_ = {binding, runtime.api.ReleaseIoBinding};
    const auto count = static_cast<int64_t>(rows);
    const auto positions = static_cast<int64_t>(call.positions);
    for (const Input& input : inputs_of(call_)) {
      std::vector<int64_t> shape{count};
      if (input.width > 0) {
        shape.push_back(static_cast<int64_t>(input.width));
      }
      bind_input(input.name, runtime.value(input.data, input.bytes, shape, onnx_type(input.type)));
    }
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
    // Copied element by element: assigning vectors could move the memory that is bound.
    const auto from = inputs_of(call), to = inputs_of(call_);
    for (size_t i = 0; i < from.size(); ++i) {
      std::memcpy(const_cast<void*>(to[i].data), from[i].data, from[i].bytes);
    }
    runtime_.check(runtime_.api.RunWithBinding(runtime_.session(), nullptr, binding_.get()),
                   FWL_ERROR_RUNTIME);
    logits = logits_;
  }

private:
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

  std::unique_ptr<Buffers> buffers() override {
    return std::make_unique<HostBuffers>(runtime_->specs, rows_);
  }

  void run(const Call& call, const Buffers& given_past, Buffers& given_present,
           std::vector<float>& logits) override {
    const auto& past = static_cast<const HostBuffers&>(given_past);
    auto& present = static_cast<HostBuffers&>(given_present);
    if (call.tokens > 1) {
      BoundCall(*runtime_, rows_, call, past, present).run(call, logits);
      return;
    }
    // Bindings are kept for calls of one token, where binding takes as long as a small model's
    // step.
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

std::shared_ptr<const Runtime> open_onnxruntime(const Bundle& bundle, const char* library,
                                                const char* plugin, int threads) {
  return std::make_shared<OnnxRuntime>(bundle, library, plugin, threads);
}

} // namespace fwl::internal

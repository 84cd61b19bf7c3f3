// The runtime "onnxruntime": ONNX Runtime, opened when a program asks for it.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

#include "error.h"
#include "host_buffers.h"
#include "json_text.h"
#include "onnx_file.h"
#include "runtime.h"

namespace fwl::internal {
namespace {

// The oldest version of the interface with all functions used here. Newer libraries offer it too.
constexpr uint32_t kApiVersion = 17;

// File names that the dynamic loader searches for, in this order.
constexpr const char* kNames[] = {"libonnxruntime.so", "libonnxruntime.so.1"};

// Microsoft's builds for Linux report to Microsoft, from a thread that ONNX Runtime starts, unless
// this variable is set. Changing the environment is not safe while other threads read it, so this
// happens when libfwl is loaded: usually before main. A value that the user has set stays.
__attribute__((constructor)) void disable_telemetry() {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
}

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

// Bytes of an element, by the number of its type in onnx.proto, which is also the number in
// ONNXTensorElementDataType. 0: a type that no exported model keeps outside its ONNX file.
size_t element_bytes(int32_t type) {
  constexpr size_t kBytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};
  return type >= 0 && static_cast<size_t>(type) < std::size(kBytes) ? kBytes[type] : 0;
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
    // Otherwise ONNX Runtime would choose the format by some bytes of the file.
    check(api.AddSessionConfigEntry(options, "session.load_model_format", "ONNX"),
          FWL_ERROR_RUNTIME);
    OrtMemoryInfo* info = nullptr;
    check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), FWL_ERROR_RUNTIME);
    memory_ = {info, api.ReleaseMemoryInfo};
    try {
      load(bundle, *options);
    } catch (const Failure&) {
      check_unchanged(bundle); // a bundle that was replaced explains the failure better
      throw;
    }
    check_tensors();
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
  // Loads the model from the bytes whose hashes were checked. ONNX Runtime opens no file of the
  // bundle, so it does not matter what becomes of the files from now on.
  void load(const Bundle& bundle, OrtSessionOptions& options) {
    const std::string model = checked_content(bundle, kModelFile);
    std::vector<ExternalTensor> tensors;
    try {
      tensors = external_tensors(model);
    } catch (const Malformed& error) {
      throw Failure(FWL_ERROR_BUNDLE, "'" + std::string(kModelFile) + "' in bundle '" +
                                          bundle.folder +
                                          "' is not an ONNX model that libfwl reads (" +
                                          printable(error.what()) + "); export the model again");
    }
    std::vector<const char*> names;
    std::vector<const OrtValue*> handles;
    for (const ExternalTensor& tensor : tensors) {
      check_place(bundle, tensor);
      auto file = contents_.find(tensor.location);
      if (file == contents_.end()) {
        file = contents_.emplace(tensor.location, checked_content(bundle, tensor.location)).first;
      }
      values_.push_back(external_value(tensor, file->second));
      names.push_back(tensor.name.c_str());
      handles.push_back(values_.back().get());
    }
    if (!names.empty()) {
      // For the optimizations that compute with the weights.
      check(api.AddExternalInitializers(&options, names.data(), handles.data(), names.size()),
            FWL_ERROR_BUNDLE);
    }
    for (size_t i = 0; i < names.size(); ++i) {
      // To compute with this memory; without it, ONNX Runtime would make a copy of each weight.
      check(api.AddInitializer(&options, names[i], handles[i]), FWL_ERROR_BUNDLE);
    }
    OrtSession* opened = nullptr;
    check(api.CreateSessionFromArray(env_.get(), model.data(), model.size(), &options, &opened),
          FWL_ERROR_BUNDLE);
    session_ = {opened, api.ReleaseSession};
  }

  // Checks that a tensor's data can be given to ONNX Runtime in memory.
  static void check_place(const Bundle& bundle, const ExternalTensor& tensor) {
    if (bundle.files.count(tensor.location) == 0) {
      throw Failure(FWL_ERROR_BUNDLE, "the model in bundle '" + bundle.folder +
                                          "' takes data from the file '" +
                                          printable(tensor.location.c_str()) +
                                          "', which the manifest does not list; do not use this "
                                          "bundle");
    }
    if (!tensor.is_initializer) {
      throw Failure(FWL_ERROR_BUNDLE, "the model in bundle '" + bundle.folder +
                                          "' takes data of '" + printable(tensor.name.c_str()) +
                                          "' from the file '" + printable(tensor.location.c_str()) +
                                          "', but only initializers of the main graph may be "
                                          "outside the ONNX file; export the model again");
    }
  }

  // Returns a value over the data of a tensor: over `content`, or over a copy if the data is not
  // aligned.
  Owned<OrtValue> external_value(const ExternalTensor& tensor, const std::string& content) {
    uint64_t bytes = element_bytes(tensor.type);
    bool fits = bytes > 0 && tensor.offset <= content.size();
    for (const int64_t size : tensor.shape) {
      fits =
          fits && size >= 0 && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes);
    }
    if (!fits || bytes > content.size() - tensor.offset || tensor.length.value_or(bytes) != bytes) {
      throw Failure(FWL_ERROR_BUNDLE, "the data of '" + printable(tensor.name.c_str()) +
                                          "' does not fit its place in '" +
                                          printable(tensor.location.c_str()) +
                                          "'; export the model again");
    }
    const char* data = content.data() + tensor.offset;
    if (reinterpret_cast<uintptr_t>(data) % element_bytes(tensor.type) != 0) {
      data = copies_.emplace_back(data, bytes).data();
    }
    return value(data, bytes, tensor.shape, static_cast<ONNXTensorElementDataType>(tensor.type));
  }

  using Shape = std::vector<int64_t>;
  using Signature = std::map<std::string, std::pair<ONNXTensorElementDataType, Shape>>;

  // Returns types and shapes of the model's inputs or outputs; a size that is not fixed is
  // negative.
  Signature
  signature(OrtStatus*(ORT_API_CALL* count)(const OrtSession*, size_t*),
            OrtStatus*(ORT_API_CALL* name_of)(const OrtSession*, size_t, OrtAllocator*, char**),
            OrtStatus*(ORT_API_CALL* type_of)(const OrtSession*, size_t, OrtTypeInfo**)) const {
    Signature found;
    size_t size = 0;
    OrtAllocator* allocator = nullptr;
    check(count(session(), &size), FWL_ERROR_RUNTIME);
    check(api.GetAllocatorWithDefaultOptions(&allocator), FWL_ERROR_RUNTIME);
    for (size_t i = 0; i < size; ++i) {
      char* text = nullptr;
      check(name_of(session(), i, allocator, &text), FWL_ERROR_RUNTIME);
      const std::string name = text;
      check(api.AllocatorFree(allocator, text), FWL_ERROR_RUNTIME);
      OrtTypeInfo* info = nullptr;
      check(type_of(session(), i, &info), FWL_ERROR_RUNTIME);
      const Owned<OrtTypeInfo> owned(info, api.ReleaseTypeInfo);
      const OrtTensorTypeAndShapeInfo* tensor = nullptr;
      check(api.CastTypeInfoToTensorInfo(info, &tensor), FWL_ERROR_RUNTIME);
      if (tensor != nullptr) { // else it is a sequence or the like
        size_t axes = 0;
        check(api.GetDimensionsCount(tensor, &axes), FWL_ERROR_RUNTIME);
        auto& [type, shape] = found[name];
        shape.resize(axes);
        check(api.GetDimensions(tensor, shape.data(), axes), FWL_ERROR_RUNTIME);
        check(api.GetTensorElementType(tensor, &type), FWL_ERROR_RUNTIME);
      }
    }
    return found;
  }

  // Checks that the model has an input or output as the manifest says: `shape` begins with the axis
  // of rows, and negative sizes are free.
  static void check_tensor(const Signature& signature, const std::string& name, Type type,
                           const Shape& shape) {
    const auto found = signature.find(name);
    const auto fits = [](int64_t size, int64_t expected) {
      return size < 0 || expected < 0 || size == expected;
    };
    if (found == signature.end() || found->second.first != onnx_type(type) ||
        !std::equal(shape.begin(), shape.end(), found->second.second.begin(),
                    found->second.second.end(), fits)) {
      throw Failure(FWL_ERROR_BUNDLE, "the model has no input or output '" +
                                          printable(name.c_str()) +
                                          "' as the manifest describes it; export the model again");
    }
  }

  // Compares the model's inputs and outputs with the manifest, before a session takes memory for a
  // state of the size that the manifest says.
  void check_tensors() const {
    const Signature inputs =
        signature(api.SessionGetInputCount, api.SessionGetInputName, api.SessionGetInputTypeInfo);
    const Signature outputs = signature(api.SessionGetOutputCount, api.SessionGetOutputName,
                                        api.SessionGetOutputTypeInfo);
    constexpr int64_t kFree = -1;
    Call call{};
    call.tokens = call.positions = 1;
    for (const Input& input : inputs_of(call)) {
      check_tensor(inputs, input.name, input.type,
                   input.width > 0 ? Shape{kFree, kFree} : Shape{kFree});
    }
    for (const TensorSpec& spec : specs) {
      Shape shape{kFree};
      shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
      check_tensor(inputs, "past." + spec.name, spec.type, shape);
      check_tensor(outputs, "present." + spec.name, spec.type, shape);
    }
    check_tensor(outputs, "logits", Type::kFloat32, {kFree, kFree, vocab_size});
  }

  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  // The external data, and values over it, which must outlive the session.
  std::map<std::string, std::string> contents_; // by the names of the files
  std::deque<std::string> copies_;              // of data that is not aligned in its file
  std::vector<Owned<OrtValue>> values_;
  Owned<OrtSession> session_;
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

// The runtime "tensorrt": TensorRT or TensorRT-RTX, opened when a program asks for it.
//
// TensorRT's C++ interface consists of virtual tables, so the library must have the layout that the
// headers of this build declare:
//
// - Within a major version NVIDIA only appends to the tables. Every function called here exists in
//   TensorRT 10.0, so headers of any 10.x serve all of 10.
// - TensorRT 11 and TensorRT-RTX leave out functions that 10 had deprecated, which moves the later
//   slots: in TensorRT-RTX 1.7, getLogger takes the slot in which 10.14 has getErrorRecorder.
//
// A library of another major version is therefore refused before any of its tables is touched; a C
// function tells the version. To use TensorRT 11 or RTX, build libfwl with the headers of that SDK
// (-DFWL_TENSORRT_SDK=...).

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <utility>

#include "cuda.h"
#include "engines.h"
#include "error.h"
#include "runtime.h"

namespace fwl::internal {
namespace {

using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

#if defined(TRT_MAJOR_RTX)
constexpr char kVariant[] = "rtx";
constexpr char kTitle[] = "TensorRT-RTX";
const std::string kNames[] = {"libtensorrt_rtx.so." + std::to_string(NV_TENSORRT_MAJOR),
                              "libtensorrt_rtx.so"};
#else
constexpr char kVariant[] = "tensorrt";
constexpr char kTitle[] = "TensorRT";
const std::string kNames[] = {"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR),
                              "libnvinfer.so"};
#endif

// The plugin library, which is searched for beside libfwl if the program gives no path.
constexpr char kPluginLibrary[] = "libfwl_trt.so";

// Keeps the first error that TensorRT reports, for the message of the call that fails.
class Logger final : public nvinfer1::ILogger {
public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) {
      try {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (first_.empty()) {
          first_ = printable(message);
        }
      } catch (const std::exception&) { // there is no memory for the message
      }
    }
  }

  // Returns the first error since the last call, in brackets, or "".
  std::string take_first() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return first_.empty() ? "" : " (" + std::exchange(first_, "") + ")";
  }

private:
  std::mutex mutex_;
  std::string first_;
};

struct Library {
  void* handle;
  std::array<int, 3> version;
};

Library open_library(const char* path) {
  void* handle = nullptr;
  std::string reason;
  for (const std::string& name : kNames) {
    const char* const tried = path != nullptr ? path : name.c_str();
    if (handle == nullptr) {
      handle = dlopen(tried, RTLD_NOW | RTLD_LOCAL); // never closed: its threads may outlive us
      const char* const text = handle == nullptr ? dlerror() : nullptr;
      reason = text != nullptr ? text : tried;
    }
  }
  if (handle == nullptr) {
    const std::string message = std::string(kTitle) + " cannot be opened (" + reason +
                                "); give the path of " + kNames[1] + " as tensorrt_library";
    if (path != nullptr) {
      throw Failure(FWL_ERROR_RUNTIME, message);
    }
    throw Absent(FWL_ERROR_RUNTIME, message);
  }
  const std::string shown = path != nullptr ? path : kNames[1];
  const auto number = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
  if (number == nullptr || dlsym(handle, "createInferRuntime_INTERNAL") == nullptr) {
    throw Failure(FWL_ERROR_RUNTIME, "'" + shown + "' is not " + kTitle + "; give the path of " +
                                         kNames[1] + " as tensorrt_library");
  }
  const int32_t version = number(); // encoded like NV_TENSORRT_VERSION
  const Library library{handle, {version / 10000, version / 100 % 100, version % 100}};
  if (library.version[0] != NV_TENSORRT_MAJOR) {
    throw Failure(FWL_ERROR_RUNTIME,
                  "'" + shown + "' has version " + version_text(library.version) +
                      ", but this libfwl was built for " + kTitle + " " +
                      std::to_string(NV_TENSORRT_MAJOR) +
                      ", whose interface is different; give a library of that version, or build "
                      "libfwl with -DFWL_TENSORRT_SDK=... of version " +
                      std::to_string(library.version[0]));
  }
  return library;
}

// Returns the path of the plugin library beside libfwl, or "" if there is none.
std::string plugin_beside() {
  Dl_info found;
  if (dladdr(reinterpret_cast<const void*>(&open_tensorrt), &found) == 0 ||
      found.dli_fname == nullptr) {
    return "";
  }
  const std::filesystem::path path =
      std::filesystem::path(found.dli_fname).parent_path() / kPluginLibrary;
  std::error_code ignored;
  return std::filesystem::exists(path, ignored) ? path.string() : "";
}

nvinfer1::DataType type_of(Type type) {
  return type == Type::kFloat32   ? nvinfer1::DataType::kFLOAT
         : type == Type::kFloat16 ? nvinfer1::DataType::kHALF
                                  : nvinfer1::DataType::kINT64;
}

Dims dims_of(size_t rows, const std::vector<int64_t>& row) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(row.size()) + 1;
  dims.d[0] = static_cast<int64_t>(rows);
  std::copy(row.begin(), row.end(), dims.d + 1);
  return dims;
}

// The sizes of a call that an optimization profile accepts.
struct Profile {
  int64_t rows[2];   // minimum, maximum
  int64_t tokens[2]; // minimum, maximum

  bool takes(size_t row_count, size_t token_count) const {
    const auto r = static_cast<int64_t>(row_count), t = static_cast<int64_t>(token_count);
    return rows[0] <= r && r <= rows[1] && tokens[0] <= t && t <= tokens[1];
  }
};

// The library, the GPU and one engine.
class TensorRt final : public Runtime, public std::enable_shared_from_this<TensorRt> {
public:
  TensorRt(const Bundle& bundle, const TensorRtOptions& options)
      : specs(bundle.state), vocab_size(static_cast<size_t>(bundle.vocab_size)) {
    if (options.library == nullptr) {
      gpu = std::make_shared<Gpu>(
          options.device); // first: without a GPU, the library does not matter
    }
    const Library library = open_library(options.library);
    if (gpu == nullptr) {
      gpu = std::make_shared<Gpu>(options.device);
    }
    const std::string plugin = options.plugin != nullptr ? options.plugin : plugin_beside();
    chosen_ = choose_engine(bundle, {kVariant, kTitle, library.version, gpu->sm(), !plugin.empty(),
                                     options.plugin != nullptr, options.allow_embedded_plugin});
    const std::string content = checked_content(bundle, "engines/" + chosen_.name + ".engine");
    const Gpu::Use use(*gpu);
    try {
      load(library, plugin, content);
      check_tensors();
      find_profiles();
    } catch (...) {
      close();
      throw;
    }
  }

  ~TensorRt() override {
    try {
      const Gpu::Use use(*gpu);
      close();
    } catch (const Failure&) { // the device is lost, and all memory on it
      (void)engine_.release();
      (void)runtime_.release();
    }
  }

  std::unique_ptr<Runner> runner(size_t rows) const override;
  const char* name() const override { return "tensorrt"; }
  std::string engine() const override { return chosen_.name; }
  int64_t max_tokens() const override { return max_tokens_; }
  // Returns whether the engine writes a tensor of the state over the old one.
  bool is_in_place(const TensorSpec& spec) const {
    if (!chosen_.in_place) {
      return false;
    }
    if (!chosen_.in_place_tensors) { // built by an earlier version: the matrices of fast weights
      return spec.name.rfind("fast.", 0) == 0 && spec.shape.size() == 2;
    }
    const std::vector<std::string>& names = *chosen_.in_place_tensors;
    return std::find(names.begin(), names.end(), spec.name) != names.end();
  }

  // Returns the index of the first profile that takes a call, or -1.
  int32_t profile_for(size_t rows, size_t tokens) const {
    for (size_t i = 0; i < profiles_.size(); ++i) {
      if (profiles_[i].takes(rows, tokens)) {
        return static_cast<int32_t>(i);
      }
    }
    return -1;
  }
  int64_t max_rows() const {
    int64_t most = 0;
    for (const Profile& profile : profiles_) {
      most = std::max(most, profile.rows[1]);
    }
    return most;
  }
  size_t profile_count() const { return profiles_.size(); }

  // Makes an execution context. The GPU must be in use (Gpu::Use).
  std::unique_ptr<nvinfer1::IExecutionContext> context(int32_t profile, void* stream) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext());
    require(made != nullptr &&
                made->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream)),
            "cannot make an execution context");
    return made;
  }

  // Throws Failure if `holds` is false, with the error that the library reported.
  void require(bool holds, const std::string& what, fwl_status status = FWL_ERROR_RUNTIME) const {
    if (!holds) {
      throw Failure(status, std::string(kTitle) + " " + what + logger_.take_first());
    }
  }

  const std::vector<TensorSpec> specs;
  const size_t vocab_size;
  std::shared_ptr<const Gpu> gpu;

private:
  void load(const Library& library, const std::string& plugin, const std::string& content) {
    const auto create = reinterpret_cast<void* (*)(void*, int32_t)>(
        dlsym(library.handle, "createInferRuntime_INTERNAL"));
    // The library compares this with its own version. It stands for the headers, whose version it
    // could find too new; the top of this file says why any headers of the major version are right.
    const int32_t version =
        10000 * library.version[0] + 100 * library.version[1] + library.version[2];
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(&logger_, version)));
    require(runtime_ != nullptr, "cannot start");
    if (chosen_.plugin && chosen_.embedded) {
      runtime_->setEngineHostCodeAllowed(true);
    } else if (chosen_.plugin) {
      require(runtime_->getPluginRegistry().loadLibrary(plugin.c_str()) != nullptr,
              "cannot load the plugin '" + plugin + "'");
    }
    engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
    require(engine_ != nullptr, "refuses the engine '" + chosen_.name + "'; build it again",
            FWL_ERROR_BUNDLE);
  }

  void check_tensor(const std::string& name, bool input, Type type,
                    const std::vector<int64_t>& row) const {
    const auto mode = input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    const Dims shape = engine_->getTensorShape(name.c_str());
    bool same = engine_->getTensorIOMode(name.c_str()) == mode &&
                engine_->getTensorDataType(name.c_str()) == type_of(type) &&
                shape.nbDims == static_cast<int32_t>(row.size()) + 1;
    for (size_t i = 0; same && i < row.size(); ++i) {
      same = shape.d[i + 1] == row[i];
    }
    if (!same) {
      throw Failure(FWL_ERROR_BUNDLE, "engine '" + chosen_.name + "' has no " +
                                          (input ? "input '" : "output '") + name +
                                          "' as the bundle says; build it again");
    }
  }

  void check_tensors() const {
    constexpr int64_t kFree = -1;
    size_t count = 2 * specs.size() + 1;
    Call call{};
    call.tokens = call.positions = 1;
    for (const Input& input : inputs_of(call)) {
      std::vector<int64_t> row;
      if (input.width > 0) {
        row.push_back(kFree);
      }
      check_tensor(input.name, true, input.type, row);
      ++count;
    }
    for (const TensorSpec& spec : specs) {
      check_tensor("past." + spec.name, true, spec.type, spec.shape);
      check_tensor("present." + spec.name, false, spec.type, spec.shape);
    }
    check_tensor("logits", false, Type::kFloat32, {kFree, static_cast<int64_t>(vocab_size)});
    const int32_t found = engine_->getNbIOTensors();
    if (found != static_cast<int32_t>(count)) {
      throw Failure(FWL_ERROR_BUNDLE, "engine '" + chosen_.name + "' has " + std::to_string(found) +
                                          " inputs and outputs; expected " + std::to_string(count) +
                                          ". Build it again");
    }
  }

  void find_profiles() {
    for (int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
      const Dims least = engine_->getProfileShape("input_ids", i, OptProfileSelector::kMIN);
      const Dims most = engine_->getProfileShape("input_ids", i, OptProfileSelector::kMAX);
      require(least.nbDims == 2 && most.nbDims == 2,
              "reports no sizes for engine '" + chosen_.name + "'", FWL_ERROR_BUNDLE);
      profiles_.push_back({{least.d[0], most.d[0]}, {least.d[1], most.d[1]}});
      max_tokens_ = std::max(max_tokens_, most.d[1]);
    }
    require(max_tokens_ > 0, "reports no sizes for engine '" + chosen_.name + "'",
            FWL_ERROR_BUNDLE);
  }

  // Frees engine and runtime, in the order that TensorRT requires. The GPU must be in use.
  void close() noexcept {
    engine_.reset();
    runtime_.reset();
  }

  mutable Logger logger_; // first, because it must outlive the objects that log
  mutable std::mutex mutex_;
  Engine chosen_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<Profile> profiles_;
  int64_t max_tokens_ = 0;
};

// The state of a session in GPU memory, in one block.
class DeviceBuffers final : public Buffers {
public:
  DeviceBuffers(const std::vector<TensorSpec>& specs, size_t rows,
                std::shared_ptr<const Stream> stream)
      : specs_(specs), stream_(std::move(stream)) {
    constexpr size_t kAlignment = 256; // that of cuMemAlloc
    size_t bytes = 0;
    for (const TensorSpec& spec : specs) {
      offsets_.push_back(bytes);
      bytes += (rows * spec.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    }
    memory_ = DeviceMemory(stream_, bytes);
    stream_->zero(memory_.start(), bytes);
    stream_->wait();
  }

  DevicePointer tensor(size_t index) const { return memory_.start() + offsets_[index]; }

  void read(size_t row, char* state) const override {
    const Stream::Settled settled{*stream_};
    for (size_t i = 0; i < specs_.size(); ++i) {
      const size_t bytes = specs_[i].bytes();
      stream_->download(state, tensor(i) + row * bytes, bytes);
      state += bytes;
    }
    stream_->wait();
  }

  Buffers& writable(Buffers& spare) override {
    stream_->copy(static_cast<DeviceBuffers&>(spare).memory_.start(), memory_.start(),
                  memory_.bytes());
    stream_->wait();
    return spare;
  }

  void write(size_t row, const char* state) override {
    const Stream::Settled settled{*stream_};
    for (size_t i = 0; i < specs_.size(); ++i) {
      const size_t bytes = specs_[i].bytes();
      stream_->upload(tensor(i) + row * bytes, state, bytes);
      state += bytes;
    }
    stream_->wait();
  }

private:
  const std::vector<TensorSpec>& specs_; // those of the runtime, which the runner keeps alive
  std::shared_ptr<const Stream> stream_;
  std::vector<size_t> offsets_;
  DeviceMemory memory_;
};

class TensorRtRunner final : public Runner {
public:
  TensorRtRunner(std::shared_ptr<const TensorRt> runtime, size_t rows)
      : runtime_(std::move(runtime)), rows_(rows), stream_(std::make_shared<Stream>(runtime_->gpu)),
        contexts_(runtime_->profile_count()) {
    if (runtime_->profile_for(rows, 1) < 0) {
      throw Failure(FWL_ERROR_ARGUMENT, "rows is " + std::to_string(rows) + ", but engine '" +
                                            runtime_->engine() + "' takes 1 to " +
                                            std::to_string(runtime_->max_rows()) +
                                            "; build one with `fwl-export build ... --max-batch " +
                                            std::to_string(rows) + "`");
    }
  }

  ~TensorRtRunner() override {
    try {
      const Gpu::Use use(*runtime_->gpu);
      contexts_.clear();
    } catch (const Failure&) { // the device is lost
      for (auto& context : contexts_) {
        (void)context.release();
      }
    }
  }

  std::unique_ptr<Buffers> buffers() override {
    return std::make_unique<DeviceBuffers>(runtime_->specs, rows_, stream_);
  }

  void run(const Call& call, const Buffers& given_past, Buffers& given_present,
           std::vector<float>& logits) override {
    const auto& past = static_cast<const DeviceBuffers&>(given_past);
    const auto& present = static_cast<const DeviceBuffers&>(given_present);
    const Gpu::Use use(*runtime_->gpu);
    logits.resize(rows_ * call.positions * runtime_->vocab_size);
    const size_t logits_bytes = logits.size() * sizeof(float);
    reserve(logits_, logits_bytes);
    nvinfer1::IExecutionContext& context = context_for(call.tokens);

    const Stream::Settled settled{*stream_};
    bind_inputs(context, call);
    for (size_t i = 0; i < runtime_->specs.size(); ++i) {
      const TensorSpec& spec = runtime_->specs[i];
      DevicePointer read = past.tensor(i);
      if (runtime_->is_in_place(spec)) {
        // The old state must survive if this call fails, so the engine overwrites a copy of it.
        stream_->copy(present.tensor(i), read, rows_ * spec.bytes());
        read = present.tensor(i);
      }
      shape(context, "past." + spec.name, dims_of(rows_, spec.shape));
      address(context, "past." + spec.name, read);
      address(context, "present." + spec.name, present.tensor(i));
    }
    address(context, "logits", logits_.start());
    runtime_->require(context.enqueueV3(static_cast<cudaStream_t>(stream_->handle())),
                      "cannot run the model");
    stream_->download(logits.data(), logits_.start(), logits_bytes);
    stream_->wait();
  }

  void release(const Buffers&) override {} // a runner keeps nothing about buffers

private:
  // Returns the context of the profile for a call. There is one context per profile, because
  // changing a context's profile makes its next call slow.
  nvinfer1::IExecutionContext& context_for(size_t tokens) {
    const int32_t profile = runtime_->profile_for(rows_, tokens);
    if (profile < 0) {
      throw Failure(FWL_ERROR_RUNTIME, "engine '" + runtime_->engine() +
                                           "' has no profile for calls of " +
                                           std::to_string(rows_) + " rows and " +
                                           std::to_string(tokens) + " tokens; build it again");
    }
    auto& context = contexts_[static_cast<size_t>(profile)];
    if (context == nullptr) {
      context = runtime_->context(profile, stream_->handle());
      stream_->wait();
    }
    return *context;
  }

  // Uploads all inputs to one block, each of them aligned, and binds them.
  void bind_inputs(nvinfer1::IExecutionContext& context, const Call& call) {
    constexpr size_t kAlignment = 256;
    const auto inputs = inputs_of(call);
    size_t bytes = 0;
    for (const Input& input : inputs) {
      bytes += (input.bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    reserve(inputs_, bytes);
    DevicePointer place = inputs_.start();
    for (const Input& input : inputs) {
      stream_->upload(place, input.data, input.bytes);
      std::vector<int64_t> row;
      if (input.width > 0) {
        row.push_back(static_cast<int64_t>(input.width));
      }
      shape(context, input.name, dims_of(rows_, row));
      address(context, input.name, place);
      place += (input.bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
  }

  // Makes a block at least this large. No queued work may use it.
  void reserve(DeviceMemory& memory, size_t bytes) {
    if (memory.bytes() < bytes) {
      memory = DeviceMemory(stream_, bytes);
    }
  }

  void shape(nvinfer1::IExecutionContext& context, const std::string& name, const Dims& dims) {
    runtime_->require(context.setInputShape(name.c_str(), dims), "refuses the shape of " + name);
  }

  void address(nvinfer1::IExecutionContext& context, const std::string& name, DevicePointer place) {
    runtime_->require(context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(place)),
                      "refuses the address of " + name);
  }

  std::shared_ptr<const TensorRt> runtime_;
  size_t rows_;
  std::shared_ptr<const Stream> stream_;
  std::vector<std::unique_ptr<nvinfer1::IExecutionContext>>
      contexts_; // by profile; null until used
  DeviceMemory inputs_, logits_;
};

std::unique_ptr<Runner> TensorRt::runner(size_t rows) const {
  return std::make_unique<TensorRtRunner>(shared_from_this(), rows);
}

} // namespace

std::shared_ptr<const Runtime> open_tensorrt(const Bundle& bundle, const TensorRtOptions& options) {
  return std::make_shared<TensorRt>(bundle, options);
}

} // namespace fwl::internal

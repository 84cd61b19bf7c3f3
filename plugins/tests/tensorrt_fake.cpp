#include "tensorrt_fake.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "cuda_fake.h"
#include "stubs.h"

void unexpected(const char* function) {
  std::fprintf(stderr, "the fake has no %s\n", function);
  std::abort();
}

namespace {

using namespace nvinfer1;
using fwl::fake::Cuda;

constexpr int64_t kVocabulary = 5;
constexpr int64_t kStateK = 20, kStateV = 25;

fwl::fake::TensorRt& settings() {
  return *fwl_fake_tensorrt();
}

// Returns the fake driver, which is already loaded, as the real driver would be.
Cuda& cuda() {
  static Cuda* const found = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Cuda* (*)()>(dlsym(library, "fwl_fake_cuda"))();
  }();
  return *found;
}

bool fails(const char* function) {
  return settings().failing == function;
}

std::mutex counting;

void count(int& counter, int step) {
  const std::lock_guard<std::mutex> lock(counting);
  counter += step;
}

void violated(const std::string& what) {
  const std::lock_guard<std::mutex> lock(counting);
  settings().violations.push_back(what);
}

void require_gpu(const char* function) {
  if (!cuda().is_current()) {
    violated(std::string(function) + " without a current context");
  }
}

struct Tensor {
  bool input;
  DataType type;
  std::vector<int64_t> shape; // -1: rows, -2: tokens, -3: positions
};

const std::map<std::string, Tensor> kTensors = {
    {"input_ids", {true, DataType::kINT64, {-1, -2}}},
    {"label_weights", {true, DataType::kFLOAT, {-1, -2}}},
    {"lengths", {true, DataType::kINT64, {-1}}},
    {"logit_positions", {true, DataType::kINT64, {-1, -3}}},
    {"learning_rate_scale", {true, DataType::kFLOAT, {-1}}},
    {"past.position", {true, DataType::kINT64, {-1}}},
    {"past.fast.sum.kernel", {true, DataType::kFLOAT, {-1, kStateK, kStateV}}},
    {"logits", {false, DataType::kFLOAT, {-1, -3, kVocabulary}}},
    {"present.position", {false, DataType::kINT64, {-1}}},
    {"present.fast.sum.kernel", {false, DataType::kFLOAT, {-1, kStateK, kStateV}}},
};

Dims dims(const std::vector<int64_t>& sizes) {
  Dims made{};
  made.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), made.d);
  return made;
}

// What the text of an engine says; see `engine_text`.
struct EngineSettings {
  int64_t rows = 0, tokens = 0;
  bool in_place = false, plugin = false, embedded = false, other_type = false;

  // Sizes of the dynamic axes in profile 0, decode, and 1, prefill.
  int64_t most(int32_t profile, int64_t axis) const {
    return axis == -1 ? rows : profile == 0 ? 1 : tokens;
  }
};

class Context;

class Engine final : public ICudaEngine, public VCudaEngineStub {
public:
  Engine(const EngineSettings& given, ILogger& messages) : asked(given), logger(messages) {
    mImpl = this;
    count(settings().engines, 1);
  }
  ~Engine() noexcept override {
    require_gpu("~ICudaEngine");
    if (contexts != 0) {
      violated("an engine is destroyed before its contexts");
    }
    count(settings().engines, -1);
  }

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(kTensors.size()); }
  int32_t getNbOptimizationProfiles() const noexcept override { return 2; }
  TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    const auto found = kTensors.find(name);
    return found == kTensors.end() ? TensorIOMode::kNONE
           : found->second.input   ? TensorIOMode::kINPUT
                                   : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(const char* name) const noexcept override {
    const auto found = kTensors.find(name);
    return found == kTensors.end() || (asked.other_type && std::string(name) == "lengths")
               ? DataType::kINT32
               : found->second.type;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    const auto found = kTensors.find(name);
    if (found == kTensors.end()) {
      return dims({});
    }
    std::vector<int64_t> sizes;
    for (const int64_t size : found->second.shape) {
      sizes.push_back(std::max<int64_t>(size, -1));
    }
    return dims(sizes);
  }
  Dims getProfileShape(const char* name, int32_t profile,
                       OptProfileSelector select) const noexcept override {
    std::vector<int64_t> sizes;
    for (const int64_t size : kTensors.at(name).shape) {
      sizes.push_back(size > 0                             ? size
                      : select == OptProfileSelector::kMIN ? 1
                                                           : asked.most(profile, size));
    }
    return dims(sizes);
  }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override;
  ICudaEngine* getPImpl() noexcept override { return this; }

  const EngineSettings asked;
  ILogger& logger;
  std::atomic<int> contexts{0};
};

// The sizes and addresses of a call at the time when it was queued.
struct Work {
  int64_t rows, tokens, positions;
  std::map<std::string, void*> at;
};

template <class Value> Value* array(const Work& work, const char* name) {
  return static_cast<Value*>(work.at.at(name));
}

void compute(const Work& work) {
  const auto* const past_position = array<int64_t>(work, "past.position");
  const auto* const past = array<float>(work, "past.fast.sum.kernel");
  auto* const present = array<float>(work, "present.fast.sum.kernel");
  auto* const logits = array<float>(work, "logits");
  std::memmove(present, past, static_cast<size_t>(work.rows * kStateK * kStateV) * sizeof(float));
  for (int64_t r = 0; r < work.rows; ++r) {
    float sum = present[r * kStateK * kStateV];
    const int64_t length = array<int64_t>(work, "lengths")[r];
    std::vector<float> sums;
    for (int64_t i = r * work.tokens; i < r * work.tokens + length; ++i) {
      sum = 0.5f * sum + array<float>(work, "learning_rate_scale")[r] *
                             array<float>(work, "label_weights")[i] *
                             static_cast<float>(array<int64_t>(work, "input_ids")[i]);
      sums.push_back(sum);
    }
    for (int64_t p = 0; p < work.positions; ++p) {
      const auto at =
          static_cast<size_t>(array<int64_t>(work, "logit_positions")[r * work.positions + p]);
      for (int64_t v = 0; v < kVocabulary; ++v) {
        logits[(r * work.positions + p) * kVocabulary + v] =
            at < sums.size() ? sums[at] + static_cast<float>(v) : 77.0f;
      }
    }
    array<int64_t>(work, "present.position")[r] = past_position[r] + length;
    present[r * kStateK * kStateV] = sum;
  }
}

class Context final : public IExecutionContext, public VExecutionContextStub {
public:
  explicit Context(Engine& engine) : engine_(engine) {
    mImpl = this;
    ++engine.contexts;
    count(settings().contexts, 1);
  }
  ~Context() noexcept override {
    require_gpu("~IExecutionContext");
    --engine_.contexts;
    count(settings().contexts, -1);
  }
  IExecutionContext* getPImpl() noexcept override { return this; }

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t stream) noexcept override {
    shapes_.clear();
    profile_ = index;
    return refuse(fails("setOptimizationProfileAsync") || stream == nullptr || index < 0 ||
                      index > 1,
                  "no such profile");
  }

  bool setInputShape(const char* name, const Dims& given) noexcept override {
    const auto found = kTensors.find(name);
    shapes_[name].clear();
    bool wrong = fails("setInputShape") || found == kTensors.end() || !found->second.input ||
                 given.nbDims != static_cast<int32_t>(found->second.shape.size());
    for (int32_t i = 0; !wrong && i < given.nbDims; ++i) {
      const int64_t size = found->second.shape[static_cast<size_t>(i)];
      wrong = size > 0 ? given.d[i] != size
                       : given.d[i] < 1 || given.d[i] > engine_.asked.most(profile_, size);
      if (size < 0 && !wrong) {
        shapes_[name].push_back({size, given.d[i]});
      }
    }
    return refuse(wrong, std::string("the shape of ") + name + " is out of range");
  }

  bool setTensorAddress(const char* name, void* data) noexcept override {
    addresses_[name] = data;
    return refuse(fails("setTensorAddress") || kTensors.count(name) == 0 || data == nullptr,
                  "no such tensor");
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    require_gpu("enqueueV3");
    Work work{0, 0, 0, addresses_};
    const std::string wrong = check(work);
    const bool injected = settings().enqueues_left >= 0 && settings().enqueues_left-- == 0;
    if (!wrong.empty()) {
      violated(wrong);
    }
    if (refuse(!wrong.empty() || injected || stream == nullptr, "enqueue: " + wrong)) {
      cuda().post(stream, [work] { compute(work); });
      return true;
    }
    return false;
  }

private:
  bool refuse(bool wrong, const std::string& why) {
    if (wrong) {
      engine_.logger.log(ILogger::Severity::kERROR, why.c_str());
    }
    return !wrong;
  }

  // Returns what is wrong with the call, or "", and sets the sizes of `work`.
  std::string check(Work& work) {
    std::map<int64_t, int64_t> free;
    for (const auto& each : kTensors) {
      if (each.second.input && shapes_.count(each.first) == 0) {
        return each.first + " has no shape";
      }
      for (const auto& axis : shapes_[each.first]) {
        if (free.emplace(axis).first->second != axis.second) {
          return each.first + " has other sizes than the inputs before it";
        }
      }
    }
    work.rows = free.at(-1);
    work.tokens = free.at(-2);
    work.positions = free.at(-3);
    for (const auto& each : kTensors) {
      size_t bytes = each.second.type == DataType::kINT64 ? 8 : 4;
      for (const int64_t size : each.second.shape) {
        bytes *= static_cast<size_t>(size > 0 ? size : free.at(size));
      }
      if (addresses_.count(each.first) == 0 || !cuda().owns(addresses_[each.first], bytes)) {
        return each.first + " has no GPU memory of its size";
      }
    }
    const char* const past = static_cast<char*>(addresses_["past.fast.sum.kernel"]);
    const char* const present = static_cast<char*>(addresses_["present.fast.sum.kernel"]);
    if ((past == present) != engine_.asked.in_place) {
      return "past and present must share memory if the engine works in place, and only then";
    }
    if (addresses_["past.position"] == addresses_["present.position"]) {
      return "past and present position share memory, but they are not updated in place";
    }
    return "";
  }

  Engine& engine_;
  int32_t profile_ = 0;
  std::map<std::string, std::vector<std::pair<int64_t, int64_t>>> shapes_; // dynamic axes
  std::map<std::string, void*> addresses_;
};

IExecutionContext* Engine::createExecutionContext(ExecutionContextAllocationStrategy) noexcept {
  require_gpu("createExecutionContext");
  if (fails("createExecutionContext")) {
    logger.log(ILogger::Severity::kERROR, "out of device memory");
    return nullptr;
  }
  return new Context(*this);
}

class Registry final : public IPluginRegistryStub {
public:
  explicit Registry(ILogger& logger) : logger_(logger) {}
  ~Registry() noexcept override = default;

  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    loaded = std::string(path).find("libfwl_trt.so") != std::string::npos;
    if (!loaded) {
      logger_.log(ILogger::Severity::kERROR, "no such library");
    }
    return loaded ? this : nullptr;
  }

  bool loaded = false;

private:
  ILogger& logger_;
};

class Runtime final : public IRuntime, public VRuntimeStub {
public:
  explicit Runtime(ILogger& logger) : logger_(logger), registry_(logger) {
    mImpl = this;
    count(settings().runtimes, 1);
  }
  ~Runtime() noexcept override {
    require_gpu("~IRuntime");
    if (settings().engines >= settings().runtimes) {
      violated("a runtime is destroyed before its engine");
    }
    count(settings().runtimes, -1);
  }
  IRuntime* getPImpl() noexcept override { return this; }

  IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }
  void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }
  ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept override {
    require_gpu("deserializeCudaEngine");
    std::istringstream text(std::string(static_cast<const char*>(blob), size));
    std::string word;
    EngineSettings asked;
    text >> word >> asked.rows >> asked.tokens >> asked.in_place >> asked.plugin >>
        asked.embedded >> asked.other_type;
    const bool runs = !asked.plugin || (asked.embedded ? host_code_ : registry_.loaded);
    if (!text || word != "fake" || !runs) {
      logger_.log(ILogger::Severity::kWARNING, "not this");
      logger_.log(ILogger::Severity::kERROR,
                  runs ? "magic tag does not match" : "plugin not found");
      return nullptr;
    }
    return new Engine(asked, logger_);
  }

private:
  ILogger& logger_;
  Registry registry_;
  bool host_code_ = false;
};

} // namespace

extern "C" {

fwl::fake::TensorRt* fwl_fake_tensorrt() {
  static fwl::fake::TensorRt state;
  return &state;
}

int32_t getInferLibVersion() noexcept {
  return settings().version;
}

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  if (fails("createInferRuntime")) {
    static_cast<ILogger*>(logger)->log(ILogger::Severity::kINTERNAL_ERROR, "cannot initialise");
    return nullptr;
  }
  if (version != settings().version) {
    violated("the runtime is created with another version than that of the library");
  }
  require_gpu("createInferRuntime");
  return static_cast<IRuntime*>(new Runtime(*static_cast<ILogger*>(logger)));
}

} // extern "C"

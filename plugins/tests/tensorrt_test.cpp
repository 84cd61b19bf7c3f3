// libfwl's runtime TensorRT on fakes of the driver and of TensorRT: it computes what the small
// model does, calls that fail leave rows unchanged, and errors name what is missing.
//
// Rows and results are compared in two pairs of parentheses, so that Catch2 does not print all
// bytes.

#include <dlfcn.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>

#include "../libfwl/src/sha256.h"
#include "cuda_fake.h"
#include "op_spec.h"
#include "sum_model.h"
#include "tensorrt_fake.h"

namespace {

using namespace fwl::test;
using nlohmann::json;
using namespace std::string_literals;
using Catch::Contains;
namespace fs = std::filesystem;

constexpr const char* kLibrary = FWL_TENSORRT_FAKE;
constexpr const char* kName = "tensorrt-10.14.1.48-sm89"; // the engine of EngineFile()

// Opens a fake and returns its state.
template <class State> State* fake_of(const char* path, const char* function) {
  void* const library = dlopen(path, RTLD_NOW);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  return reinterpret_cast<State* (*)()>(dlsym(library, function))();
}

// The fakes of the driver and of TensorRT. At the end of a test, everything that it took from them
// must be freed.
struct Fakes {
  ~Fakes() {
    CHECK(cuda->allocated.empty());
    CHECK(cuda->streams.empty());
    CHECK(cuda->retained == 0);
    CHECK(tensorrt->runtimes == 0);
    CHECK(tensorrt->engines == 0);
    CHECK(tensorrt->contexts == 0);
    CHECK(cuda->violations == std::vector<std::string>{});
    CHECK(tensorrt->violations == std::vector<std::string>{});
  }

  // The driver first: the fake of TensorRT looks for it.
  fwl::fake::Cuda* const cuda = fake_of<fwl::fake::Cuda>(FWL_CUDA_FAKE, "fwl_fake_cuda");
  fwl::fake::TensorRt* const tensorrt =
      fake_of<fwl::fake::TensorRt>(FWL_TENSORRT_FAKE, "fwl_fake_tensorrt");
};

// An engine in a bundle: its content, and what its metadata says.
struct EngineFile {
  std::string text = fwl::fake::engine_text(kRows, kLargest);
  int sm = 89;
  std::string version = "10.14.1.48";
  std::string variant = "tensorrt";
  bool plugin = false, embedded = false, in_place = false;
  bool names_tensors = true; // its metadata names the tensors that it updates in place
};

// A bundle of the small model, with engines.
class Folder {
public:
  explicit Folder(const std::vector<EngineFile>& engines) : path_("tensorrt_test.bundle") {
    fs::remove_all(path_);
    fs::create_directories(path_ / "engines");
    const Bundle bundle = Problem().model->bundle;
    json manifest = {{"schema_version", 3},
                     {"model_id", bundle.model_id},
                     {"precision", bundle.precision},
                     {"max_tokens", bundle.max_tokens},
                     {"op", {{"version", fwl::op::kVersion}}},
                     {"config",
                      {{"vocab_size", bundle.vocab_size},
                       {"backbone", json::object()},
                       {"fast_weights", {{"anchor_interval", bundle.anchor_interval}}}}},
                     {"files", json::object()},
                     {"state", json::array()}};
    for (const TensorSpec& spec : bundle.state) {
      manifest["state"].push_back({{"name", spec.name},
                                   {"shape", spec.shape},
                                   {"dtype", spec.type == Type::kInt64 ? "int64" : "float32"}});
    }
    for (const EngineFile& engine : engines) {
      const std::string name = engine.variant + "-" + engine.version + "-sm" +
                               std::to_string(engine.sm) + (engine.plugin ? "-plugin" : "") +
                               (engine.in_place ? "-inplace" : "");
      const json entry = add(manifest, "engines/" + name + ".engine", engine.text);
      json metadata = {{"schema_version", 1},
                       {"flavour", engine.variant},
                       {"version", engine.version},
                       {"sm", engine.sm},
                       {"model_id", bundle.model_id},
                       {"sha256", entry["sha256"]},
                       {"update_path", engine.plugin ? "plugin" : "function body"},
                       {"plugin_embedded", engine.embedded},
                       {"in_place_state", engine.in_place}};
      if (engine.names_tensors) {
        metadata["in_place_tensors"] = json::array();
        if (engine.in_place) {
          metadata["in_place_tensors"].push_back("fast.sum.kernel");
        }
      }
      add(manifest, "engines/" + name + ".json", metadata.dump());
    }
    write("manifest.json", manifest.dump());
  }
  ~Folder() { fs::remove_all(path_); }

  std::string name() const { return path_.string(); }
  void write(const std::string& file, const std::string& content) const {
    std::ofstream(path_ / file, std::ios::binary) << content;
  }
  std::string only_engine() const {
    for (const auto& entry : fs::directory_iterator(path_ / "engines")) {
      if (entry.path().extension() == ".engine") {
        return "engines/" + entry.path().stem().string();
      }
    }
    return "";
  }

private:
  json add(json& manifest, const std::string& file, const std::string& content) const {
    write(file, content);
    Sha256 hash;
    hash.update(reinterpret_cast<const unsigned char*>(content.data()), content.size());
    return manifest["files"][file] = {{"sha256", hash.hex()}, {"bytes", content.size()}};
  }

  fs::path path_;
};

struct Opened {
  fwl_model* model = nullptr;
  fwl_error error{};
  fwl_info info{};
  ~Opened() { fwl_model_close(model); }
};

fwl_options options_of(const char* backend = "tensorrt") {
  fwl_options options;
  fwl_options_init(&options, sizeof(options));
  options.backend = backend;
  options.tensorrt_library = kLibrary;
  return options;
}

std::unique_ptr<Opened> opened(const Folder& folder, const fwl_options& options) {
  auto made = std::make_unique<Opened>();
  if (fwl_model_open(folder.name().c_str(), &options, &made->model, &made->error) == FWL_OK) {
    made->info.size = sizeof(made->info);
    fwl_model_info(made->model, &made->info, nullptr);
  }
  return made;
}

void refused(const Folder& folder, const fwl_options& options, fwl_status status,
             const std::string& words) {
  const auto found = opened(folder, options);
  CHECK(found->model == nullptr);
  CHECK(found->error.status == status);
  CHECK_THAT(found->error.message, Contains(words));
}

void runs(const Folder& folder, const fwl_options& options, const std::string& engine) {
  const auto found = opened(folder, options);
  INFO(found->error.message);
  REQUIRE(found->model != nullptr);
  CHECK(found->info.backend == "tensorrt"s);
  CHECK(found->info.engine == engine);
}

// Hidden, because it needs a process of its own: once the fakes are open, there is a driver.
TEST_CASE("without a driver there is no GPU", "[.without driver]") {
  if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) {
    WARN("not tested: this machine has a driver");
    return;
  }
  refused(Folder({EngineFile()}), options_of(), FWL_ERROR_RUNTIME,
          "there is no CUDA device (libcuda.so.1: ");
}

TEST_CASE_METHOD(Fakes, "errors name what is missing") {
  const Folder folder({EngineFile()});
  fwl_options options = options_of();
  cuda->devices = 0;
  refused(folder, options, FWL_ERROR_RUNTIME, "there is no CUDA device (the driver finds no GPU)");
  cuda->devices = 1;
  options.device = 1;
  refused(folder, options, FWL_ERROR_ARGUMENT, "device is 1; expected 0 to 0");
  options = options_of();
  options.tensorrt_library = "/nowhere/libnvinfer.so";
  refused(folder, options, FWL_ERROR_RUNTIME, "TensorRT cannot be opened (/nowhere/libnvinfer.so");
  options.tensorrt_library = "libc.so.6";
  refused(folder, options, FWL_ERROR_RUNTIME, "'libc.so.6' is not TensorRT");
  for (const int32_t version : {110400, 10701, 90000}) {
    tensorrt->version = version;
    refused(folder, options_of(), FWL_ERROR_RUNTIME,
            "this libfwl was built for TensorRT 10, whose interface is different");
  }
  tensorrt->version = 100900;
  refused(folder, options_of(), FWL_ERROR_BUNDLE,
          "has no engine for TensorRT 10.9.0 on SM89; it has tensorrt-10.14.1.48-sm89; build one "
          "with `fwl-export build tensorrt_test.bundle --variant tensorrt --sm 89`");
  tensorrt->version = 101401;
  cuda->sm = 90;
  refused(folder, options_of(), FWL_ERROR_BUNDLE, "has no engine for TensorRT 10.14.1 on SM90");
  options = options_of("auto");
  options.runtime_library = "/nowhere/libonnxruntime.so";
  refused(folder, options, FWL_ERROR_RUNTIME, "ONNX Runtime cannot be opened");
  refused(folder, options, FWL_ERROR_RUNTIME, "TensorRT was tried first: bundle");
  cuda->sm = 89;
  refused(folder, options_of("cuda"), FWL_ERROR_ARGUMENT, "expected onnxruntime, tensorrt or auto");
  tensorrt->failing = "createInferRuntime";
  refused(folder, options_of(), FWL_ERROR_RUNTIME, "TensorRT cannot start (cannot initialise)");
  tensorrt->failing = "";
  runs(folder, options_of("auto"), kName);
  refused(Folder({}), options_of(), FWL_ERROR_BUNDLE,
          "has no engine for TensorRT 10.14.1 on SM89;");
}

TEST_CASE_METHOD(Fakes, "damaged engines and engines of other builders are refused") {
  {
    const Folder folder({EngineFile()});
    const std::string name = folder.only_engine();
    const std::string text = EngineFile().text;
    for (size_t size = 0; size < text.size(); ++size) {
      folder.write(name + ".engine", text.substr(0, size));
      refused(folder, options_of(), FWL_ERROR_BUNDLE, "is not what the manifest says");
    }
    fs::remove(fs::path(folder.name()) / (name + ".engine"));
    refused(folder, options_of(), FWL_ERROR_BUNDLE, "lacks the file '" + name + ".engine'");
    folder.write(name + ".json", "{}");
    refused(folder, options_of(), FWL_ERROR_BUNDLE, "is not what the manifest says");
  }
  EngineFile engine;
  engine.text = "of another builder";
  refused(Folder({engine}), options_of(), FWL_ERROR_BUNDLE,
          "TensorRT refuses the engine 'tensorrt-10.14.1.48-sm89'; build it again (magic tag does "
          "not match)");
  engine.text = fwl::fake::engine_text(kRows, kLargest, false, false, false, true);
  refused(Folder({engine}), options_of(), FWL_ERROR_BUNDLE, "has no input 'lengths' as the bundle");
}

TEST_CASE_METHOD(Fakes, "the engine and its plugin are chosen") {
  EngineFile plain, plugin, embedded, in_place, other;
  plugin.plugin = true;
  plugin.text = fwl::fake::engine_text(kRows, kLargest, false, true);
  other.sm = 80;
  const std::string name = kName;
  fwl_options with_plugin = options_of();
  with_plugin.tensorrt_plugin = "/nowhere/libfwl_trt.so"; // the fake looks at the name only
  runs(Folder({other, plain, plugin}), options_of(), name);
  runs(Folder({other, plain, plugin}), with_plugin, name + "-plugin");
  refused(Folder({plain}), with_plugin, FWL_ERROR_BUNDLE,
          "no engine for TensorRT 10.14.1 on SM89 uses it");
  refused(Folder({plugin}), options_of(), FWL_ERROR_RUNTIME, "give the path of libfwl_trt.so");
  fwl_options wrong = options_of();
  wrong.tensorrt_plugin = "/nowhere/other.so";
  refused(Folder({plugin}), wrong, FWL_ERROR_RUNTIME,
          "cannot load the plugin '/nowhere/other.so' (no such library)");
  embedded = plugin;
  embedded.embedded = true;
  embedded.text = fwl::fake::engine_text(kRows, kLargest, false, true, true);
  refused(Folder({embedded}), options_of(), FWL_ERROR_RUNTIME,
          "if you trust the bundle, set allow_embedded_plugin");
  fwl_options trusting = options_of();
  trusting.allow_embedded_plugin = 1;
  runs(Folder({embedded}), trusting, name + "-plugin");
  in_place = plugin;
  in_place.in_place = true;
  in_place.text = fwl::fake::engine_text(kRows, kLargest, true, true);
  runs(Folder({in_place, plugin}), with_plugin, name + "-plugin");
  runs(Folder({in_place}), with_plugin, name + "-plugin-inplace");
}

std::shared_ptr<Model> model_of(const Folder& folder, const char* plugin = nullptr) {
  auto model = std::make_shared<Model>();
  model->bundle = read_bundle(folder.name());
  model->runtime = open_tensorrt(model->bundle, {kLibrary, plugin, 0, false});
  return model;
}

TEST_CASE_METHOD(Fakes, "too many rows for an engine are refused") {
  const Folder folder({EngineFile()});
  const auto found = opened(folder, options_of());
  fwl_session* session = nullptr;
  fwl_error error;
  CHECK(fwl_session_open(found->model, kRows + 1, &session, &error) == FWL_ERROR_ARGUMENT);
  CHECK_THAT(error.message, Contains("takes 1 to 3; build one with"));
}

TEST_CASE_METHOD(Fakes, "sessions compute what the small model does, whatever fails") {
  EngineFile engine;
  const char* plugin = nullptr;
  SECTION("an engine for the bundle's largest call") {}
  SECTION("an engine for shorter calls") {
    engine.text = fwl::fake::engine_text(kRows, kLargest - 1);
  }
  SECTION("an engine with the state in place") {
    engine.plugin = engine.in_place = true;
    engine.text = fwl::fake::engine_text(kRows, kLargest, true, true);
    plugin = "libfwl_trt.so";
  }
  SECTION("an engine with the state in place, whose metadata does not name the tensors") {
    engine.plugin = engine.in_place = true;
    engine.names_tensors = false;
    engine.text = fwl::fake::engine_text(kRows, kLargest, true, true);
    plugin = "libfwl_trt.so";
  }
  const Folder folder({engine});
  const auto model = model_of(folder, plugin);
  const Bundle& bundle = model->bundle;
  Session session(model, kRows);
  Session expected(Problem().model, kRows);
  std::mt19937 generator(5);
  int refused_calls = 0;
  for (int round = 0; round < 600; ++round) {
    CAPTURE(round);
    const Read read = random_read(generator);
    const auto which = static_cast<fwl_logits>(generator() % 3);
    const size_t row = generator() % kRows, other = (row + 1) % kRows;
    const auto kind = generator() % 5;
    const float scale[] = {0.25f * static_cast<float>(generator() % 8), 1.0f, 2.0f};
    session.set_learning_rate_scale(scale);
    expected.set_learning_rate_scale(scale);
    const std::vector<RowState> before = rows_of(session, bundle);
    const std::vector<int64_t> positions = session.positions();
    std::vector<float> logits(kRows * read.count * kVocabulary, -1.0f);
    const std::vector<float> untouched = logits;
    const auto act = [&](Session& on) {
      if (kind == 0) {
        on.fork(row, &other, 1);
      } else if (kind == 1) {
        on.reset(&row, 1);
      } else {
        on.feed(read.ids.data(), read.count, nullptr, read.lengths.data(), which, logits.data(),
                logits.size());
      }
    };
    if (round % 2 == 1) {
      (generator() % 2 != 0 ? cuda->calls_left : tensorrt->enqueues_left) =
          static_cast<long>(generator() % 12);
    }
    bool failed = false;
    try {
      act(session);
    } catch (const Failure&) {
      failed = true;
    }
    cuda->calls_left = tensorrt->enqueues_left = -1;
    if (failed) {
      ++refused_calls;
      REQUIRE((rows_of(session, bundle) == before));
      REQUIRE(session.positions() == positions);
      REQUIRE((logits == untouched));
      act(session);
    }
    const std::vector<float> found = logits;
    logits = untouched;
    act(expected);
    REQUIRE((found == logits));
    REQUIRE((rows_of(session, bundle) == rows_of(expected, bundle)));
  }
  std::printf("refused of 300 calls with a fault: %d\n", refused_calls);
  CHECK(refused_calls > 100);
}

TEST_CASE_METHOD(Fakes, "a function that fails is named") {
  const Folder folder({EngineFile()});
  const auto model = model_of(folder);
  const std::pair<const char*, const char*> faults[] = {
      {"createExecutionContext", "cannot make an execution context (out of device memory)"},
      {"setOptimizationProfileAsync", "cannot make an execution context (no such profile)"},
      {"setInputShape", "refuses the shape of input_ids"},
      {"setTensorAddress", "refuses the address of input_ids"}};
  Session session(model, kRows);
  std::mt19937 generator(6);
  const Read read = random_read(generator);
  for (const auto& [function, words] : faults) {
    tensorrt->failing = function;
    const Failure failure = failure_of([&] { feed(session, read, FWL_LOGITS_LAST); });
    CHECK_THAT(failure.what(), Contains(words));
  }
  tensorrt->failing = "";
  feed(session, read, FWL_LOGITS_LAST);
  cuda->calls_left = 0;
  CHECK(failure_of([&] { Session(model, kRows); }).status() == FWL_ERROR_MEMORY);
  cuda->calls_left = -1;
}

TEST_CASE_METHOD(Fakes, "threads share a session and a model", "[threads]") {
  const Folder folder({EngineFile()});
  const auto model = model_of(folder);
  Session shared(model, kRows);
  std::vector<std::future<bool>> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.push_back(std::async(std::launch::async, [&, seed] {
      std::mt19937 generator(seed);
      Session own(model, kRows), expected(Problem().model, kRows);
      bool same = true;
      for (int i = 0; i < 30; ++i) {
        const Read read = random_read(generator);
        same &= feed(own, read, FWL_LOGITS_ALL) == feed(expected, read, FWL_LOGITS_ALL);
        feed(shared, read, FWL_LOGITS_LAST);
        shared.positions();
      }
      return same;
    }));
  }
  for (std::future<bool>& thread : threads) {
    CHECK(thread.get());
  }
}

} // namespace

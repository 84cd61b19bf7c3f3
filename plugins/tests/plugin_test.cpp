// The plugin as TensorRT uses it, but without TensorRT: creator, fields, types, formats, shapes,
// aliasing, and enqueue on a fake CUDA driver.

#include <memory>
#include <string>

#include "gpu_problem.h"
#include "op_spec.h"
#include "tensorrt/plugin.h"

namespace {

using namespace fwl;
using namespace fwl::test;
using namespace nvinfer1;
using trt::Creator;
using trt::Plugin;
using namespace std::string_literals;

// A fake driver, and a logger as TensorRT passes it.
struct Logged : FakeDriver, ILogger, ILoggerFinder {
  Logged() { trt::set_logger_finder(this); }
  ~Logged() { trt::set_logger_finder(nullptr); }
  ILogger* findLogger() override { return this; }
  void log(Severity severity, const char* message) noexcept override {
    only_errors = only_errors && severity == Severity::kERROR;
    last = message;
  }

  // Checks the last message and forgets it.
  void check_message(const std::string& words) {
    CHECK(only_errors);
    CHECK_THAT(last, Catch::StartsWith("fwl::LinearAttentionUpdate: ") && Catch::Contains(words));
    last.clear();
  }

  bool only_errors = true;
  std::string last;
};

std::unique_ptr<Plugin> created(std::vector<PluginField> fields,
                                const char* version = op::kPluginVersion) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<Plugin>(
      Creator(version).createPlugin("node", &collection, TensorRTPhase::kBUILD));
}

constexpr int32_t kInputs = op::kInputCount;
constexpr int32_t kOutputs = op::kOutputCount;
constexpr int32_t kState = static_cast<int32_t>(op::kPresentState);

TEST_CASE("without a logger, mistakes are refused without a message") {
  CHECK(created({{"unheard", nullptr, PluginFieldType::kINT32, 1}}) == nullptr);
}

TEST_CASE_METHOD(Logged, "the creator has the op's name and reads its field") {
  Creator creator(op::kPluginVersion);
  CHECK(creator.getPluginName() == "LinearAttentionUpdate"s);
  CHECK(creator.getPluginNamespace() == "fwl"s);
  CHECK(creator.getPluginVersion() == "2"s);
  const PluginFieldCollection& names = *creator.getFieldNames();
  REQUIRE(names.nbFields == 1);
  CHECK(names.fields[0].name == "in_place_state"s);

  REQUIRE(created({}) != nullptr);
  CHECK(created({})->getAliasedInput(kState) == -1);
  std::unique_ptr<Plugin> none(Creator("2").createPlugin("node", nullptr, TensorRTPhase::kRUNTIME));
  CHECK(none != nullptr);
  const int32_t one = 1, two = 2;
  const int64_t wide = 1;
  const auto in_place = created({{"plugin_namespace", "fwl", PluginFieldType::kCHAR, 3},
                                 {"in_place_state", &one, PluginFieldType::kINT32, 1}});
  REQUIRE(in_place != nullptr);
  CHECK(in_place->getAliasedInput(kState) == 4);
  CHECK(in_place->getAliasedInput(0) == -1); // the output
  CHECK(created({{"in_place_state", &two, PluginFieldType::kINT32, 1}}) == nullptr);
  check_message("attribute 'in_place_state' is 2; expected 0 or 1");
  for (const PluginField& bad : {PluginField{"in_place_state", &wide, PluginFieldType::kINT64, 1},
                                 PluginField{"in_place_state", nullptr, PluginFieldType::kINT32, 1},
                                 PluginField{"in_place_state", &one, PluginFieldType::kINT32, 0}}) {
    CHECK(created({bad}) == nullptr);
    check_message("attribute 'in_place_state' must be one 32-bit integer");
  }
  for (const char* name : {"decay_rate", static_cast<const char*>(nullptr)}) {
    CHECK(created({{name, &one, PluginFieldType::kINT32, 1}}) == nullptr);
    check_message("is unknown; install the version that wrote the model");
  }
}

TEST_CASE("copies have a field of their own") {
  const int32_t one = 1;
  const auto original = created({{"in_place_state", &one, PluginFieldType::kINT32, 1}});
  const std::unique_ptr<Plugin> clone(original->clone());
  const std::unique_ptr<Plugin> attached(original->attachToContext(nullptr));
  // The fields that a build stores in an engine create the same plugin at run time.
  const std::unique_ptr<Plugin> read(
      Creator("2").createPlugin("node", clone->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  for (const auto* copy : {&clone, &attached, &read}) {
    REQUIRE(*copy != nullptr);
    CHECK((*copy)->getAliasedInput(kState) == 4);
    CHECK((*copy)->getFieldsToSerialize()->fields[0].data !=
          original->getFieldsToSerialize()->fields[0].data);
  }
}

TEST_CASE("the plugin has every capability") {
  Plugin plugin("2", true);
  CHECK(plugin.getPluginName() == std::string(op::kName));
  for (const auto type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD,
                          PluginCapabilityType::kRUNTIME}) {
    CAPTURE(type);
    CHECK(plugin.getCapabilityInterface(type) != nullptr);
  }
  auto* const build = static_cast<IPluginV3OneBuildV2*>(
      plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
  CHECK(build->getInterfaceInfo().major == 2); // IPluginV3OneBuildV2
  CHECK(plugin.getNbOutputs() == 2);
}

TEST_CASE_METHOD(Logged, "outputs are float32 whatever the types of the inputs") {
  const auto plugin = created({});
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    const DataType inputs[] = {type, type, type, DataType::kFLOAT, DataType::kFLOAT};
    DataType outputs[2] = {};
    CHECK(plugin->getOutputDataTypes(outputs, kOutputs, inputs, kInputs) == 0);
    CHECK(outputs[0] == DataType::kFLOAT);
    CHECK(outputs[1] == DataType::kFLOAT);
  }
  const struct {
    DataType inputs[5];
    const char* words;
  } bad[] = {
      {{DataType::kINT32, DataType::kINT32, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT},
       "'query' is int32; expected float32, float16 or bfloat16"},
      {{DataType::kHALF, DataType::kFLOAT, DataType::kHALF, DataType::kFLOAT, DataType::kFLOAT},
       "'key' is float32; expected the type of 'query', float16"},
      {{DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kFLOAT, DataType::kHALF},
       "'past_state' is float16; expected float32"},
  };
  DataType outputs[2];
  for (const auto& each : bad) {
    CHECK(plugin->getOutputDataTypes(outputs, kOutputs, each.inputs, kInputs) != 0);
    check_message(each.words);
  }
  CHECK(plugin->getOutputDataTypes(outputs, kOutputs, bad[0].inputs, 4) != 0);
  check_message("there are 4 inputs and 2 outputs; expected 5 and 2");
}

TEST_CASE_METHOD(Logged, "the older version takes float32 only") {
  const auto plugin = created({}, "1");
  REQUIRE(plugin != nullptr);
  CHECK(plugin->getPluginVersion() == "1"s);
  CHECK(std::unique_ptr<Plugin>(plugin->clone())->getPluginVersion() == "1"s);
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    CAPTURE(type);
    const bool fits = type == DataType::kFLOAT;
    const DataType inputs[] = {type, type, type, DataType::kFLOAT, DataType::kFLOAT};
    DataType outputs[2] = {};
    DynamicPluginTensorDesc tensors[7] = {};
    PluginTensorDesc descs[7] = {};
    for (size_t i = 0; i < 7; ++i) {
      const op::Argument& argument = i < 5 ? op::kInputs[i] : op::kOutputs[i - 5];
      descs[i].type = i < 5 ? inputs[i] : DataType::kFLOAT;
      descs[i].dims.nbDims = static_cast<int32_t>(argument.rank);
      std::fill(std::begin(descs[i].dims.d), std::end(descs[i].dims.d), 4);
      tensors[i].desc = descs[i];
    }
    CHECK((plugin->getOutputDataTypes(outputs, kOutputs, inputs, kInputs) == 0) == fits);
    CHECK(last.empty() == fits);
    CHECK(plugin->supportsFormatCombination(0, tensors, kInputs, kOutputs) == fits);
    // An engine of the older version in half precision is refused before it computes anything.
    CHECK((plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) == 0) == fits);
    if (!fits) {
      check_message("expected float32, which is all that version 1 takes: in half precision its "
                    "output overflows, so export the model again");
    }
  }
}

TEST_CASE("formats must be linear, and types those of the op") {
  const auto plugin = created({});
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    DynamicPluginTensorDesc tensors[7] = {};
    for (int32_t i = 0; i < 7; ++i) {
      CAPTURE(type, i);
      const bool activation = i < 3;
      tensors[i].desc.type = activation ? type : DataType::kFLOAT;
      tensors[i].desc.format = TensorFormat::kLINEAR;
      CHECK(plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs));
      tensors[i].desc.format = TensorFormat::kCHW32;
      CHECK_FALSE(plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs));
      tensors[i].desc.format = TensorFormat::kLINEAR;
      tensors[i].desc.type = DataType::kINT8;
      CHECK_FALSE(plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs));
      tensors[i].desc.type = activation ? type : DataType::kFLOAT;
    }
    tensors[5].desc.type = DataType::kHALF;
    CHECK_FALSE(plugin->supportsFormatCombination(5, tensors, kInputs, kOutputs));
  }
}

// A size, or -1 if it is unknown.
struct Size final : IDimensionExpr {
  struct Impl final : apiv::VDimensionExpr {
    bool isConstant() const override { return value >= 0; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    int64_t value = -1;
  } impl;
  Size() { mImpl = &impl; }
};

struct NoBuilder final : IExprBuilder {};

TEST_CASE_METHOD(Logged, "shapes of outputs follow those of inputs") {
  const auto plugin = created({});
  Size sizes[kInputs][3];
  DimsExprs inputs[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) {
    inputs[i].nbDims = static_cast<int32_t>(op::kInputs[i].rank);
    for (int32_t axis = 0; axis < 3; ++axis) {
      inputs[i].d[axis] = &sizes[i][axis];
    }
  }
  NoBuilder builder;
  DimsExprs outputs[kOutputs];
  const auto shapes = [&] {
    return plugin->getOutputShapes(inputs, kInputs, nullptr, 0, outputs, kOutputs, builder);
  };
  CHECK(shapes() == 0);
  CHECK(outputs[0].nbDims == 3);
  CHECK(outputs[0].d[0] == &sizes[op::kValue][0]);
  CHECK(outputs[0].d[2] == &sizes[op::kValue][2]);
  CHECK(outputs[1].nbDims == 3);
  CHECK(outputs[1].d[1] == &sizes[op::kPastState][1]);
  sizes[op::kQuery][2].impl.value = 8;
  sizes[op::kPastState][1].impl.value = 9;
  CHECK(shapes() != 0);
  check_message("Dk of 'past_state' is 9; expected 8, as in the inputs before it");
  sizes[op::kPastState][1].impl.value = 0;
  CHECK(shapes() != 0);
  check_message("Dk of 'past_state' is 0; expected 1 or more");
  sizes[op::kPastState][1].impl.value = 8;
  inputs[op::kDecay].nbDims = 3;
  CHECK(shapes() != 0);
  check_message("'decay' has 3 axes; expected 2");
}

Dims dims_of(const op::Argument& argument, const gpu::Sizes& sizes) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(argument.rank);
  for (size_t axis = 0; axis < argument.rank; ++axis) {
    const std::string symbol = argument.axes[axis];
    dims.d[axis] = symbol == "B"    ? sizes.rows
                   : symbol == "T"  ? sizes.tokens
                   : symbol == "Dk" ? sizes.size_k
                                    : sizes.size_v;
  }
  return dims;
}

TEST_CASE_METHOD(Logged, "enqueue computes the op with the kernels that onShapeChange loaded") {
  constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
  for (const bool in_place : {false, true}) {
    const int32_t flag = in_place;
    const auto plugin = created({{"in_place_state", &flag, PluginFieldType::kINT32, 1}});
    for (const DataType type : kTypes) {
      const gpu::Activation activation = type == DataType::kFLOAT  ? gpu::Activation::kFloat32
                                         : type == DataType::kHALF ? gpu::Activation::kFloat16
                                                                   : gpu::Activation::kBFloat16;
      const gpu::Sizes largest{3, 70, 48, 33, activation};
      PluginTensorDesc descs[7] = {};
      DynamicPluginTensorDesc ranges[7] = {};
      for (const gpu::Sizes& sizes :
           {largest, gpu::Sizes{1, 1, 48, 33, activation}, gpu::Sizes{2, 9, 48, 33, activation}}) {
        for (size_t i = 0; i < 7; ++i) {
          const op::Argument& argument =
              i < op::kInputCount ? op::kInputs[i] : op::kOutputs[i - op::kInputCount];
          descs[i].type = argument.activation ? type : DataType::kFLOAT;
          descs[i].dims = dims_of(argument, sizes);
          ranges[i].desc = descs[i];
          ranges[i].max = dims_of(argument, largest);
        }
        CAPTURE(type, sizes.tokens, in_place);
        REQUIRE(plugin->configurePlugin(ranges, kInputs, ranges + kInputs, kOutputs) == 0);
        Problem problem(sizes, 4);
        problem.keep_reference();
        const gpu::Tensors t = problem.tensors(in_place);
        const void* const inputs[] = {t.query, t.key, t.value, t.decay, t.past};
        void* const outputs[] = {t.output, t.present};
        std::vector<char> workspace(
            plugin->getWorkspaceSize(ranges, kInputs, ranges + kInputs, kOutputs), '\xff');
        const auto enqueue = [&] {
          return plugin->enqueue(descs, descs + kInputs, inputs, outputs, workspace.data(),
                                 nullptr);
        };
        CHECK(plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) == 0);
        const size_t loaded = driver.loaded;
        CHECK(enqueue() == 0);
        CHECK(driver.loaded == loaded);
        problem.check(in_place);

        driver.failing = "cuLaunchKernel";
        CHECK(enqueue() != 0);
        check_message("cuLaunchKernel failed: CUDA_ERROR_UNKNOWN");
        driver.failing = "";
        descs[op::kPastState].dims.d[0] += 1;
        CHECK(plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) != 0);
        check_message("B of 'past_state' is ");
      }
    }
  }
}

TEST_CASE_METHOD(Logged, "random fields, shapes and types give a result or a message") {
  std::mt19937 generator(17);
  const auto below = [&](uint32_t limit) { return static_cast<uint32_t>(generator() % limit); };
  const int64_t kSizes[] = {-1, 0, 1, 2, 48, 1 << 16, INT32_MAX, INT64_MAX, INT64_MIN};
  const DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16,
                             DataType::kINT32, DataType::kINT8, static_cast<DataType>(99)};
  const char* const kNames[] = {"in_place_state", "plugin_version", "plugin_namespace", "",
                                nullptr,          "in_place_statE"};
  NoBuilder builder;
  size_t made = 0, refused = 0, shaped = 0, run = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<int32_t> values(4);
    std::vector<PluginField> fields(below(4));
    for (size_t i = 0; i < fields.size(); ++i) {
      values[i] = static_cast<int32_t>(below(8) ? below(2) : generator());
      fields[i] = {kNames[below(8) ? below(3) : below(6)], below(16) ? &values[i] : nullptr,
                   below(8) ? PluginFieldType::kINT32 : static_cast<PluginFieldType>(below(14)),
                   below(8) ? 1 : static_cast<int32_t>(below(3)) - 1};
    }
    const auto plugin = created(fields);
    ++(plugin ? made : refused);
    if (!plugin) {
      CHECK_FALSE(last.empty());
      last.clear();
      continue;
    }
    Size sizes[kInputs][8];
    DimsExprs inputs[kInputs], outputs[kOutputs];
    PluginTensorDesc descs[7] = {};
    DynamicPluginTensorDesc ranges[7] = {};
    const bool sane = below(2);
    gpu::Sizes fits{1 + below(3), 1 + below(70), 48, 33, gpu::Activation::kFloat32};
    for (int32_t i = 0; i < 7; ++i) {
      const op::Argument& argument = i < kInputs ? op::kInputs[i] : op::kOutputs[i - kInputs];
      descs[i].type = sane || below(8) ? DataType::kFLOAT : kTypes[below(6)];
      descs[i].dims = dims_of(argument, fits);
      if (!sane && below(2)) {
        descs[i].dims.nbDims = static_cast<int32_t>(below(10)) - 1;
        for (int64_t& size : descs[i].dims.d) {
          size = below(3) ? size : kSizes[below(std::size(kSizes))];
        }
      }
      ranges[i].desc = descs[i];
      ranges[i].min = ranges[i].opt = ranges[i].max = descs[i].dims;
      if (i < kInputs) {
        inputs[i].nbDims = descs[i].dims.nbDims;
        for (int32_t axis = 0; axis < 8; ++axis) {
          inputs[i].d[axis] = &sizes[i][axis];
          sizes[i][axis].impl.value = below(4) ? descs[i].dims.d[axis] : -1;
        }
      }
    }
    const auto answered = [&](bool good, const char* what) {
      if (!good) {
        CAPTURE(what, last);
        CHECK_FALSE(last.empty());
        CHECK_FALSE(sane);
      }
      last.clear();
      return good;
    };
    DataType types[kInputs], output_types[kOutputs];
    for (int32_t i = 0; i < kInputs; ++i) {
      types[i] = descs[i].type;
    }
    answered(plugin->getOutputDataTypes(output_types, kOutputs, types, kInputs) == 0, "types");
    for (int32_t i = 0; i < 7; ++i) {
      plugin->supportsFormatCombination(i, ranges, kInputs, kOutputs);
    }
    shaped += answered(
        plugin->getOutputShapes(inputs, kInputs, nullptr, 0, outputs, kOutputs, builder) == 0,
        "shapes");
    if (!answered(plugin->configurePlugin(ranges, kInputs, ranges + kInputs, kOutputs) == 0,
                  "configurePlugin")) {
      continue;
    }
    const size_t bytes = plugin->getWorkspaceSize(ranges, kInputs, ranges + kInputs, kOutputs);
    if (answered(plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) == 0,
                 "onShapeChange") &&
        sane) {
      Problem problem(fits, static_cast<unsigned>(round));
      const gpu::Tensors t = problem.tensors(false);
      const void* const pointers[] = {t.query, t.key, t.value, t.decay, t.past};
      void* const results[] = {t.output, t.present};
      std::vector<char> workspace(bytes);
      if (run < 100) { // the fake computes slowly
        answered(plugin->enqueue(descs, descs + kInputs, pointers, results, workspace.data(),
                                 nullptr) == 0,
                 "enqueue");
      }
      ++run;
    }
  }
  CHECK(only_errors);
  // The random inputs reach all of these outcomes.
  CHECK(made > 1000);
  CHECK(refused > 1000);
  CHECK(shaped > 1000);
  CHECK(run >= 100);
}

} // namespace

// The plugin object as TensorRT uses it, without TensorRT: creator, fields, types, formats, shapes,
// aliasing, and enqueue on a double of the CUDA driver.

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "gpu_problem.h"
#include "op_spec.h"
#include "tensorrt/plugin.h"

namespace {

using namespace fwl;
using namespace fwl::test;
using namespace nvinfer1;
using trt::Creator;
using trt::Plugin;

struct Logger : ILogger, ILoggerFinder {
  void log(Severity severity, const char* message) noexcept override {
    expect(severity == Severity::kERROR, "a message is no error");
    last = message;
  }
  ILogger* findLogger() override { return this; }

  std::string last;
} logger;

// Whether the last message has these words; forgets it.
void expect_message(const std::string& words) {
  expect(logger.last.find("fwl::LinearAttentionUpdate: ") == 0 &&
             logger.last.find(words) != std::string::npos,
         "'" + logger.last + "' does not say '" + words + "'");
  logger.last.clear();
}

std::unique_ptr<Plugin> created(std::vector<PluginField> fields) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<Plugin>(
      Creator().createPlugin("node", &collection, TensorRTPhase::kBUILD));
}

constexpr int32_t kInputs = op::kInputCount;
constexpr int32_t kOutputs = op::kOutputCount;
constexpr int32_t kState = static_cast<int32_t>(op::kPresentState);

void test_creator() {
  Creator creator;
  expect(std::string(creator.getPluginName()) == "LinearAttentionUpdate", "name");
  expect(std::string(creator.getPluginNamespace()) == "fwl", "namespace");
  expect(std::string(creator.getPluginVersion()) == "1", "version");
  const PluginFieldCollection& names = *creator.getFieldNames();
  expect(names.nbFields == 1 && std::string(names.fields[0].name) == "in_place_state", "fields");

  expect(created({}) != nullptr && created({})->getAliasedInput(kState) == -1, "default");
  std::unique_ptr<Plugin> none(Creator().createPlugin("node", nullptr, TensorRTPhase::kRUNTIME));
  expect(none != nullptr, "no collection of fields");
  const int32_t one = 1, two = 2;
  const int64_t wide = 1;
  const auto in_place = created({{"plugin_namespace", "fwl", PluginFieldType::kCHAR, 3},
                                 {"in_place_state", &one, PluginFieldType::kINT32, 1}});
  expect(in_place != nullptr, "in place");
  expect(in_place->getAliasedInput(kState) == 4, "the state is not aliased");
  expect(in_place->getAliasedInput(0) == -1, "the output is aliased");
  expect(created({{"in_place_state", &two, PluginFieldType::kINT32, 1}}) == nullptr, "2");
  expect_message("attribute 'in_place_state' is 2; expected 0 or 1");
  for (const PluginField& bad : {PluginField{"in_place_state", &wide, PluginFieldType::kINT64, 1},
                                 PluginField{"in_place_state", nullptr, PluginFieldType::kINT32, 1},
                                 PluginField{"in_place_state", &one, PluginFieldType::kINT32, 0}}) {
    expect(created({bad}) == nullptr, "a bad field");
    expect_message("attribute 'in_place_state' is not one 32-bit integer");
  }
  for (const char* name : {"decay_rate", static_cast<const char*>(nullptr)}) {
    expect(created({{name, &one, PluginFieldType::kINT32, 1}}) == nullptr, "unknown field");
    expect_message("is unknown; install the version that wrote the model");
  }
}

void test_copies() {
  const int32_t one = 1;
  const auto original = created({{"in_place_state", &one, PluginFieldType::kINT32, 1}});
  const std::unique_ptr<Plugin> clone(original->clone());
  const std::unique_ptr<Plugin> attached(original->attachToContext(nullptr));
  // What a build wrote into the engine makes the same plugin at run time.
  const std::unique_ptr<Plugin> read(
      Creator().createPlugin("node", clone->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  for (const auto* copy : {&clone, &attached, &read}) {
    expect(*copy != nullptr && (*copy)->getAliasedInput(kState) == 4, "a copy lost its field");
    expect((*copy)->getFieldsToSerialize()->fields[0].data !=
               original->getFieldsToSerialize()->fields[0].data,
           "a copy shares memory with its original");
  }
  Plugin& plugin = *original;
  expect(std::string(plugin.getPluginName()) == op::kName, "name");
  for (const auto type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD,
                          PluginCapabilityType::kRUNTIME}) {
    expect(plugin.getCapabilityInterface(type) != nullptr, "a capability is missing");
  }
  auto* const build = static_cast<IPluginV3OneBuildV2*>(
      plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
  expect(build->getInterfaceInfo().major == 2, "IPluginV3OneBuildV2");
  expect(plugin.getNbOutputs() == 2, "outputs");
}

void test_types() {
  const auto plugin = created({});
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    const DataType inputs[] = {type, type, type, DataType::kFLOAT, DataType::kFLOAT};
    DataType outputs[2] = {};
    expect(plugin->getOutputDataTypes(outputs, kOutputs, inputs, kInputs) == 0, "types");
    expect(outputs[0] == type && outputs[1] == DataType::kFLOAT, "types of outputs");
  }
  const struct {
    DataType inputs[5];
    const char* words;
  } bad[] = {
      {{DataType::kINT32, DataType::kINT32, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT},
       "'query' is int32; expected float32, float16 or bfloat16"},
      {{DataType::kHALF, DataType::kFLOAT, DataType::kHALF, DataType::kFLOAT, DataType::kFLOAT},
       "'key' is float32; expected that of 'query', float16"},
      {{DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kFLOAT, DataType::kHALF},
       "'past_state' is float16; expected float32"},
  };
  DataType outputs[2];
  for (const auto& each : bad) {
    expect(plugin->getOutputDataTypes(outputs, kOutputs, each.inputs, kInputs) != 0, each.words);
    expect_message(each.words);
  }
  expect(plugin->getOutputDataTypes(outputs, kOutputs, bad[0].inputs, 4) != 0, "4 inputs");
  expect_message("there are 4 inputs and 2 outputs; expected 5 and 2");
}

void test_formats() {
  const auto plugin = created({});
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    DynamicPluginTensorDesc tensors[7] = {};
    for (int32_t i = 0; i < 7; ++i) {
      const bool activation = i < 3 || i == 5;
      tensors[i].desc.type = activation ? type : DataType::kFLOAT;
      tensors[i].desc.format = TensorFormat::kLINEAR;
      expect(plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs), "a good format");
      tensors[i].desc.format = TensorFormat::kCHW32;
      expect(!plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs), "kCHW32");
      tensors[i].desc.format = TensorFormat::kLINEAR;
      tensors[i].desc.type = DataType::kINT8;
      expect(!plugin->supportsFormatCombination(i, tensors, kInputs, kOutputs), "int8");
      tensors[i].desc.type = activation ? type : DataType::kFLOAT;
    }
    tensors[5].desc.type = type == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
    expect(!plugin->supportsFormatCombination(5, tensors, kInputs, kOutputs), "another type");
  }
}

// A size that is known, or not (-1).
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

void test_shapes() {
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
  expect(shapes() == 0, "free shapes");
  expect(outputs[0].nbDims == 3 && outputs[0].d[0] == &sizes[op::kValue][0] &&
             outputs[0].d[2] == &sizes[op::kValue][2],
         "the output's shape is not that of value");
  expect(outputs[1].nbDims == 3 && outputs[1].d[1] == &sizes[op::kPastState][1],
         "the state's shape changes");
  sizes[op::kQuery][2].impl.value = 8;
  sizes[op::kPastState][1].impl.value = 9;
  expect(shapes() != 0, "sizes that do not fit");
  expect_message("Dk of 'past_state' is 9; expected 8, that of the inputs before");
  sizes[op::kPastState][1].impl.value = 0;
  expect(shapes() != 0, "no size");
  expect_message("Dk of 'past_state' is 0; expected 1 or more");
  sizes[op::kPastState][1].impl.value = 8;
  inputs[op::kDecay].nbDims = 3;
  expect(shapes() != 0, "rank");
  expect_message("'decay' has 3 axes; expected 2");
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

void test_enqueue() {
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
        expect(plugin->configurePlugin(ranges, kInputs, ranges + kInputs, kOutputs) == 0,
               "configurePlugin");
        Problem problem(sizes, 4);
        problem.keep_reference();
        const gpu::Tensors t = problem.tensors(in_place);
        const void* const inputs[] = {t.query, t.key, t.value, t.decay, t.past};
        void* const outputs[] = {t.output, t.present};
        std::vector<char> workspace(
            plugin->getWorkspaceSize(ranges, kInputs, ranges + kInputs, kOutputs), '\xff');
        expect(plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) == 0,
               "onShapeChange");
        const size_t loaded = fake::driver().loaded;
        expect(plugin->enqueue(descs, descs + kInputs, inputs, outputs, workspace.data(),
                               nullptr) == 0,
               "enqueue");
        expect(fake::driver().loaded == loaded, "enqueue loads code");
        problem.check("enqueue, T " + std::to_string(sizes.tokens), in_place);

        fake::driver().failing = "cuLaunchKernel";
        expect(plugin->enqueue(descs, descs + kInputs, inputs, outputs, workspace.data(),
                               nullptr) != 0,
               "a launch that fails");
        expect_message("cuLaunchKernel failed: CUDA_ERROR_UNKNOWN");
        fake::driver().failing = "";
        descs[op::kPastState].dims.d[0] += 1;
        expect(plugin->onShapeChange(descs, kInputs, descs + kInputs, kOutputs) != 0, "rows");
        expect_message("B of 'past_state' is ");
      }
    }
  }
}

// Any fields, shapes and types, many of them wrong: an answer or a message, never a crash.
void test_anything() {
  std::mt19937 generator(17);
  const auto below = [&](uint32_t limit) { return generator() % limit; };
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
      expect(!logger.last.empty(), "refused without a message");
      logger.last.clear();
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
      expect(good || !logger.last.empty(), std::string(what) + " fails without a message");
      expect(good || !sane, std::string(what) + " refuses what is right: " + logger.last);
      logger.last.clear();
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
      if (run < 100) { // the double computes slowly
        answered(plugin->enqueue(descs, descs + kInputs, pointers, results, workspace.data(),
                                 nullptr) == 0,
                 "enqueue");
      }
      ++run;
    }
  }
  expect(made > 1000 && refused > 1000 && shaped > 1000 && run >= 100, "the inputs are one-sided");
}

} // namespace

int main() {
  fake::driver().images = gpu::fwl_gpu_images;
  created({{"unheard", nullptr, PluginFieldType::kINT32, 1}}); // without a logger: no crash
  trt::set_logger_finder(&logger);
  test_creator();
  test_copies();
  test_types();
  test_formats();
  test_shapes();
  test_enqueue();
  test_anything();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

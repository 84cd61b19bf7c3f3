#include "tensorrt/plugin.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "kernels/gpu/launcher/launcher.h"
#include "op_spec.h"

namespace fwl::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kFailed = -1;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void log_error(const char* what) noexcept {
  nvinfer1::ILoggerFinder* const finder = logger_finder.load();
  nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
  if (logger == nullptr) {
    return;
  }
  // On the stack, because the error may be that there is no memory.
  char message[512];
  std::snprintf(message, sizeof(message), "%s::%s: %s", op::kDomain, op::kName, what);
  logger->log(nvinfer1::ILogger::Severity::kERROR, message);
}

// Logs exceptions and returns `failed`: an exception that left the library would end the process.
template <class Value, class Function> Value guarded(Value failed, const Function& function) {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error("an unknown C++ exception was thrown");
  }
  return failed;
}

[[noreturn]] void fail(const std::string& what) {
  throw std::invalid_argument(what);
}

const char* name_of(DataType type) {
  switch (type) {
  case DataType::kFLOAT:
    return "float32";
  case DataType::kHALF:
    return "float16";
  case DataType::kBF16:
    return "bfloat16";
  case DataType::kINT32:
    return "int32";
  case DataType::kINT64:
    return "int64";
  default:
    return "an unsupported type";
  }
}

bool takes_half(const char* version) {
  return std::strcmp(version, op::kPluginVersion) == 0;
}

// Returns whether a version of the plugin takes queries, keys and values of a type.
bool is_activation(const char* version, DataType type) {
  const bool half = type == DataType::kHALF || type == DataType::kBF16;
  return type == DataType::kFLOAT || (half && takes_half(version));
}

gpu::Activation activation_of(DataType type) {
  switch (type) {
  case DataType::kHALF:
    return gpu::Activation::kFloat16;
  case DataType::kBF16:
    return gpu::Activation::kBFloat16;
  default:
    return gpu::Activation::kFloat32;
  }
}

void check_counts(int32_t inputs, int32_t outputs) {
  if (inputs != op::kInputCount || outputs != op::kOutputCount) {
    fail("there are " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
         " outputs; expected " + std::to_string(op::kInputCount) + " and " +
         std::to_string(op::kOutputCount));
  }
}

// Checks ranks, and that axes with the same symbol have the same size. `size(i, axis)` is -1 where
// a size is unknown.
template <class Rank, class Size> void check_shapes(const Rank& rank, const Size& size) {
  struct {
    const char* symbol;
    int64_t size;
  } known[op::kInputCount * 3];
  size_t count = 0;
  for (size_t i = 0; i < op::kInputCount; ++i) {
    const op::Argument& argument = op::kInputs[i];
    const std::string name = std::string("'") + argument.name + "'";
    if (rank(i) != static_cast<int32_t>(argument.rank)) {
      fail(name + " has " + std::to_string(rank(i)) + " axes; expected " +
           std::to_string(argument.rank));
    }
    for (size_t axis = 0; axis < argument.rank; ++axis) {
      const int64_t found = size(i, axis);
      if (found < 0) {
        continue;
      }
      const char* const symbol = argument.axes[axis];
      if (found == 0) {
        fail(std::string(symbol) + " of " + name + " is 0; expected 1 or more");
      }
      const auto* const end = known + count;
      const auto* const other = std::find_if(known, known + count, [&](const auto& each) {
        return std::strcmp(each.symbol, symbol) == 0;
      });
      if (other == end) {
        known[count++] = {symbol, found};
      } else if (other->size != found) {
        fail(std::string(symbol) + " of " + name + " is " + std::to_string(found) + "; expected " +
             std::to_string(other->size) + ", as in the inputs before it");
      }
    }
  }
}

void check_dims(const PluginTensorDesc* inputs) {
  check_shapes([&](size_t i) { return inputs[i].dims.nbDims; },
               [&](size_t i, size_t axis) { return inputs[i].dims.d[axis]; });
}

gpu::Sizes sizes_of(const Dims& query, const Dims& value, DataType type) {
  return {query.d[0], query.d[1], query.d[2], value.d[2], activation_of(type)};
}

bool read_in_place(const nvinfer1::PluginFieldCollection* fields) {
  const std::string name = std::string("attribute '") + kInPlaceField + "'";
  bool in_place = false;
  for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const auto is = [&](const char* other) {
      return field.name != nullptr && std::strcmp(field.name, other) == 0;
    };
    if (is(op::kPluginNamespaceAttribute) || is(op::kPluginVersionAttribute)) {
      continue; // TensorRT has used them to find this creator
    }
    if (!is(kInPlaceField)) {
      fail(std::string("attribute '") + (field.name != nullptr ? field.name : "") +
           "' is unknown; install the version that wrote the model, or export it again");
    }
    if (field.data == nullptr || field.length != 1 || field.type != PluginFieldType::kINT32) {
      fail(name + " must be one 32-bit integer");
    }
    const int32_t value = *static_cast<const int32_t*>(field.data);
    if (value != 0 && value != 1) {
      fail(name + " is " + std::to_string(value) + "; expected 0 or 1");
    }
    in_place = value == 1;
  }
  return in_place;
}

} // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) {
  logger_finder = finder;
}

Plugin::Plugin(const char* version, bool in_place_state)
    : version_(version), in_place_state_(in_place_state),
      field_(kInPlaceField, &in_place_state_, PluginFieldType::kINT32, 1), fields_{1, &field_} {}

nvinfer1::IPluginCapability*
Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
  case nvinfer1::PluginCapabilityType::kCORE:
    return static_cast<IPluginV3OneCore*>(this);
  case nvinfer1::PluginCapabilityType::kBUILD:
    return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
  case nvinfer1::PluginCapabilityType::kRUNTIME:
    return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

Plugin* Plugin::clone() noexcept {
  return guarded<Plugin*>(nullptr, [&] { return new Plugin(version_, in_place_state_ != 0); });
}

const char* Plugin::getPluginName() const noexcept {
  return op::kName;
}
const char* Plugin::getPluginVersion() const noexcept {
  return version_;
}
const char* Plugin::getPluginNamespace() const noexcept {
  return op::kPluginNamespace;
}

void Plugin::check_types(const DataType* inputs) const {
  for (size_t i = 0; i < op::kInputCount; ++i) {
    const bool activation = op::kInputs[i].activation;
    const bool fits = activation
                          ? is_activation(version_, inputs[i]) && inputs[i] == inputs[op::kQuery]
                          : inputs[i] == DataType::kFLOAT;
    if (fits) {
      continue;
    }
    const std::string found =
        std::string("'") + op::kInputs[i].name + "' is " + name_of(inputs[i]) + "; expected ";
    if (!activation) {
      fail(found + "float32");
    }
    if (i != op::kQuery) {
      fail(found + "the type of 'query', " + name_of(inputs[op::kQuery]));
    }
    fail(found + (takes_half(version_) ? "float32, float16 or bfloat16"
                                       : std::string("float32, which is all that version ") +
                                             version_ + " takes: in half precision its output " +
                                             "overflows, so export the model again"));
  }
}

int32_t Plugin::getNbOutputs() const noexcept {
  return op::kOutputCount;
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                   int32_t input_count) const noexcept {
  return guarded(kFailed, [&] {
    check_counts(input_count, output_count);
    check_types(inputs);
    for (size_t i = 0; i < op::kOutputCount; ++i) {
      outputs[i] = op::kOutputs[i].activation ? inputs[op::kQuery] : DataType::kFLOAT;
    }
    return 0;
  });
}

int32_t Plugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*,
                                int32_t, DimsExprs* outputs, int32_t output_count,
                                nvinfer1::IExprBuilder&) noexcept {
  return guarded(kFailed, [&] {
    check_counts(input_count, output_count);
    check_shapes([&](size_t i) { return inputs[i].nbDims; },
                 [&](size_t i, size_t axis) {
                   const IDimensionExpr& size = *inputs[i].d[axis];
                   return size.isConstant() ? size.getConstantValue() : -1;
                 });
    outputs[op::kOutput] = inputs[op::kValue];
    outputs[op::kPresentState] = inputs[op::kPastState];
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t input_count, int32_t output_count) noexcept {
  return guarded(false, [&] {
    check_counts(input_count, output_count);
    const PluginTensorDesc& tensor = tensors[position].desc;
    const size_t index = static_cast<size_t>(position);
    const op::Argument& argument =
        index < op::kInputCount ? op::kInputs[index] : op::kOutputs[index - op::kInputCount];
    // TensorRT asks for one position after the other, so the types before this one are settled.
    const bool type_fits = !argument.activation  ? tensor.type == DataType::kFLOAT
                           : index == op::kQuery ? is_activation(version_, tensor.type)
                                                 : tensor.type == tensors[op::kQuery].desc.type;
    return type_fits && tensor.format == nvinfer1::TensorFormat::kLINEAR;
  });
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const DynamicPluginTensorDesc*, int32_t output_count) noexcept {
  return guarded(kFailed, [&] {
    check_counts(input_count, output_count);
    check_shapes([&](size_t i) { return inputs[i].desc.dims.nbDims; },
                 [&](size_t i, size_t axis) { return inputs[i].desc.dims.d[axis]; });
    return 0;
  });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                                const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded(size_t{0}, [&] {
    return gpu::workspace_bound(
        sizes_of(inputs[op::kQuery].max, inputs[op::kValue].max, inputs[op::kQuery].desc.type));
  });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  return in_place_state_ != 0 && output == static_cast<int32_t>(op::kPresentState)
             ? static_cast<int32_t>(op::kPastState)
             : -1;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                              const PluginTensorDesc*, int32_t output_count) noexcept {
  return guarded(kFailed, [&] {
    check_counts(input_count, output_count);
    check_dims(inputs);
    DataType types[op::kInputCount];
    std::transform(inputs, inputs + op::kInputCount, types,
                   [](const PluginTensorDesc& input) { return input.type; });
    check_types(types);
    gpu::prepare(
        sizes_of(inputs[op::kQuery].dims, inputs[op::kValue].dims, inputs[op::kQuery].type));
    return 0;
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return guarded(kFailed, [&] {
    const gpu::Tensors tensors{
        inputs[op::kQuery],     inputs[op::kKey],     inputs[op::kValue],        inputs[op::kDecay],
        inputs[op::kPastState], outputs[op::kOutput], outputs[op::kPresentState]};
    gpu::launch(sizes_of(input_descs[op::kQuery].dims, input_descs[op::kValue].dims,
                         input_descs[op::kQuery].type),
                tensors, workspace, stream);
    return 0;
  });
}

Plugin* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return &fields_;
}

Creator::Creator(const char* version)
    : version_(version), field_(kInPlaceField, nullptr, PluginFieldType::kINT32, 1),
      fields_{1, &field_} {}

Plugin* Creator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                              nvinfer1::TensorRTPhase) noexcept {
  return guarded<Plugin*>(nullptr, [&] { return new Plugin(version_, read_in_place(fields)); });
}

const nvinfer1::PluginFieldCollection* Creator::getFieldNames() noexcept {
  return &fields_;
}
const char* Creator::getPluginName() const noexcept {
  return op::kName;
}
const char* Creator::getPluginVersion() const noexcept {
  return version_;
}
const char* Creator::getPluginNamespace() const noexcept {
  return op::kPluginNamespace;
}

} // namespace fwl::trt

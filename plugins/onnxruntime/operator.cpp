#include "onnxruntime/operator.h"

#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/cpu/linear_attention_update.h"
#include "op_spec.h"
#ifdef FWL_HAVE_GPU
#include "kernels/gpu/launcher/launcher.h"
#endif

namespace fwl::ort {
namespace {

// Returns from a function with the status of a call that failed.
#define FWL_RETURN_IF_ERROR(call)                                                                  \
  do {                                                                                             \
    if (OrtStatus* status_ = (call)) {                                                             \
      return status_;                                                                              \
    }                                                                                              \
  } while (false)

OrtStatus* invalid(const OrtApi& api, const std::string& what) {
  const std::string message = std::string(op::kDomain) + "::" + op::kName + ": " + what;
  return api.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

// Turns exceptions into a status: an exception that left the library would end the process.
template <class Function> OrtStatus* guarded(const OrtApi& api, const Function& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "fwl: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "fwl: an unknown C++ exception was thrown");
  }
}

// The sizes of a tensor. They need no heap, since a call of one token takes microseconds if the
// state is small.
struct Shape {
  static constexpr size_t kMaxRank = 8;

  const int64_t* begin() const { return sizes; }
  const int64_t* end() const { return sizes + rank; }

  int64_t sizes[kMaxRank] = {};
  size_t rank = 0;
};

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t axis = 0; axis < shape.rank; ++axis) {
    text += (axis ? ", " : "") + std::to_string(shape.sizes[axis]);
  }
  return text + "]";
}

struct Tensor {
  Shape shape;
  const void* data = nullptr;
  size_t bytes = 0;
};

// The sizes that the symbols of the op's spec stand for in one call.
class SymbolSizes {
public:
  // Returns whether a shape fits an argument, and stores the sizes of symbols that are new.
  bool fits(const op::Argument& argument, const Shape& shape) {
    if (shape.rank != argument.rank) {
      return false;
    }
    for (size_t axis = 0; axis < argument.rank; ++axis) {
      const int64_t* known = find(argument.axes[axis]);
      if (known != nullptr && *known != shape.sizes[axis]) {
        return false;
      }
    }
    for (size_t axis = 0; axis < argument.rank; ++axis) {
      if (find(argument.axes[axis]) == nullptr) {
        symbols_[count_++] = {argument.axes[axis], shape.sizes[axis]};
      }
    }
    return true;
  }

  // Returns the size of a symbol that is known.
  int64_t operator[](const char* symbol) const { return *find(symbol); }

  Shape shape_of(const op::Argument& argument) const {
    Shape shape;
    for (size_t axis = 0; axis < argument.rank; ++axis) {
      shape.sizes[shape.rank++] = *find(argument.axes[axis]);
    }
    return shape;
  }

  // Describes the shape that an argument must have: sizes, and symbols that are not known yet.
  std::string expected(const op::Argument& argument) const {
    std::string text = "[";
    for (size_t axis = 0; axis < argument.rank; ++axis) {
      const int64_t* known = find(argument.axes[axis]);
      text += axis ? ", " : "";
      text += known != nullptr ? std::to_string(*known) : argument.axes[axis];
    }
    return text + "]";
  }

private:
  const int64_t* find(const char* symbol) const {
    for (size_t i = 0; i < count_; ++i) {
      if (std::strcmp(symbols_[i].name, symbol) == 0) {
        return &symbols_[i].size;
      }
    }
    return nullptr;
  }

  struct Symbol {
    const char* name;
    int64_t size;
  };

  Symbol symbols_[op::kInputCount * 3]; // room for all axes of all inputs
  size_t count_ = 0;
};

struct Workspace {
  std::unique_ptr<char[]> memory; // not initialized: a run touches only what it uses
  size_t bytes = 0;
};

// The workspaces of a kernel, kept between runs. Runs of one session may overlap in time.
class Workspaces {
public:
  Workspace take(size_t bytes) {
    Workspace workspace;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        workspace = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (workspace.bytes < bytes) {
      workspace.memory.reset(); // first, as both may not fit at the same time
      workspace.memory.reset(new char[bytes]);
      workspace.bytes = bytes;
    }
    return workspace;
  }

  void give_back(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }

private:
  std::mutex mutex_;
  std::vector<Workspace> free_;
};

// What the kernels of all providers share: reading and checking tensors.
class Kernel {
public:
  Kernel(const OrtApi& api, size_t activation_bytes)
      : api_(api), activation_bytes_(activation_bytes) {}
  virtual ~Kernel() = default;

  const OrtApi& api() const { return api_; }

  OrtStatus* compute(OrtKernelContext* context) {
    Tensor inputs[op::kInputCount];
    SymbolSizes sizes;
    for (size_t i = 0; i < op::kInputCount; ++i) {
      FWL_RETURN_IF_ERROR(read_input(context, i, sizes, inputs[i]));
    }
    FWL_RETURN_IF_ERROR(check_sizes(sizes));

    Tensor outputs[op::kOutputCount];
    for (size_t i = 0; i < op::kOutputCount; ++i) {
      FWL_RETURN_IF_ERROR(make_output(context, i, sizes, outputs[i]));
    }
    FWL_RETURN_IF_ERROR(check_overlap(inputs, outputs));
    return run(context, sizes, inputs, outputs);
  }

protected:
  // Computes the outputs, whose memory is allocated.
  virtual OrtStatus* run(OrtKernelContext* context, const SymbolSizes& sizes, const Tensor* inputs,
                         const Tensor* outputs) = 0;

private:
  size_t element_size(const op::Argument& argument) const {
    return argument.activation ? activation_bytes_ : sizeof(float);
  }

  size_t bytes_of(const op::Argument& argument, const Shape& shape) const {
    size_t bytes = element_size(argument);
    for (const int64_t size : shape) {
      bytes *= static_cast<size_t>(size);
    }
    return bytes;
  }

  OrtStatus* read_input(const OrtKernelContext* context, size_t index, SymbolSizes& sizes,
                        Tensor& tensor) const {
    const op::Argument& argument = op::kInputs[index];
    const OrtValue* value = nullptr;
    FWL_RETURN_IF_ERROR(api_.KernelContext_GetInput(context, index, &value));
    if (value == nullptr) {
      return invalid(api_, std::string("'") + argument.name + "' is missing; it is required");
    }
    FWL_RETURN_IF_ERROR(read_shape(value, tensor.shape));
    if (!sizes.fits(argument, tensor.shape)) {
      return invalid(api_, std::string("'") + argument.name + "' has shape " +
                               text_of(tensor.shape) + "; expected " + sizes.expected(argument));
    }
    tensor.bytes = bytes_of(argument, tensor.shape);
    void* data = nullptr;
    FWL_RETURN_IF_ERROR(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return nullptr;
  }

  OrtStatus* read_shape(const OrtValue* value, Shape& shape) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    FWL_RETURN_IF_ERROR(api_.GetTensorTypeAndShape(value, &info));
    const auto release = [this](OrtTensorTypeAndShapeInfo* held) {
      api_.ReleaseTensorTypeAndShapeInfo(held);
    };
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owned(info, release);
    FWL_RETURN_IF_ERROR(api_.GetDimensionsCount(info, &shape.rank));
    if (shape.rank > Shape::kMaxRank) {
      const std::string rank = std::to_string(shape.rank);
      shape.rank = 0;
      return invalid(api_, "an input has " + rank + " axes; expected 3 or fewer");
    }
    return api_.GetDimensions(info, shape.sizes, shape.rank);
  }

  OrtStatus* check_sizes(const SymbolSizes& sizes) const {
    constexpr struct {
      const char* symbol;
      const char* meaning;
    } kNeeded[] = {{"B", "rows"}, {"T", "tokens"}, {"Dk", "key size"}, {"Dv", "value size"}};
    for (const auto& [symbol, meaning] : kNeeded) {
      if (sizes[symbol] < 1) {
        return invalid(api_, std::string(symbol) + " (" + meaning + ") is " +
                                 std::to_string(sizes[symbol]) + "; expected 1 or more");
      }
    }
    return nullptr;
  }

  OrtStatus* make_output(OrtKernelContext* context, size_t index, const SymbolSizes& sizes,
                         Tensor& tensor) const {
    const op::Argument& argument = op::kOutputs[index];
    tensor.shape = sizes.shape_of(argument);
    tensor.bytes = bytes_of(argument, tensor.shape);
    OrtValue* value = nullptr;
    FWL_RETURN_IF_ERROR(api_.KernelContext_GetOutput(context, index, tensor.shape.sizes,
                                                     tensor.shape.rank, &value));
    if (value == nullptr) {
      return invalid(api_, std::string("output '") + argument.name +
                               "' is missing; it is required, so give it a name");
    }
    void* data = nullptr;
    FWL_RETURN_IF_ERROR(api_.GetTensorMutableData(value, &data));
    tensor.data = data;
    return nullptr;
  }

  // The state may be updated in place. Any other overlap would silently give wrong results.
  OrtStatus* check_overlap(const Tensor* inputs, const Tensor* outputs) const {
    for (size_t out = 0; out < op::kOutputCount; ++out) {
      const char* begin = static_cast<const char*>(outputs[out].data);
      for (size_t in = 0; in < op::kInputCount; ++in) {
        const char* other = static_cast<const char*>(inputs[in].data);
        const bool in_place = in == op::kPastState && out == op::kPresentState && begin == other;
        if (!in_place && begin < other + inputs[in].bytes && other < begin + outputs[out].bytes) {
          return invalid(api_,
                         std::string("output '") + op::kOutputs[out].name +
                             "' overlaps with input '" + op::kInputs[in].name +
                             "'; only 'present_state' may overlap, and only if it is exactly the "
                             "memory of 'past_state'");
        }
      }
    }
    return nullptr;
  }

  const OrtApi& api_;
  const size_t activation_bytes_;
};

void* writable(const Tensor& output) {
  return const_cast<void*>(output.data);
}

class CpuKernel final : public Kernel {
public:
  CpuKernel(const OrtApi& api, ONNXTensorElementDataType type)
      : Kernel(api, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2),
        activation_(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? cpu::Activation::kFloat32
                                                                : cpu::Activation::kFloat16),
        instructions_(cpu::best_instruction_set()) {}

protected:
  OrtStatus* run(OrtKernelContext* context, const SymbolSizes& sizes, const Tensor* inputs,
                 const Tensor* outputs) override {
    const cpu::Sizes kernel_sizes{static_cast<size_t>(sizes["B"]), static_cast<size_t>(sizes["T"]),
                                  static_cast<size_t>(sizes["Dk"]),
                                  static_cast<size_t>(sizes["Dv"]), activation_};
    const cpu::Tensors tensors{inputs[op::kQuery].data,
                               inputs[op::kKey].data,
                               inputs[op::kValue].data,
                               static_cast<const float*>(inputs[op::kDecay].data),
                               static_cast<const float*>(inputs[op::kPastState].data),
                               static_cast<float*>(writable(outputs[op::kOutput])),
                               static_cast<float*>(writable(outputs[op::kPresentState]))};
    Threads threads{api(), context, nullptr};
    Workspace workspace = workspaces_.take(cpu::workspace_bytes(kernel_sizes, instructions_));
    cpu::linear_attention_update(kernel_sizes, tensors, instructions_, workspace.memory.get(),
                                 {Threads::run, &threads});
    workspaces_.give_back(std::move(workspace));
    return threads.status;
  }

private:
  // Runs the kernels' tasks on ONNX Runtime's threads.
  struct Threads {
    const OrtApi& api;
    const OrtKernelContext* context;
    OrtStatus* status; // that of the first call that failed, or null

    static void run(void* self, void (*task)(void*, size_t), size_t count, void* task_context) {
      Threads& threads = *static_cast<Threads*>(self);
      OrtStatus* status =
          threads.api.KernelContext_ParallelFor(threads.context, task, count, 0, task_context);
      if (status == nullptr) {
        return;
      }
      if (threads.status == nullptr) {
        threads.status = status;
      } else {
        threads.api.ReleaseStatus(status);
      }
    }
  };

  const cpu::Activation activation_;
  const cpu::InstructionSet instructions_;
  Workspaces workspaces_;
};

#ifdef FWL_HAVE_GPU
class GpuKernel final : public Kernel {
public:
  GpuKernel(const OrtApi& api, ONNXTensorElementDataType type)
      : Kernel(api, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2),
        activation_(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? gpu::Activation::kFloat32
                    : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? gpu::Activation::kFloat16
                                                                    : gpu::Activation::kBFloat16) {}

protected:
  OrtStatus* run(OrtKernelContext* context, const SymbolSizes& sizes, const Tensor* inputs,
                 const Tensor* outputs) override {
    void* stream = nullptr;
    FWL_RETURN_IF_ERROR(api().KernelContext_GetGPUComputeStream(context, &stream));
    gpu::launch({sizes["B"], sizes["T"], sizes["Dk"], sizes["Dv"], activation_},
                {inputs[op::kQuery].data, inputs[op::kKey].data, inputs[op::kValue].data,
                 inputs[op::kDecay].data, inputs[op::kPastState].data,
                 writable(outputs[op::kOutput]), writable(outputs[op::kPresentState])},
                stream);
    return nullptr;
  }

private:
  const gpu::Activation activation_;
};
#endif

// Returns text of unknown origin in a form that a message can hold, since callers expect UTF-8.
std::string printable(const std::string& text) {
  constexpr size_t kLongest = 40;
  std::string safe = text.substr(0, kLongest);
  for (char& character : safe) {
    const bool plain = character >= ' ' && character <= '~';
    character = plain ? character : '?';
  }
  return text.size() > kLongest ? safe + "..." : safe;
}

// Returns whether an attribute exists and is a number.
bool is_number(const OrtApi& api, const OrtKernelInfo* info, const char* name) {
  int64_t whole = 0;
  float real = 0;
  OrtStatus* const as_whole = api.KernelInfoGetAttribute_int64(info, name, &whole);
  OrtStatus* const as_real = api.KernelInfoGetAttribute_float(info, name, &real);
  for (OrtStatus* const status : {as_whole, as_real}) {
    if (status != nullptr) {
      api.ReleaseStatus(status);
    }
  }
  return as_whole == nullptr || as_real == nullptr;
}

// Checks an attribute that the node may have. TensorRT uses these attributes to find its plugin.
// `also` is another value that is allowed, or null.
OrtStatus* check_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name,
                           const char* expected, const char* also = nullptr) {
  const std::string prefix = std::string("attribute '") + name + "' is ";
  size_t size = 0;
  if (OrtStatus* status = api.KernelInfoGetAttribute_string(info, name, nullptr, &size)) {
    api.ReleaseStatus(status);
    if (is_number(api, info, name)) {
      return invalid(api, prefix + "a number; expected the string '" + expected + "'");
    }
    return nullptr; // it is absent, which is fine
  }
  std::string value(size, '\0');
  FWL_RETURN_IF_ERROR(api.KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size > 0 ? size - 1 : 0); // without the final zero
  if (value != expected && (also == nullptr || value != also)) {
    return invalid(api, prefix + "'" + printable(value) + "'; this library has '" + expected +
                            "'. Install the version that wrote the model, or export it again");
  }
  return nullptr;
}

// The op for one provider and one type of query, key and value.
struct CustomOp : OrtCustomOp {
  CustomOp(const OrtApi& its_api, const char* its_provider,
           ONNXTensorElementDataType activation_type,
           Kernel* (*maker)(const OrtApi&, ONNXTensorElementDataType))
      : OrtCustomOp{}, api(its_api), provider(its_provider), type(activation_type),
        make_kernel(maker) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return op::kName; };
    GetExecutionProviderType = [](const OrtCustomOp* self) {
      return static_cast<const CustomOp*>(self)->provider;
    };
    GetInputTypeCount = [](const OrtCustomOp*) { return static_cast<size_t>(op::kInputCount); };
    GetInputType = [](const OrtCustomOp* self, size_t index) {
      return type_of(self, op::kInputs[index]);
    };
    GetOutputTypeCount = [](const OrtCustomOp*) { return static_cast<size_t>(op::kOutputCount); };
    GetOutputType = [](const OrtCustomOp* self, size_t index) {
      return type_of(self, op::kOutputs[index]);
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return op::kFloat32Version; };
    GetEndVersion = [](const OrtCustomOp*) { return op::kVersion; };
    InferOutputShapeFn = infer_shapes;
    CreateKernelV2 = create_kernel;
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
      Kernel& ours = *static_cast<Kernel*>(kernel);
      return guarded(ours.api(), [&] { return ours.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static ONNXTensorElementDataType type_of(const OrtCustomOp* self, const op::Argument& argument) {
    return argument.activation ? static_cast<const CustomOp*>(self)->type
                               : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  // The output has the shape of `value`, the new state that of the old one.
  static OrtStatusPtr infer_shapes(const OrtCustomOp* self, OrtShapeInferContext* context) {
    const OrtApi& api = static_cast<const CustomOp*>(self)->api;
    constexpr size_t kSource[] = {op::kValue, op::kPastState};
    for (size_t i = 0; i < op::kOutputCount; ++i) {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      if (OrtStatus* unknown =
              api.ShapeInferContext_GetInputTypeShape(context, kSource[i], &info)) {
        api.ReleaseStatus(unknown); // the output's shape then stays unknown too
        continue;
      }
      FWL_RETURN_IF_ERROR(api.ShapeInferContext_SetOutputTypeShape(context, i, info));
    }
    return nullptr;
  }

  static OrtStatusPtr create_kernel(const OrtCustomOp* self, const OrtApi* session_api,
                                    const OrtKernelInfo* info, void** kernel) {
    return guarded(*session_api, [&]() -> OrtStatus* {
      *kernel = nullptr;
      FWL_RETURN_IF_ERROR(
          check_attribute(*session_api, info, op::kPluginNamespaceAttribute, op::kPluginNamespace));
      const CustomOp& ours = *static_cast<const CustomOp*>(self);
      const bool is_float32 = ours.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      FWL_RETURN_IF_ERROR(check_attribute(*session_api, info, op::kPluginVersionAttribute,
                                          op::kPluginVersion,
                                          is_float32 ? op::kFloat32PluginVersion : nullptr));
      *kernel = ours.make_kernel(*session_api, ours.type);
      return nullptr;
    });
  }

  const OrtApi& api;
  const char* provider;
  ONNXTensorElementDataType type;
  Kernel* (*make_kernel)(const OrtApi&, ONNXTensorElementDataType);
};

template <class Made> Kernel* made(const OrtApi& api, ONNXTensorElementDataType type) {
  return new Made(api, type);
}

} // namespace

const std::vector<const OrtCustomOp*>& custom_ops(const OrtApi& api) {
  static const CustomOp all[] = {
      {api, "CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, made<CpuKernel>},
      {api, "CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, made<CpuKernel>},
#ifdef FWL_HAVE_GPU
      {api, "CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, made<GpuKernel>},
      {api, "CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, made<GpuKernel>},
      {api, "CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, made<GpuKernel>},
#endif
  };
  static const std::vector<const OrtCustomOp*> pointers = [] {
    std::vector<const OrtCustomOp*> found;
    for (const CustomOp& each : all) {
      found.push_back(&each);
    }
    return found;
  }();
  return pointers;
}

} // namespace fwl::ort

// The custom op for ONNX Runtime's CUDA provider, on fakes of ONNX Runtime's interface and of the
// CUDA driver, because a CUDA build of ONNX Runtime does not load without a GPU.

#include <algorithm>
#include <cstring>
#include <string>

#include "gpu_problem.h"
#include "onnxruntime/operator.h"
#include "op_spec.h"

// ONNX Runtime's opaque types, as the fake implements them.
struct OrtStatus {
  std::string message;
};
struct OrtTensorTypeAndShapeInfo {
  std::vector<int64_t> sizes;
};
struct OrtValue {
  OrtTensorTypeAndShapeInfo shape;
  void* data;
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs;
  std::vector<void*> outputs; // memory of the outputs
  std::vector<OrtValue> made;
  void* stream;
};
struct OrtKernelInfo {};
struct OrtShapeInferContext {
  std::vector<OrtTensorTypeAndShapeInfo> inputs;
  std::vector<std::vector<int64_t>> outputs;
};

namespace {

using namespace fwl;
using namespace fwl::test;

void add_status(OrtApi& api) {
  api.CreateStatus = [](OrtErrorCode, const char* text) noexcept { return new OrtStatus{text}; };
  api.ReleaseStatus = [](OrtStatus* status) noexcept { delete status; };
}

void add_kernel_context(OrtApi& api) {
  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index,
                                  const OrtValue** value) noexcept -> OrtStatus* {
    *value = &context->inputs[index];
    return nullptr;
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t index, const int64_t* sizes,
                                   size_t rank, OrtValue** value) noexcept -> OrtStatus* {
    context->made[index] = {{{sizes, sizes + rank}}, context->outputs[index]};
    *value = &context->made[index];
    return nullptr;
  };
  api.KernelContext_GetGPUComputeStream = [](const OrtKernelContext* context,
                                             void** stream) noexcept -> OrtStatus* {
    *stream = context->stream;
    return nullptr;
  };
}

void add_tensors(OrtApi& api) {
  api.GetTensorTypeAndShape = [](const OrtValue* value,
                                 OrtTensorTypeAndShapeInfo** info) noexcept -> OrtStatus* {
    *info = new OrtTensorTypeAndShapeInfo(value->shape);
    return nullptr;
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) noexcept { delete info; };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info,
                              size_t* count) noexcept -> OrtStatus* {
    *count = info->sizes.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* sizes,
                         size_t count) noexcept -> OrtStatus* {
    std::copy_n(info->sizes.begin(), count, sizes);
    return nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** data) noexcept -> OrtStatus* {
    *data = value->data;
    return nullptr;
  };
}

// Describes a node without attributes.
void add_attributes(OrtApi& api) {
  api.KernelInfoGetAttribute_string = [](const OrtKernelInfo*, const char*, char*,
                                         size_t*) noexcept { return new OrtStatus{"absent"}; };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo*, const char*, int64_t*) noexcept {
    return new OrtStatus{"absent"};
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo*, const char*, float*) noexcept {
    return new OrtStatus{"absent"};
  };
}

void add_shape_inference(OrtApi& api) {
  api.ShapeInferContext_GetInputTypeShape =
      [](const OrtShapeInferContext* context, size_t index,
         OrtTensorTypeAndShapeInfo** info) noexcept -> OrtStatus* {
    if (context->inputs[index].sizes.empty()) {
      return new OrtStatus{"no shape"};
    }
    *info = const_cast<OrtTensorTypeAndShapeInfo*>(&context->inputs[index]);
    return nullptr;
  };
  api.ShapeInferContext_SetOutputTypeShape =
      [](const OrtShapeInferContext* context, size_t index,
         const OrtTensorTypeAndShapeInfo* info) noexcept -> OrtStatus* {
    const_cast<OrtShapeInferContext*>(context)->outputs[index] = info->sizes;
    return nullptr;
  };
}

OrtApi make_api() {
  OrtApi made{};
  add_status(made);
  add_kernel_context(made);
  add_tensors(made);
  add_attributes(made);
  add_shape_inference(made);
  return made;
}

const OrtApi api = make_api();

std::string message_of(OrtStatus* status) {
  const std::string message = status != nullptr ? status->message : "";
  delete status;
  return message;
}

struct CudaOp {
  const OrtCustomOp* op;
  gpu::Activation activation;
};

std::vector<CudaOp> cuda_ops() {
  std::vector<CudaOp> found;
  for (const OrtCustomOp* each : ort::custom_ops(api)) {
    if (std::strcmp(each->GetExecutionProviderType(each), "CUDAExecutionProvider") != 0) {
      continue;
    }
    const ONNXTensorElementDataType type = each->GetInputType(each, op::kQuery);
    CHECK(each->GetInputType(each, op::kPastState) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    CHECK(each->GetOutputType(each, op::kOutput) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    found.push_back({each, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? gpu::Activation::kFloat32
                           : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                               ? gpu::Activation::kFloat16
                               : gpu::Activation::kBFloat16});
  }
  REQUIRE(found.size() == 3);
  return found;
}

OrtKernelContext context_of(const gpu::Sizes& s, const gpu::Tensors& t, void* stream) {
  const auto tensor = [](std::vector<int64_t> sizes, const void* data) {
    return OrtValue{{std::move(sizes)}, const_cast<void*>(data)};
  };
  return {{tensor({s.rows, s.tokens, s.size_k}, t.query),
           tensor({s.rows, s.tokens, s.size_k}, t.key),
           tensor({s.rows, s.tokens, s.size_v}, t.value), tensor({s.rows, s.tokens}, t.decay),
           tensor({s.rows, s.size_k, s.size_v}, t.past)},
          {t.output, t.present},
          std::vector<OrtValue>(2),
          stream};
}

TEST_CASE_METHOD(FakeDriver, "the op runs on ONNX Runtime's stream") {
  for (const auto& [custom_op, activation] : cuda_ops()) {
    void* kernel = nullptr;
    const OrtKernelInfo info;
    CHECK(message_of(custom_op->CreateKernelV2(custom_op, &api, &info, &kernel)) == "");
    REQUIRE(kernel != nullptr);
    for (const int64_t tokens : {1, 40}) {
      for (const bool in_place : {false, true}) {
        CAPTURE(activation, tokens, in_place);
        const gpu::Sizes sizes{2, tokens, 35, 64, activation};
        Problem problem(sizes, 9);
        problem.keep_reference();
        int stream = 0;
        OrtKernelContext context = context_of(sizes, problem.tensors(in_place), &stream);
        const auto compute = [&, op = custom_op] {
          return message_of(op->KernelComputeV2(kernel, &context));
        };
        driver.launched.clear();
        CHECK(compute() == "");
        problem.check(in_place);
        REQUIRE_FALSE(driver.launched.empty());
        CHECK(driver.launched[0].stream == &stream);
        CHECK(driver.allocated.empty()); // the workspace is freed

        driver.failing = "cuLaunchKernel";
        CHECK(compute() == "cuLaunchKernel failed: CUDA_ERROR_UNKNOWN");
        driver.failing = "";
        context.inputs[op::kKey].shape.sizes[1] += 1;
        CHECK_THAT(compute(), Catch::Contains("'key' has shape"));
      }
    }
    custom_op->KernelDestroy(kernel);
  }
}

TEST_CASE("shapes of outputs are inferred if those of the inputs are known") {
  const OrtCustomOp* const custom_op = cuda_ops()[0].op;
  OrtShapeInferContext context{{{{2, 3, 4}}, {{2, 3, 4}}, {{2, 3, 5}}, {{2, 3}}, {{2, 4, 5}}},
                               {{}, {}}};
  CHECK(message_of(custom_op->InferOutputShapeFn(custom_op, &context)) == "");
  CHECK(context.outputs[op::kOutput] == std::vector<int64_t>{2, 3, 5});
  CHECK(context.outputs[op::kPresentState] == std::vector<int64_t>{2, 4, 5});
  context.inputs[op::kValue].sizes.clear();
  context.outputs.assign(2, {});
  CHECK(message_of(custom_op->InferOutputShapeFn(custom_op, &context)) == "");
  CHECK(context.outputs[op::kOutput].empty());
  CHECK_FALSE(context.outputs[op::kPresentState].empty());
}

} // namespace

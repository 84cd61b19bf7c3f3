// The op as a custom op of ONNX Runtime's CPU provider.
#pragma once

#include <onnxruntime_c_api.h>

namespace fwl::ort {

// The first version whose kernels can use ONNX Runtime's own threads. Later runtimes answer to it.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "headers of ONNX Runtime 1.17 or newer are needed");

// The op for query, key and value of `activation`: float or float16. Lives as long as the process.
const OrtCustomOp* custom_op(ONNXTensorElementDataType activation);

} // namespace fwl::ort

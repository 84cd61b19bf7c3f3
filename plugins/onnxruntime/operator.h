// The op as a custom op of ONNX Runtime's CPU and CUDA providers.
#pragma once

#include <onnxruntime_c_api.h>

#include <vector>

namespace fwl::ort {

// The first version whose kernels can use ONNX Runtime's own threads. Later runtimes answer to it.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "headers of ONNX Runtime 1.17 or newer are needed");

// The op once for each provider and type of query, key and value. They live as long as the
// process, like the interface they are made with.
const std::vector<const OrtCustomOp*>& custom_ops(const OrtApi& api);

} // namespace fwl::ort

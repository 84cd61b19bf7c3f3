// The op as a custom op of ONNX Runtime's CPU and CUDA providers.
#pragma once

#include <onnxruntime_c_api.h>

#include <vector>

namespace fwl::ort {

// The first version of the interface with access to ONNX Runtime's threads. Later releases of ONNX
// Runtime support it too.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion,
              "the headers of ONNX Runtime 1.17 or newer are needed");

// Returns the op, once for each provider and type of query, key and value. The objects live as long
// as the process, like the interface that they are created with.
const std::vector<const OrtCustomOp*>& custom_ops(const OrtApi& api);

} // namespace fwl::ort

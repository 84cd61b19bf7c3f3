// Compiled instead of tensorrt.cpp where TensorRT's headers are missing.

#include "error.h"
#include "runtime.h"

namespace fwl::internal {

std::shared_ptr<const Runtime> open_tensorrt(const Bundle&, const TensorRtOptions&) {
  throw Absent(FWL_ERROR_RUNTIME, "this libfwl was built without TensorRT, because TensorRT's "
                                  "headers were missing; build it with -DFWL_TENSORRT_SDK=...");
}

} // namespace fwl::internal

// In place of tensorrt.cpp, where its headers were not to be had.

#include "backend.h"
#include "error.h"

namespace fwl::internal {

std::shared_ptr<const Backend> open_tensorrt(const Bundle&, const TensorRtOptions&) {
  throw Absent(FWL_ERROR_RUNTIME, "this libfwl was built without TensorRT, whose headers were "
                                  "missing; build it with -DFWL_TENSORRT_SDK=...");
}

} // namespace fwl::internal

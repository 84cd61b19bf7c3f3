// Entry points of libfwl_trt, which TensorRT calls when it loads the library into its registry.

#include "tensorrt/plugin.h"

#define FWL_EXPORT extern "C" __attribute__((visibility("default")))

FWL_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  fwl::trt::set_logger_finder(finder);
}

FWL_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static fwl::trt::Creator current(fwl::trt::kVersions[0]);
  static fwl::trt::Creator older(fwl::trt::kVersions[1]);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&current, &older};
  count = 2;
  return creators;
}

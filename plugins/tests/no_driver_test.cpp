// A program that links the launcher starts on a machine without a driver, and its first call
// reports that the driver is missing.

#include <dlfcn.h>

#include <catch2/catch.hpp>

#include "kernels/gpu/launcher/launcher.h"

TEST_CASE("without a driver the first call says that there is none") {
  if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) {
    WARN("skipped: this machine has a driver");
    return;
  }
  const auto prepare = [] { fwl::gpu::prepare({1, 1, 1, 1, fwl::gpu::Activation::kFloat32}); };
  CHECK_THROWS_AS(prepare(), fwl::gpu::DriverError);
  CHECK_THROWS_WITH(prepare(), Catch::Contains("there is no CUDA driver"));
}

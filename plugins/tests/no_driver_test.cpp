// What links the launcher loads on a machine without a driver, and the first call says so.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/gpu/launcher/launcher.h"

int main() {
  if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) {
    std::puts("skipped: this machine has a driver");
    return EXIT_SUCCESS;
  }
  try {
    fwl::gpu::prepare({1, 1, 1, 1, fwl::gpu::Activation::kFloat32});
  } catch (const fwl::gpu::DriverError& error) {
    return std::strstr(error.what(), "there is no CUDA driver") ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  return EXIT_FAILURE;
}

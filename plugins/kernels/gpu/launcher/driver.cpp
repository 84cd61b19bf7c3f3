#include "kernels/gpu/launcher/driver.h"

#include <dlfcn.h>

#include <string>

namespace fwl::gpu {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

// From cuda.h: CUdevice_attribute.
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

template <class Function> void load(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw DriverError(std::string("the CUDA driver has no ") + name +
                      "; install a driver of CUDA 12.0 or newer");
  }
}

Driver open() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = dlerror();
    throw DriverError(std::string("there is no CUDA driver on this machine (") +
                      (reason != nullptr ? reason : kLibrary) + "); install NVIDIA's driver");
  }
  Driver driver{};
#define FWL_LOAD(name) load(library, #name, driver.name)
  FWL_LOAD(cuGetErrorName);
  FWL_LOAD(cuCtxGetDevice);
  FWL_LOAD(cuDeviceGetAttribute);
  FWL_LOAD(cuLibraryLoadData);
  FWL_LOAD(cuLibraryUnload);
  FWL_LOAD(cuLibraryGetKernel);
  FWL_LOAD(cuKernelGetFunction);
  FWL_LOAD(cuKernelSetAttribute);
  FWL_LOAD(cuLaunchKernel);
  FWL_LOAD(cuMemAllocAsync);
  FWL_LOAD(cuMemFreeAsync);
#undef FWL_LOAD
  return driver;
}

} // namespace

void Driver::check(Result result, const char* call) const {
  if (result == 0) {
    return;
  }
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  throw DriverError(std::string(call) +
                    " failed: " + (name != nullptr ? name : "error " + std::to_string(result)));
}

const Driver& driver() {
  static const Driver opened = open(); // after an exception, the next call tries again
  return opened;
}

Device current_device(const Driver& driver) {
  Device device = 0;
  driver.check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
  return device;
}

int compute_capability(const Driver& driver, Device device) {
  int major = 0;
  int minor = 0;
  driver.check(driver.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device),
               "cuDeviceGetAttribute");
  driver.check(driver.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device),
               "cuDeviceGetAttribute");
  return 10 * major + minor;
}

} // namespace fwl::gpu

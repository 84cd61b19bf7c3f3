// The functions of the CUDA driver that launches need. The driver's library is opened at the first
// use, so that libraries that link this code load on machines without a driver.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace fwl::gpu {

// Types of cuda.h, whose binary interface is stable.
using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using Library = void*;
using DriverKernel = void*;
using Stream = void*;

// The driver is missing or too old, or one of its functions failed.
struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Driver {
  Result (*cuGetErrorName)(Result, const char**);
  Result (*cuCtxGetDevice)(Device*);
  Result (*cuDeviceGetAttribute)(int*, int attribute, Device);
  Result (*cuLibraryLoadData)(Library*, const void* code, const int* jit_options, void** jit_values,
                              unsigned jit_count, const int* options, void** values,
                              unsigned count);
  Result (*cuLibraryUnload)(Library);
  Result (*cuLibraryGetKernel)(DriverKernel*, Library, const char* name);
  Result (*cuKernelGetFunction)(void** function, DriverKernel);
  Result (*cuKernelSetAttribute)(int attribute, int value, DriverKernel, Device);
  Result (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                           unsigned block_x, unsigned block_y, unsigned block_z,
                           unsigned shared_bytes, Stream, void** parameters, void** extra);
  Result (*cuMemAllocAsync)(DevicePointer*, size_t bytes, Stream);
  Result (*cuMemFreeAsync)(DevicePointer, Stream);

  // Throws DriverError if `result` is an error, with the names of the function and of the error.
  void check(Result result, const char* call) const;
};

// Returns the driver of this machine, or throws DriverError; the next call then tries again.
const Driver& driver();

// Returns the GPU of the calling thread's context. Throws DriverError.
Device current_device(const Driver& driver);

// Returns the compute capability of a GPU without the dot, such as 89. Throws DriverError.
int compute_capability(const Driver& driver, Device device);

} // namespace fwl::gpu

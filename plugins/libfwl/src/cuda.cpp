#include "cuda.h"

#include <dlfcn.h>

#include <utility>

#include "error.h"

namespace fwl::internal {

// Functions that cuda.h declares, under their names in the library. The binary interface is stable,
// and all of them exist since CUDA 4.0.
struct CudaDriver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorName)(int, const char**);
  int (*cuDeviceGetCount)(int*);
  int (*cuDeviceGet)(int*, int ordinal);
  int (*cuDeviceGetName)(char*, int, int device);
  int (*cuDeviceGetAttribute)(int*, int attribute, int device);
  int (*cuDevicePrimaryCtxRetain)(void**, int device);
  int (*cuDevicePrimaryCtxRelease_v2)(int device);
  int (*cuCtxPushCurrent_v2)(void*);
  int (*cuCtxPopCurrent_v2)(void**);
  int (*cuMemAlloc_v2)(DevicePointer*, size_t);
  int (*cuMemFree_v2)(DevicePointer);
  int (*cuMemsetD8Async)(DevicePointer, unsigned char, size_t, void* stream);
  int (*cuMemcpyHtoDAsync_v2)(DevicePointer, const void*, size_t, void* stream);
  int (*cuMemcpyDtoHAsync_v2)(void*, DevicePointer, size_t, void* stream);
  int (*cuMemcpyDtoDAsync_v2)(DevicePointer, DevicePointer, size_t, void* stream);
  int (*cuStreamCreate)(void**, unsigned flags);
  int (*cuStreamDestroy_v2)(void*);
  int (*cuStreamSynchronize)(void*);

  void check(int result, const char* call) const {
    if (result == 0) {
      return;
    }
    const char* name = nullptr;
    cuGetErrorName(result, &name);
    const std::string reason = name != nullptr ? name : "error " + std::to_string(result);
    throw Failure(result == kOutOfMemory ? FWL_ERROR_MEMORY : FWL_ERROR_RUNTIME,
                  std::string("CUDA: ") + call + " failed: " + reason);
  }

private:
  static constexpr int kOutOfMemory = 2; // CUDA_ERROR_OUT_OF_MEMORY
};

namespace {

constexpr char kLibrary[] = "libcuda.so.1";
constexpr int kComputeCapabilityMajor = 75; // CUdevice_attribute
constexpr int kComputeCapabilityMinor = 76;
// CU_STREAM_NON_BLOCKING, so that sessions do not wait for each other.
constexpr unsigned kNonBlocking = 1;

[[noreturn]] void no_device(const std::string& reason) {
  throw Absent(FWL_ERROR_RUNTIME, "there is no CUDA device (" + reason +
                                      "); the runtime tensorrt needs an NVIDIA GPU and its driver");
}

std::unique_ptr<CudaDriver> open_driver() {
  void* const library =
      dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL); // never closed: the driver's threads may outlive us
  if (library == nullptr) {
    const char* const reason = dlerror();
    no_device(reason != nullptr ? reason : kLibrary);
  }
  auto driver = std::make_unique<CudaDriver>();
  const auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) {
      throw Failure(FWL_ERROR_RUNTIME, std::string("the CUDA driver has no ") + name +
                                           "; install a driver of CUDA 12.0 or newer");
    }
  };
#define FWL_LOAD(name) load(driver->name, #name)
  FWL_LOAD(cuInit);
  FWL_LOAD(cuGetErrorName);
  FWL_LOAD(cuDeviceGetCount);
  FWL_LOAD(cuDeviceGet);
  FWL_LOAD(cuDeviceGetName);
  FWL_LOAD(cuDeviceGetAttribute);
  FWL_LOAD(cuDevicePrimaryCtxRetain);
  FWL_LOAD(cuDevicePrimaryCtxRelease_v2);
  FWL_LOAD(cuCtxPushCurrent_v2);
  FWL_LOAD(cuCtxPopCurrent_v2);
  FWL_LOAD(cuMemAlloc_v2);
  FWL_LOAD(cuMemFree_v2);
  FWL_LOAD(cuMemsetD8Async);
  FWL_LOAD(cuMemcpyHtoDAsync_v2);
  FWL_LOAD(cuMemcpyDtoHAsync_v2);
  FWL_LOAD(cuMemcpyDtoDAsync_v2);
  FWL_LOAD(cuStreamCreate);
  FWL_LOAD(cuStreamDestroy_v2);
  FWL_LOAD(cuStreamSynchronize);
#undef FWL_LOAD
  return driver;
}

} // namespace

Gpu::Gpu(int ordinal) : driver_(open_driver()) {
  const CudaDriver& cuda = *driver_;
  int count = 0;
  if (cuda.cuInit(0) != 0 || cuda.cuDeviceGetCount(&count) != 0 || count == 0) {
    no_device("the driver finds no GPU");
  }
  if (ordinal < 0 || ordinal >= count) {
    throw Failure(FWL_ERROR_ARGUMENT, "device is " + std::to_string(ordinal) + "; expected 0 to " +
                                          std::to_string(count - 1));
  }
  char name[256] = "";
  int major = 0, minor = 0;
  cuda.check(cuda.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  cuda.check(cuda.cuDeviceGetName(name, sizeof(name) - 1, device_), "cuDeviceGetName");
  cuda.check(cuda.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device_),
             "cuDeviceGetAttribute");
  cuda.check(cuda.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device_),
             "cuDeviceGetAttribute");
  name_ = name;
  sm_ = 10 * major + minor;
  cuda.check(cuda.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Gpu::~Gpu() {
  driver_->cuDevicePrimaryCtxRelease_v2(device_);
}

Gpu::Use::Use(const Gpu& gpu) : gpu_(gpu) {
  gpu.driver_->check(gpu.driver_->cuCtxPushCurrent_v2(gpu.context_), "cuCtxPushCurrent");
}

Gpu::Use::~Use() {
  void* mine = nullptr;
  gpu_.driver_->cuCtxPopCurrent_v2(&mine);
}

Stream::Stream(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuStreamCreate(&handle_, kNonBlocking), "cuStreamCreate");
}

Stream::~Stream() {
  try {
    const Gpu::Use use(*gpu_);
    gpu_->driver().cuStreamDestroy_v2(handle_);
  } catch (const Failure&) { // the device is lost, and the stream with it
  }
}

void Stream::zero(DevicePointer to, size_t bytes) const {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuMemsetD8Async(to, 0, bytes, handle_), "cuMemsetD8Async");
}

void Stream::upload(DevicePointer to, const void* from, size_t bytes) const {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuMemcpyHtoDAsync_v2(to, from, bytes, handle_),
                       "cuMemcpyHtoDAsync");
}

void Stream::download(void* to, DevicePointer from, size_t bytes) const {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuMemcpyDtoHAsync_v2(to, from, bytes, handle_),
                       "cuMemcpyDtoHAsync");
}

void Stream::copy(DevicePointer to, DevicePointer from, size_t bytes) const {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuMemcpyDtoDAsync_v2(to, from, bytes, handle_),
                       "cuMemcpyDtoDAsync");
}

void Stream::wait() const {
  const Gpu::Use use(*gpu_);
  gpu_->driver().check(gpu_->driver().cuStreamSynchronize(handle_), "cuStreamSynchronize");
}

Stream::Settled::~Settled() {
  try {
    stream.wait();
  } catch (const Failure&) { // a caller that needs the result waits again and gets the error
  }
}

DeviceMemory::DeviceMemory(std::shared_ptr<const Stream> stream, size_t bytes) : bytes_(bytes) {
  const Gpu::Use use(stream->gpu());
  const CudaDriver& cuda = stream->gpu().driver();
  cuda.check(cuda.cuMemAlloc_v2(&start_, bytes), "cuMemAlloc");
  stream_ = std::move(stream);
}

DeviceMemory::~DeviceMemory() {
  if (stream_ != nullptr) {
    try {
      const Gpu::Use use(stream_->gpu());
      stream_->gpu().driver().cuMemFree_v2(start_);
    } catch (const Failure&) { // the device is lost, and its memory with it
    }
  }
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(start_, other.start_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

} // namespace fwl::internal

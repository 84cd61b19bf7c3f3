#include "cuda_fake.h"

#include <cstring>
#include <mutex>

namespace {

using fwl::fake::Cuda;
using Pointer = unsigned long long;

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidContext = 201;
constexpr int kInvalidHandle = 400, kIllegalAddress = 700;

std::recursive_mutex one_at_a_time;
using Turn = std::lock_guard<std::recursive_mutex>;

thread_local int pushed = 0;
int context; // its address is the primary context

Cuda& cuda() {
  return *fwl_fake_cuda();
}

bool fails() {
  return cuda().calls_left >= 0 && cuda().calls_left-- == 0;
}

bool owns(const void* start, size_t bytes) {
  const Turn turn(one_at_a_time);
  const auto at = reinterpret_cast<Pointer>(start);
  auto block = cuda().allocated.upper_bound(at);
  if (block == cuda().allocated.begin()) {
    return false;
  }
  --block;
  return at + bytes <= block->first + block->second.size();
}

void post(void* stream, std::function<void()> work) {
  const Turn turn(one_at_a_time);
  cuda().streams.at(stream).push_back(std::move(work));
}

void* host(Pointer pointer) {
  return reinterpret_cast<void*>(pointer);
}

// Checks a call on a stream, which accesses `blocks` of GPU memory, and queues its work.
int enqueue(void* stream, std::vector<std::pair<Pointer, size_t>> blocks,
            std::function<void()> work) {
  const Turn turn(one_at_a_time);
  if (pushed == 0) {
    return kInvalidContext;
  }
  if (cuda().streams.count(stream) == 0) {
    return kInvalidHandle;
  }
  for (const auto& block : blocks) {
    if (!owns(host(block.first), block.second)) {
      return kInvalidValue;
    }
  }
  if (fails()) {
    return kIllegalAddress;
  }
  post(stream, std::move(work));
  return 0;
}

} // namespace

extern "C" {

Cuda* fwl_fake_cuda() {
  static Cuda state = [] {
    Cuda made;
    made.is_current = [] { return pushed > 0; };
    made.owns = owns;
    made.post = post;
    return made;
  }();
  return &state;
}

int cuInit(unsigned) {
  return cuda().devices > 0 ? 0 : kNoDevice;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == kInvalidValue     ? "CUDA_ERROR_INVALID_VALUE"
          : error == kOutOfMemory    ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == kInvalidHandle  ? "CUDA_ERROR_INVALID_HANDLE"
          : error == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                     : nullptr;
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = cuda().devices;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "Fake", static_cast<size_t>(size));
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != 75 && attribute != 76) {
    return kInvalidValue;
  }
  *value = attribute == 75 ? cuda().sm / 10 : cuda().sm % 10;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** made, int) {
  const Turn turn(one_at_a_time);
  ++cuda().retained;
  *made = &context;
  return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  const Turn turn(one_at_a_time);
  --cuda().retained;
  return 0;
}

int cuCtxPushCurrent_v2(void* given) {
  if (given != &context) {
    return kInvalidContext;
  }
  ++pushed;
  return 0;
}

int cuCtxPopCurrent_v2(void** given) {
  if (pushed == 0) {
    return kInvalidContext;
  }
  --pushed;
  *given = &context;
  return 0;
}

int cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
  const Turn turn(one_at_a_time);
  if (pushed == 0) {
    return kInvalidContext;
  }
  if (bytes == 0) {
    return kInvalidValue;
  }
  if (fails()) {
    return kOutOfMemory;
  }
  std::vector<char> memory(bytes, '\xff'); // NaN
  *pointer = reinterpret_cast<Pointer>(memory.data());
  cuda().allocated[*pointer] = std::move(memory);
  return 0;
}

int cuMemFree_v2(Pointer pointer) {
  const Turn turn(one_at_a_time);
  if (pushed == 0 || cuda().allocated.erase(pointer) != 1) {
    cuda().violations.push_back("memory is freed that is not allocated");
    return kInvalidValue;
  }
  return 0;
}

int cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void* stream) {
  return enqueue(stream, {{to, bytes}}, [=] { std::memset(host(to), value, bytes); });
}

int cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
  return enqueue(stream, {{to, bytes}}, [=] { std::memcpy(host(to), from, bytes); });
}

int cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
  return enqueue(stream, {{from, bytes}}, [=] { std::memcpy(to, host(from), bytes); });
}

int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
  return enqueue(stream, {{to, bytes}, {from, bytes}},
                 [=] { std::memcpy(host(to), host(from), bytes); });
}

int cuStreamCreate(void** stream, unsigned) {
  const Turn turn(one_at_a_time);
  if (pushed == 0) {
    return kInvalidContext;
  }
  if (fails()) {
    return kOutOfMemory;
  }
  *stream = new char;
  cuda().streams[*stream];
  return 0;
}

int cuStreamDestroy_v2(void* stream) {
  const Turn turn(one_at_a_time);
  const auto found = cuda().streams.find(stream);
  if (pushed == 0 || found == cuda().streams.end()) {
    cuda().violations.push_back("a stream is destroyed that does not exist");
    return kInvalidHandle;
  }
  if (!found->second.empty()) {
    cuda().violations.push_back("a stream is destroyed that has queued work");
  }
  cuda().streams.erase(found);
  delete static_cast<char*>(stream);
  return 0;
}

// If it fails, it has done half of the work.
int cuStreamSynchronize(void* stream) {
  const Turn turn(one_at_a_time);
  const auto found = cuda().streams.find(stream);
  if (pushed == 0 || found == cuda().streams.end()) {
    return kInvalidHandle;
  }
  const bool failing = fails();
  std::vector<std::function<void()>> work;
  work.swap(found->second);
  work.resize(failing ? work.size() / 2 : work.size());
  for (const std::function<void()>& each : work) {
    each();
  }
  return failing ? kIllegalAddress : 0;
}

} // extern "C"

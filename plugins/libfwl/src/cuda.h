// A GPU through the CUDA driver, which is opened when a program asks for a GPU and is not linked.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace fwl::internal {

using DevicePointer = unsigned long long;

struct CudaDriver;

// A GPU with its primary context, which the CUDA runtime inside TensorRT uses too.
class Gpu {
public:
  // Throws Absent if there is no driver or no GPU, and Failure if `ordinal` is out of range or a
  // call of the driver fails.
  explicit Gpu(int ordinal);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  // Compute capability without the dot, such as 89.
  int sm() const { return sm_; }
  const std::string& name() const { return name_; }
  const CudaDriver& driver() const { return *driver_; }

  // Makes the GPU's context current in the calling thread, until the end of the scope.
  class Use {
  public:
    explicit Use(const Gpu& gpu); // throws Failure
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

  private:
    const Gpu& gpu_;
  };

private:
  std::unique_ptr<CudaDriver> driver_;
  int device_ = 0;
  void* context_ = nullptr;
  int sm_ = 0;
  std::string name_;
};

// The queue of one session's work on the GPU, which runs in order. Queued work is complete once
// `wait` returns; until then the caller must keep the memory that it reads or writes. All functions
// throw Failure.
class Stream {
public:
  explicit Stream(std::shared_ptr<const Gpu> gpu);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const Gpu& gpu() const { return *gpu_; }
  void* handle() const { return handle_; }

  void zero(DevicePointer to, size_t bytes) const;
  void upload(DevicePointer to, const void* from, size_t bytes) const;
  void download(void* to, DevicePointer from, size_t bytes) const;
  void copy(DevicePointer to, DevicePointer from, size_t bytes) const;
  void wait() const;

  // Waits at the end of a scope, even after an exception, so that no queued work reaches memory
  // that was freed.
  struct Settled {
    ~Settled();
    const Stream& stream;
  };

private:
  std::shared_ptr<const Gpu> gpu_;
  void* handle_ = nullptr;
};

// A block of GPU memory.
class DeviceMemory {
public:
  DeviceMemory() = default;
  DeviceMemory(std::shared_ptr<const Stream> stream, size_t bytes); // throws Failure
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  DevicePointer start() const { return start_; }
  size_t bytes() const { return bytes_; }

private:
  std::shared_ptr<const Stream> stream_;
  DevicePointer start_ = 0;
  size_t bytes_ = 0;
};

} // namespace fwl::internal

// A GPU through CUDA's driver, which is opened when a program asks for a GPU: nothing is linked.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace fwl::internal {

using DevicePointer = unsigned long long;

struct CudaDriver;

// A GPU, with its primary context: that is the one which CUDA's runtime, inside TensorRT, uses too.
class Gpu {
public:
  // Throws Absent: no driver, or no such GPU. Throws Failure: a call of the driver failed.
  explicit Gpu(int ordinal);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  int sm() const { return sm_; }
  const std::string& name() const { return name_; }
  const CudaDriver& driver() const { return *driver_; }

  // Makes the GPU the calling thread's for as long as it lives.
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

// Work of one session, in its order. What is queued is done after `wait`; until then the memory of
// the caller that it reads or writes must stay. All throw Failure.
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

  // Waits however a function ends, so that nothing queued reaches memory that is gone.
  struct Settled {
    ~Settled();
    const Stream& stream;
  };

private:
  std::shared_ptr<const Gpu> gpu_;
  void* handle_ = nullptr;
};

// A block of the GPU's memory.
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

// The state of a session in ordinary memory.
#pragma once

#include "runtime.h"

namespace fwl::internal {

// One aligned array [rows, ...] for each tensor, all in one block.
class HostBuffers final : public Buffers {
public:
  // `specs` must outlive the buffers.
  HostBuffers(const std::vector<TensorSpec>& specs, size_t rows);

  char* tensor(size_t index) const { return start_ + offsets_[index]; }
  char* row(size_t index, size_t row) const {
    return tensor(index) + row * (*specs_)[index].bytes();
  }

  void read(size_t row, char* state) const override;
  Buffers& writable(Buffers&) override { return *this; }
  void write(size_t row, const char* state) noexcept override;

private:
  const std::vector<TensorSpec>* specs_;
  std::unique_ptr<char[]> memory_;
  char* start_; // the first aligned byte of `memory_`
  std::vector<size_t> offsets_;
};

} // namespace fwl::internal

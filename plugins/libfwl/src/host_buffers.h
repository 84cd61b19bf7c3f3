#pragma once

#include "backend.h"

namespace fwl::internal {

// State in ordinary memory: one block for each tensor, [rows, ...].
class HostBuffers final : public Buffers {
public:
  HostBuffers(const std::vector<TensorSpec>& specs, size_t rows); // `specs` must outlive it

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
  char* start_; // aligned
  std::vector<size_t> offsets_;
};

} // namespace fwl::internal

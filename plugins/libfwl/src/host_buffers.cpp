#include "host_buffers.h"

#include <cstring>

namespace fwl::internal {
namespace {

constexpr size_t kAlignment = 64;

} // namespace

HostBuffers::HostBuffers(const std::vector<TensorSpec>& specs, size_t rows) : specs_(&specs) {
  size_t bytes = 0;
  for (const TensorSpec& spec : specs) {
    offsets_.push_back(bytes);
    bytes += (rows * spec.bytes() + kAlignment - 1) / kAlignment * kAlignment;
  }
  memory_.reset(new char[bytes + kAlignment]());
  const size_t misfit = reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment;
  start_ = memory_.get() + (kAlignment - misfit) % kAlignment;
}

void HostBuffers::read(size_t row_index, char* state) const {
  for (size_t i = 0; i < specs_->size(); ++i) {
    const size_t bytes = (*specs_)[i].bytes();
    std::memcpy(state, row(i, row_index), bytes);
    state += bytes;
  }
}

void HostBuffers::write(size_t row_index, const char* state) noexcept {
  for (size_t i = 0; i < specs_->size(); ++i) {
    const size_t bytes = (*specs_)[i].bytes();
    std::memcpy(row(i, row_index), state, bytes);
    state += bytes;
  }
}

} // namespace fwl::internal

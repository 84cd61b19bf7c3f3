// Entry points of libFuzzer, for builds with Clang.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "target.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t room);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fwl::fuzz::accepts({reinterpret_cast<const char*>(data), size});
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t room,
                                          unsigned int seed) {
  // libFuzzer starts from nothing; now and then it gets a good file.
  static const std::vector<std::string> good = fwl::fuzz::seeds();
  const std::string& start = good[seed / 64 % good.size()];
  if ((size < 2 || seed % 64 == 0) && start.size() <= room) {
    std::memcpy(data, start.data(), start.size());
    return start.size();
  }
  const size_t changed = LLVMFuzzerMutate(data, size, room);
  if (seed % 2 == 0) {
    return changed;
  }
  const std::string mended = fwl::fuzz::repaired({reinterpret_cast<const char*>(data), changed});
  if (mended.size() > room) {
    return changed;
  }
  std::memcpy(data, mended.data(), mended.size());
  return mended.size();
}

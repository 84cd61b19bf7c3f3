// A CUDA driver for tests of what keeps memory on a GPU: work waits in its stream until somebody
// waits for it, and what the real driver would refuse, or what would be a race, is refused.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fwl::fake {

struct Cuda {
  int devices = 1;
  int sm = 89;
  long calls_left = -1; // until one fails; negative: none does
  std::vector<std::string> violations;
  std::map<unsigned long long, std::vector<char>> allocated;
  std::map<void*, std::vector<std::function<void()>>> streams; // work that nobody waited for yet
  int retained = 0;                                            // primary contexts

  bool (*is_current)(); // whether the calling thread has the GPU
  bool (*owns)(const void* start, size_t bytes);
  void (*post)(void* stream, std::function<void()> work);
};

} // namespace fwl::fake

extern "C" fwl::fake::Cuda* fwl_fake_cuda();

// A fake CUDA driver for tests of code that keeps memory on the GPU. Work stays queued in its
// stream until a call waits for the stream. Calls fail where the real driver would fail, and
// races are recorded as violations.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fwl::fake {

struct Cuda {
  int devices = 1;
  int sm = 89;
  long calls_left = -1;                // calls that succeed before one fails; negative: none fails
  std::vector<std::string> violations; // wrong uses that no return value reports
  std::map<unsigned long long, std::vector<char>> allocated;
  std::map<void*, std::vector<std::function<void()>>> streams; // their queued work
  int retained = 0;                                            // references to the primary context

  bool (*is_current)(); // whether the calling thread has a current context
  bool (*owns)(const void* start, size_t bytes);
  void (*post)(void* stream, std::function<void()> work);
};

} // namespace fwl::fake

extern "C" fwl::fake::Cuda* fwl_fake_cuda();

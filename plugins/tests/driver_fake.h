// A fake CUDA driver for tests of the launcher. It fails where the real driver would fail, records
// the calls, and computes on the CPU what ../kernels/gpu/linear_attention.py documents for each
// kernel.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "kernels/gpu/launcher/table.h"

namespace fwl::fake {

// A launch that was recorded.
struct Launched {
  const gpu::Variant* variant;
  bool ptx;
  unsigned grid;
  unsigned threads;
  unsigned shared_bytes;
  void* stream;
};

struct Driver {
  int sm = 89;
  const unsigned char* images = nullptr; // fwl_gpu_images of the program
  std::string failing;                   // name of the function that returns an error
  std::vector<Launched> launched;
  size_t loaded = 0;   // libraries that are loaded
  size_t prepared = 0; // calls that loaded a kernel into the context
  std::map<void*, int> shared_bytes_granted;
  std::map<unsigned long long, std::vector<char>> allocated;
};

Driver& driver();

// Reads and writes element `index` of activations of any type.
float to_float(const void* data, size_t index, gpu::Activation activation);
void from_float(void* data, size_t index, gpu::Activation activation, float value);
size_t bytes_of(gpu::Activation activation);

} // namespace fwl::fake

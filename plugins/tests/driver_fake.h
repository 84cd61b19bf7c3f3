// A CUDA driver for tests: it refuses what the real one would refuse, records what it is asked, and
// computes on the CPU what each kernel of ../kernels/gpu/linear_attention.py is documented to.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "kernels/gpu/launcher/table.h"

namespace fwl::fake {

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
  std::string failing;                   // a function that returns an error
  std::vector<Launched> launched;
  size_t loaded = 0;
  size_t prepared = 0; // kernels whose code was loaded into the context
  std::map<void*, int> shared_bytes_granted;
  std::map<unsigned long long, std::vector<char>> allocated;
};

Driver& driver();

// Halves of either kind.
float to_float(const void* data, size_t index, gpu::Activation activation);
void from_float(void* data, size_t index, gpu::Activation activation, float value);
size_t bytes_of(gpu::Activation activation);

} // namespace fwl::fake

// The table of compiled kernels that write_table.py generates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fwl::gpu {

enum class Activation { kFloat32, kFloat16, kBFloat16 };

// The number of multiprocessors that grids are sized for, by compute capability.
struct Multiprocessors {
  int sm;
  int64_t count;
};

enum class Kernel;

// A part of fwl_gpu_images; empty if `bytes` is 0.
struct Image {
  size_t offset;
  size_t bytes;
};

// One compiled form of a kernel; see plan.py.
struct Variant {
  Kernel kernel;
  Activation activation;
  int sm;
  bool aligned;
  bool split;
  bool this_sm_only; // no other GPU runs this code, not even of the same generation
  unsigned threads;
  unsigned shared_bytes;
  int64_t chunk;
  int64_t block_k;
  int64_t block_v;
  size_t null_parameters; // unused pointers to scratch memory that follow the parameters
  const char* symbol;
  Image cubin;
  Image ptx;
};

#include "kernels.inc"

// The code of all variants.
extern "C" const unsigned char fwl_gpu_images[];

} // namespace fwl::gpu

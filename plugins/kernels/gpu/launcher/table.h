// The compiled kernels, as embed.py found them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fwl::gpu {

enum class Activation { kFloat32, kFloat16, kBFloat16 };

struct Multiprocessors {
  int sm;
  int64_t count;
};

enum class Kernel;

// Bytes of the embedded file; none if `bytes` is 0.
struct Image {
  size_t offset;
  size_t bytes;
};

struct Variant {
  Kernel kernel;
  Activation activation;
  int sm;
  bool aligned;
  bool split;
  bool this_sm_only;
  unsigned threads;
  unsigned shared_bytes;
  int64_t chunk;
  int64_t block_k;
  int64_t block_v;
  size_t null_parameters; // scratch pointers that follow the parameters
  const char* symbol;
  Image cubin;
  Image ptx;
};

#include "kernels.inc"

// The bytes that images lie in.
extern "C" const unsigned char fwl_gpu_images[];

} // namespace fwl::gpu

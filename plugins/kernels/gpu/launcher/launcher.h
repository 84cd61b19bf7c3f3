// Runs the op on the GPU of the calling thread's context. All functions throw DriverError if the
// driver is missing or reports an error, and std::invalid_argument for sizes that no kernel
// supports.
#pragma once

#include "kernels/gpu/launcher/driver.h"
#include "kernels/gpu/launcher/plan.h"

namespace fwl::gpu {

// Contiguous tensors in GPU memory, with the shapes of op_spec.h. `past` and `present` may be
// equal.
struct Tensors {
  const void* query;
  const void* key;
  const void* value;
  const void* decay;
  const void* past;
  void* output;
  void* present;
};

// Loads the kernels for these sizes. Without it the first launch loads them, which would break the
// capture of a stream.
void prepare(const Sizes& sizes);

// Launches the op on a stream and returns. `workspace` has workspace_bound(sizes) bytes or more.
void launch(const Sizes& sizes, const Tensors& tensors, void* workspace, Stream stream);

// The same, with a workspace that is allocated and freed in the stream's order.
void launch(const Sizes& sizes, const Tensors& tensors, Stream stream);

} // namespace fwl::gpu

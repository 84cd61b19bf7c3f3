// Runs the op on the GPU of the calling thread's context. All functions throw DriverError if the
// driver is missing or refuses, and std::invalid_argument for sizes that no kernel takes.
#pragma once

#include "kernels/gpu/launcher/driver.h"
#include "kernels/gpu/launcher/plan.h"

namespace fwl::gpu {

// Contiguous, in the GPU's memory; shapes are those of op_spec.h. past and present may be one.
struct Tensors {
  const void* query;
  const void* key;
  const void* value;
  const void* decay;
  const void* past;
  void* output;
  void* present;
};

// Loads the kernels of these sizes, so that no launch has to: it would break a stream's capture.
void prepare(const Sizes& sizes);

// Launches on a stream and returns. `workspace` is of workspace_bound bytes or more.
void launch(const Sizes& sizes, const Tensors& tensors, void* workspace, Stream stream);

// The same with a workspace that is taken and given back in the stream's order.
void launch(const Sizes& sizes, const Tensors& tensors, Stream stream);

} // namespace fwl::gpu

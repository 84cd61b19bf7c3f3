// Decides which kernels run for given sizes, exactly as ../plan.py does.
#pragma once

#include <vector>

#include "kernels/gpu/launcher/table.h"

namespace fwl::gpu {

// The sizes of one call, each 1 or more; Dk * Dv is below 2^31.
struct Sizes {
  int64_t rows;   // B
  int64_t tokens; // T
  int64_t size_k; // Dk
  int64_t size_v; // Dv
  Activation activation;
};

// One launch of a kernel.
struct Launch {
  const Variant* variant;
  int64_t grid; // programs
  // Values of the kernel's integer parameters, indexed by Parameter; entries of pointers are
  // unused.
  int32_t scalars[static_cast<size_t>(Parameter::kCount)];
  bool first_segment; // if not, `past` is the state that an earlier launch has written
};

// The launches of one call, in order.
struct Plan {
  std::vector<Launch> launches;
  size_t workspace_bytes;
};

// The kernels that a GPU runs: those compiled for `sm`, from cubin or PTX. `sm` is 0 if it runs
// none.
struct Target {
  int sm;
  bool ptx;
};

// Returns the kernels for a GPU of a compute capability.
Target target_of(int device_sm);

// Plans a call with the kernels for `sm`. `aligned` says that every pointer is a multiple of 16
// bytes. Throws std::invalid_argument for sizes that no kernel supports.
Plan make_plan(const Sizes& sizes, int sm, bool aligned);

// Returns bytes of workspace that are enough for every GPU and all sizes up to these.
size_t workspace_bound(const Sizes& largest);

} // namespace fwl::gpu

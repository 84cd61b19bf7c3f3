// Which kernels run for given sizes, as ../plan.py has it.
#pragma once

#include <vector>

#include "kernels/gpu/launcher/table.h"

namespace fwl::gpu {

// Sizes of one call, all 1 or more; Dk * Dv is below 2^31.
struct Sizes {
  int64_t rows;   // B
  int64_t tokens; // T
  int64_t size_k; // Dk
  int64_t size_v; // Dv
  Activation activation;
};

struct Launch {
  const Variant* variant;
  int64_t grid;
  // Values of the kernel's sizes, by Parameter; the places of pointers are not used.
  int32_t scalars[static_cast<size_t>(Parameter::kCount)];
  bool first_segment; // otherwise `past` is what an earlier launch wrote
};

struct Plan {
  std::vector<Launch> launches;
  size_t workspace_bytes;
};

// Whose kernels a GPU runs, and whether from PTX. `sm` is 0 if there are none for it.
struct Target {
  int sm;
  bool ptx;
};

Target target_of(int device_sm);

// Throws std::invalid_argument for sizes that no kernel takes.
Plan make_plan(const Sizes& sizes, int sm, bool aligned);

// A workspace that is enough for every GPU and all sizes up to these.
size_t workspace_bound(const Sizes& largest);

} // namespace fwl::gpu

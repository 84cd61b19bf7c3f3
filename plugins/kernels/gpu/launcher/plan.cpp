#include "kernels/gpu/launcher/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fwl::gpu {
namespace {

int64_t tiles(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

const Variant& variant(Kernel kernel, Activation activation, int sm, bool aligned,
                       bool split = false) {
  for (const Variant& each : variants) {
    if (each.kernel == kernel && each.activation == activation && each.sm == sm &&
        each.aligned == aligned && each.split == split) {
      return each;
    }
  }
  throw std::invalid_argument("there is no kernel for SM " + std::to_string(sm));
}

int32_t& scalar(Launch& launch, Parameter parameter) {
  return launch.scalars[static_cast<size_t>(parameter)];
}

Launch launch_of(const Variant& chosen, int64_t grid, const Sizes& sizes, bool first = true) {
  Launch launch{&chosen, grid, {}, first};
  scalar(launch, Parameter::kSizeK) = static_cast<int32_t>(sizes.size_k);
  scalar(launch, Parameter::kSizeV) = static_cast<int32_t>(sizes.size_v);
  return launch;
}

int64_t multiprocessors_of(int sm) {
  for (const Multiprocessors& each : multiprocessors) {
    if (each.sm == sm) {
      return each.count;
    }
  }
  throw std::invalid_argument("there is no plan for SM " + std::to_string(sm));
}

Plan plan_decode(const Sizes& sizes, int sm, bool aligned) {
  const Variant& whole = variant(Kernel::kDecode, sizes.activation, sm, aligned);
  const int64_t programs = sizes.rows * tiles(sizes.size_v, whole.block_v);
  const int64_t wanted = std::min(tiles(4 * multiprocessors_of(sm), programs), kMaxSplits);
  const int64_t lines = tiles(tiles(sizes.size_k, wanted), whole.block_k) * whole.block_k;
  const int64_t splits = tiles(sizes.size_k, lines);
  const bool split = splits > 1;
  Plan plan{{}, 0};
  plan.launches.push_back(launch_of(variant(Kernel::kDecode, sizes.activation, sm, aligned, split),
                                    programs * splits, sizes));
  scalar(plan.launches.back(), Parameter::kSplits) = static_cast<int32_t>(splits);
  scalar(plan.launches.back(), Parameter::kRows) = static_cast<int32_t>(lines);
  if (split) {
    const Variant& sum = variant(Kernel::kSumPartials, sizes.activation, sm, false);
    plan.launches.push_back(launch_of(sum, sizes.rows * tiles(sizes.size_v, sum.block_v), sizes));
    scalar(plan.launches.back(), Parameter::kSplits) = static_cast<int32_t>(splits);
    plan.workspace_bytes = sizeof(float) * static_cast<size_t>(sizes.rows * splits * sizes.size_v);
  }
  return plan;
}

Plan plan_prefill(const Sizes& sizes, int sm, bool aligned) {
  const Variant& state = variant(Kernel::kPrefillState, sizes.activation, sm, aligned);
  const Variant& output = variant(Kernel::kPrefillOutput, sizes.activation, sm, aligned);
  const int64_t tiles_k = tiles(sizes.size_k, state.block_k);
  const int64_t per_chunk = tiles_k * sizes.rows * state.chunk * sizes.size_v;
  const int64_t segment = std::max<int64_t>(kWorkspaceBytes / (4 * per_chunk), 2) * state.chunk;
  const int64_t longest = std::min(segment, sizes.tokens);
  Plan plan{{}, sizeof(float) * static_cast<size_t>(tiles_k * sizes.rows * longest * sizes.size_v)};
  for (int64_t start = 0; start < sizes.tokens; start += segment) {
    const int64_t length = std::min(segment, sizes.tokens - start);
    const int64_t state_grid = tiles_k * sizes.rows * tiles(sizes.size_v, state.block_v);
    const int64_t output_grid =
        sizes.rows * tiles(length, state.chunk) * tiles(sizes.size_v, output.block_v);
    for (const auto& [chosen, grid] : {std::pair(&state, state_grid), {&output, output_grid}}) {
      plan.launches.push_back(launch_of(*chosen, grid, sizes, start == 0 || chosen == &output));
      Launch& launch = plan.launches.back();
      scalar(launch, Parameter::kRows) = static_cast<int32_t>(sizes.rows);
      scalar(launch, Parameter::kTokens) = static_cast<int32_t>(sizes.tokens);
      scalar(launch, Parameter::kStart) = static_cast<int32_t>(start);
      scalar(launch, Parameter::kLength) = static_cast<int32_t>(length);
      scalar(launch, Parameter::kTilesK) = static_cast<int32_t>(tiles_k);
    }
  }
  return plan;
}

void check(const Sizes& sizes) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const std::pair<const char*, int64_t> named[] = {
      {"B", sizes.rows}, {"T", sizes.tokens}, {"Dk", sizes.size_k}, {"Dv", sizes.size_v}};
  for (const auto& [name, size] : named) {
    if (size < 1 || size >= kLimit) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) +
                                  "; expected 1 or more, and less than 2^31");
    }
  }
  if (sizes.size_k * sizes.size_v >= kLimit) {
    throw std::invalid_argument("Dk * Dv is " + std::to_string(sizes.size_k * sizes.size_v) +
                                "; expected less than 2^31");
  }
}

} // namespace

Target target_of(int device_sm) {
  int best = 0;
  for (const Variant& each : variants) {
    const bool successor = !each.this_sm_only && each.sm / 10 == device_sm / 10;
    if (each.sm == device_sm || (successor && each.sm < device_sm)) {
      best = std::max(best, each.sm);
    }
  }
  if (best == 0 && device_sm > kPtxSm) {
    return {kPtxSm, true};
  }
  return {best, false};
}

Plan make_plan(const Sizes& sizes, int sm, bool aligned) {
  check(sizes);
  aligned = aligned && sizes.size_k % 16 == 0 && sizes.size_v % 16 == 0;
  return sizes.tokens == 1 ? plan_decode(sizes, sm, aligned) : plan_prefill(sizes, sm, aligned);
}

size_t workspace_bound(const Sizes& largest) {
  check(largest);
  size_t bound = 0;
  // With fewer rows, decode splits a state into more parts, and prefill has longer segments.
  for (const Multiprocessors& each : multiprocessors) {
    for (int64_t rows = 1; rows <= largest.rows; ++rows) {
      Sizes sizes = largest;
      sizes.rows = rows;
      sizes.tokens = 1;
      bound = std::max(bound, plan_decode(sizes, each.sm, false).workspace_bytes);
    }
    for (const bool aligned : {false, true}) {
      const Variant& state = variant(Kernel::kPrefillState, largest.activation, each.sm, aligned);
      const int64_t per_token =
          4 * tiles(largest.size_k, state.block_k) * largest.rows * largest.size_v;
      const int64_t whole = per_token * largest.tokens;
      const int64_t segment = std::max(kWorkspaceBytes, per_token * 2 * state.chunk);
      bound = std::max(bound, static_cast<size_t>(std::min(whole, segment)));
    }
  }
  return bound;
}

} // namespace fwl::gpu

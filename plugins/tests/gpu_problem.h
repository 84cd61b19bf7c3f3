// Random inputs of the op, and the results that it must give.
#pragma once

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "driver_fake.h"
#include "kernels/gpu/launcher/launcher.h"

namespace fwl::test {

// Resets the fake driver at the start of a test case. Kernels stay loaded.
struct FakeDriver {
  FakeDriver() {
    driver.images = gpu::fwl_gpu_images;
    driver.sm = 89;
    driver.failing.clear();
    driver.launched.clear();
  }

  fake::Driver& driver = fake::driver();
};

struct Problem {
  Problem(const gpu::Sizes& asked, unsigned seed)
      : sizes(asked), generator(seed), query(activations(sizes.tokens * sizes.size_k)),
        key(activations(sizes.tokens * sizes.size_k)),
        value(activations(sizes.tokens * sizes.size_v)) {
    std::uniform_real_distribution<float> near_one(0.9f, 1.0f);
    for (int64_t i = 0; i < sizes.rows * sizes.tokens; ++i) {
      const unsigned kind = generator() % 16;
      decay.push_back(kind == 0 ? 0.0f : kind == 1 ? 1.0f : near_one(generator));
    }
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < sizes.rows * sizes.size_k * sizes.size_v; ++i) {
      past.push_back(normal(generator));
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    present.assign(past.size(), nan);
    output.assign(static_cast<size_t>(sizes.rows * sizes.tokens * sizes.size_v), nan);
  }

  gpu::Tensors tensors(bool in_place) {
    return {query.data(),
            key.data(),
            value.data(),
            decay.data(),
            past.data(),
            output.data(),
            in_place ? past.data() : present.data()};
  }

  // Computes the expected results by the op's definition, in float64. Call it before the op runs,
  // which may overwrite the state.
  void keep_reference() {
    const auto at = [&](const std::vector<char>& data, int64_t i) {
      return static_cast<double>(
          fake::to_float(data.data(), static_cast<size_t>(i), sizes.activation));
    };
    state.assign(past.begin(), past.end());
    expected.assign(static_cast<size_t>(sizes.rows * sizes.tokens * sizes.size_v), 0.0);
    for (int64_t b = 0; b < sizes.rows; ++b) {
      for (int64_t token = b * sizes.tokens; token < (b + 1) * sizes.tokens; ++token) {
        for (int64_t k = 0; k < sizes.size_k; ++k) {
          const double q = at(query, token * sizes.size_k + k);
          const double write = at(key, token * sizes.size_k + k);
          for (int64_t v = 0; v < sizes.size_v; ++v) {
            double& cell = state[static_cast<size_t>((b * sizes.size_k + k) * sizes.size_v + v)];
            cell = static_cast<double>(decay[static_cast<size_t>(token)]) * cell +
                   write * at(value, token * sizes.size_v + v);
            expected[static_cast<size_t>(token * sizes.size_v + v)] += q * cell;
          }
        }
      }
    }
  }

  // Checks the largest errors of output and state, relative to the largest values.
  void check(bool in_place) const {
    CAPTURE(fake::driver().sm, sizes.rows, sizes.tokens, sizes.size_k, sizes.size_v);
    CAPTURE(sizes.activation, in_place);
    const std::vector<float>& found = in_place ? past : present;
    double output_error = 0, output_size = 0, state_error = 0, state_size = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = output[i] - expected[i];
      output_error = std::isnan(error) ? INFINITY : std::max(output_error, std::fabs(error));
      output_size = std::max(output_size, std::fabs(expected[i]));
    }
    for (size_t i = 0; i < state.size(); ++i) {
      const double error = found[i] - state[i];
      state_error = std::isnan(error) ? INFINITY : std::max(state_error, std::fabs(error));
      state_size = std::max(state_size, std::fabs(state[i]));
    }
    // The fake driver sums in float64, so the only errors are the rounding of outputs, partial
    // sums and the state to float32.
    CHECK(output_error <= 0x1p-18 * output_size);
    CHECK(state_error <= 0x1p-18 * state_size);
  }

  gpu::Sizes sizes;
  std::mt19937 generator;
  std::vector<char> query, key, value;
  std::vector<float> decay, past, present, output;
  std::vector<double> state, expected;

private:
  std::vector<char> activations(int64_t per_row) {
    const size_t count = static_cast<size_t>(sizes.rows * per_row);
    std::vector<char> data(count * fake::bytes_of(sizes.activation));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count; ++i) {
      fake::from_float(data.data(), i, sizes.activation, normal(generator));
    }
    return data;
  }
};

} // namespace fwl::test

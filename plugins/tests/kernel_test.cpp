// The CPU kernels against a loop in float64: output and state for every instruction set of this
// machine, in place and not, with any number of threads. Memory is filled with NaN and exactly as
// large as needed, so that sanitizers see every access outside.

#include <algorithm>
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/instructions.h"

namespace fwl::cpu {
#ifdef FWL_TEST_WIDE_TILES
extern const Instructions kWideTiles;
#endif
} // namespace fwl::cpu

namespace {

using namespace fwl::cpu;

struct Table {
  const char* name;
  const Instructions* instructions;
};

// The tables that this machine can run, for GENERATE.
const std::vector<Table>& tables() {
  static const std::vector<Table> all = [] {
    std::vector<Table> found;
    for (const InstructionSet set : kInstructionSets) {
      if (is_available(set)) {
        found.push_back({name_of(set), &instructions_of(set)});
      } else {
        WARN("not on this machine: " << name_of(set));
      }
    }
#ifdef FWL_TEST_WIDE_TILES
    if (is_available(InstructionSet::kAvx2)) {
      found.push_back({"wide tiles", &kWideTiles});
    }
#endif
    return found;
  }();
  return all;
}

// Returns the float16 nearest to a finite number within its range.
uint16_t to_half(float value) {
  const float magnitude = std::abs(value);
  const int exponent = magnitude > 0 ? std::max(-14, std::ilogb(magnitude)) : -14;
  const float fraction = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  const int bits = (exponent + 14) * 1024 + static_cast<int>(fraction);
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | bits);
}

// Returns what the bits of a float16 stand for, by its definition.
float to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<float>::quiet_NaN()
                         : sign * std::numeric_limits<float>::infinity();
  }
  const int whole = exponent > 0 ? 1024 + fraction : fraction;
  return sign * std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - 25);
}

enum class Decay { kOne, kConstant, kMixed, kReset, kTiny, kZero };

struct Problem {
  Problem(const Sizes& problem_sizes, Decay kind, unsigned seed) : sizes(problem_sizes) {
    std::mt19937 generator(seed);
    const size_t tokens = sizes.batch * sizes.tokens;
    query = random(generator, tokens * sizes.key_size);
    key = random(generator, tokens * sizes.key_size);
    value = random(generator, tokens * sizes.value_size);
    state.resize(sizes.batch * sizes.key_size * sizes.value_size);
    std::normal_distribution<float> normal;
    for (float& x : state) {
      x = normal(generator);
    }
    std::uniform_real_distribution<float> uniform;
    for (size_t i = 0; i < tokens; ++i) {
      const size_t t = i % sizes.tokens;
      const bool early = t < sizes.tokens / 2;
      switch (kind) {
      case Decay::kOne:
        decay.push_back(1);
        break;
      case Decay::kConstant:
        decay.push_back(0.97f);
        break;
      case Decay::kMixed:
        decay.push_back(uniform(generator));
        break;
      case Decay::kReset:
        decay.push_back(t == sizes.tokens / 2 ? 0.0f : 1.0f);
        break;
      case Decay::kTiny:
        decay.push_back(early ? 1e-30f : 0.9f);
        break;
      case Decay::kZero:
        decay.push_back(0);
        break;
      }
    }
  }

  std::vector<float> random(std::mt19937& generator, size_t count) const {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& x : values) {
      x = normal(generator);
      if (sizes.activation == Activation::kFloat16) {
        x = to_float(to_half(x));
      }
    }
    return values;
  }

  Sizes sizes;
  std::vector<float> query, key, value, decay, state;
};

struct Result {
  std::vector<double> output, state;
};

// Computes the op in float64. Sets `scale` to sums of absolute values, which bound rounding errors.
Result reference(const Problem& problem, Result& scale) {
  const Sizes& n = problem.sizes;
  Result result;
  result.state.assign(problem.state.begin(), problem.state.end());
  scale.state.resize(result.state.size());
  for (size_t i = 0; i < result.state.size(); ++i) {
    scale.state[i] = std::abs(result.state[i]);
  }
  result.output.assign(n.batch * n.tokens * n.value_size, 0);
  scale.output.assign(result.output.size(), 0);
  for (size_t token = 0; token < n.batch * n.tokens; ++token) {
    const size_t at = token / n.tokens * n.key_size * n.value_size;
    for (size_t i = 0; i < n.key_size; ++i) {
      for (size_t j = 0; j < n.value_size; ++j) {
        const double d = problem.decay[token];
        const double q = problem.query[token * n.key_size + i];
        const double written = static_cast<double>(problem.key[token * n.key_size + i]) *
                               problem.value[token * n.value_size + j];
        double& state = result.state[at + i * n.value_size + j];
        double& of_state = scale.state[at + i * n.value_size + j];
        state = d * state + written;
        of_state = d * of_state + std::abs(written);
        result.output[token * n.value_size + j] += q * state;
        scale.output[token * n.value_size + j] += std::abs(q) * of_state;
      }
    }
  }
  return result;
}

// Runs tasks on `count` threads, each of which takes the next task.
struct Threads {
  explicit Threads(size_t thread_count) : count(thread_count) {}

  static void run(void* self, void (*task)(void*, size_t), size_t tasks, void* context) {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i = next++; i < tasks; i = next++) {
        task(context, i);
      }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < static_cast<Threads*>(self)->count; ++i) {
      threads.emplace_back(work);
    }
    work();
    for (std::thread& thread : threads) {
      thread.join();
    }
  }

  size_t count;
};

struct Run {
  std::vector<float> output, state;

  bool operator==(const Run& other) const {
    return same(output, other.output) && same(state, other.state);
  }

  template <class T> static bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  }
};

Run run(const Problem& problem, const Table& table, size_t thread_count, bool in_place,
        size_t misalignment = 0) {
  const Sizes& n = problem.sizes;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool half = n.activation == Activation::kFloat16;
  std::vector<uint16_t> halves[3];
  const std::vector<float>* wide[] = {&problem.query, &problem.key, &problem.value};
  const void* inputs[3];
  for (size_t i = 0; i < 3; ++i) {
    for (const float x : *wide[i]) {
      halves[i].push_back(half ? to_half(x) : 0);
    }
    inputs[i] = half ? static_cast<const void*>(halves[i].data())
                     : static_cast<const void*>(wide[i]->data());
  }
  Run result;
  result.output.assign(n.batch * n.tokens * n.value_size, nan);
  result.state = in_place ? problem.state : std::vector<float>(problem.state.size(), nan);
  const size_t bytes = workspace_bytes(n, *table.instructions);
  const std::unique_ptr<char[]> memory(new char[bytes + misalignment]);
  std::memset(memory.get(), 0xff, bytes + misalignment); // NaN in every place
  Threads threads(thread_count);
  linear_attention_update(n,
                          {inputs[0], inputs[1], inputs[2], problem.decay.data(),
                           in_place ? result.state.data() : problem.state.data(),
                           result.output.data(), result.state.data()},
                          *table.instructions, memory.get() + misalignment,
                          {Threads::run, &threads});
  return result;
}

// Checks a run. The bounds are a few float32 roundings of the sum of absolute values.
void compare(const Run& actual, const Problem& problem) {
  constexpr double kRounding = 8 * 0x1p-24;
  Result scale;
  const Result expected = reference(problem, scale);
  size_t wrong = 0;
  const auto check = [&](double found, double wanted, double bound) {
    const double error = std::abs(found - wanted);
    if (!(error <= bound + 1e-37)) { // a NaN is wrong too
      ++wrong;
    }
  };
  for (size_t i = 0; i < expected.output.size(); ++i) {
    check(actual.output[i], expected.output[i], kRounding * scale.output[i]);
  }
  for (size_t i = 0; i < expected.state.size(); ++i) {
    check(actual.state[i], expected.state[i], kRounding * scale.state[i]);
  }
  CHECK(wrong == 0);
}

constexpr size_t kShapes[][4] = {
    // B, T, Dk, Dv
    {1, 1, 1, 1},     {1, 1, 8, 8},   {3, 1, 16, 5},     {5, 1, 7, 33},    {1, 1, 130, 1030},
    {2, 1, 300, 259}, {1, 2, 1, 1},   {2, 2, 8, 8},      {3, 13, 7, 33},   {5, 9, 12, 20},
    {1, 63, 5, 17},   {1, 64, 6, 16}, {1, 65, 13, 31},   {2, 129, 24, 40}, {2, 6, 200, 190},
    {1, 257, 32, 7},  {4, 33, 1, 3},  {1, 300, 520, 19}, {1, 20, 33, 600}, {2, 96, 65, 130},
};

// Calls `test` for every shape, type and kind of decay.
template <class Test> void for_each_shape(const Test& test) {
  unsigned seed = 0;
  for (const auto& [batch, tokens, key_size, value_size] : kShapes) {
    for (const Activation activation : {Activation::kFloat32, Activation::kFloat16}) {
      for (const Decay decay : {Decay::kOne, Decay::kConstant, Decay::kMixed, Decay::kReset,
                                Decay::kTiny, Decay::kZero}) {
        CAPTURE(batch, tokens, key_size, value_size, activation, decay);
        test(Sizes{batch, tokens, key_size, value_size, activation}, decay, ++seed);
      }
    }
  }
}

TEST_CASE("outputs and states match a loop in float64") {
  const Table table = GENERATE(from_range(tables()));
  CAPTURE(table.name);
  for_each_shape([&](const Sizes& sizes, Decay decay, unsigned seed) {
    const Problem problem(sizes, decay, seed);
    const Run first = run(problem, table, 1, false);
    compare(first, problem);
    CHECK(first == run(problem, table, 1, true, 4)); // in place
  });
}

TEST_CASE("any number of threads gives the same bits", "[threads]") {
  const Table table = GENERATE(from_range(tables()));
  CAPTURE(table.name);
  for_each_shape([&](const Sizes& sizes, Decay decay, unsigned seed) {
    if (decay == Decay::kMixed) {
      const Problem problem(sizes, decay, seed);
      const Run first = run(problem, table, 1, false);
      CHECK(first == run(problem, table, 2, false));
      CHECK(first == run(problem, table, 4, true));
    }
  });
}

TEST_CASE("more tokens than are packed at the same time, and sizes that threads share",
          "[threads]") {
  const Table table = GENERATE(from_range(tables()));
  for (const auto& [batch, tokens, key_size, value_size] :
       {std::array<size_t, 4>{1, 10007, 40, 20}, std::array<size_t, 4>{3, 700, 1100, 36}}) {
    CAPTURE(table.name, tokens);
    const Sizes sizes{batch, tokens, key_size, value_size, Activation::kFloat32};
    const Problem problem(sizes, Decay::kConstant, 7);
    const Run first = run(problem, table, 3, false);
    compare(first, problem);
    CHECK(first == run(problem, table, 1, true));
  }
}

// Not even as 0 times infinity.
TEST_CASE("later tokens never reach an earlier output") {
  const Table table = GENERATE(from_range(tables()));
  const Sizes sizes{1, 40, 9, 37, Activation::kFloat32};
  Problem problem(sizes, Decay::kConstant, 3);
  const Run clean = run(problem, table, 1, false);
  for (const size_t token : {1, 2, 5, 6, 17, 39}) {
    CAPTURE(table.name, token);
    Problem poisoned = problem;
    for (size_t j = 0; j < sizes.value_size; ++j) {
      poisoned.value[token * sizes.value_size + j] = std::numeric_limits<float>::infinity();
    }
    const Run found = run(poisoned, table, 1, false);
    CHECK(std::memcmp(found.output.data(), clean.output.data(),
                      token * sizes.value_size * sizeof(float)) == 0);
  }
}

TEST_CASE(
    "a decay of 1 without an update keeps every bit of the state, and a decay of 0 erases it") {
  const Table table = GENERATE(from_range(tables()));
  for (const size_t tokens : {size_t{1}, size_t{70}}) {
    CAPTURE(table.name, tokens);
    const Sizes sizes{2, tokens, 19, 45, Activation::kFloat32};
    Problem problem(sizes, Decay::kOne, 5);
    std::fill(problem.value.begin(), problem.value.end(), 0.0f);
    const Run kept = run(problem, table, 1, false);
    CHECK((kept.state == problem.state)); // two pairs of parentheses: Catch2 prints no values
    problem.decay.assign(problem.decay.size(), 0.0f);
    const Run dropped = run(problem, table, 1, false);
    CHECK(std::all_of(dropped.state.begin(), dropped.state.end(), [](float x) { return x == 0; }));
  }
}

TEST_CASE("every float16 becomes the float32 of the same value") {
  const Table table = GENERATE(from_range(tables()));
  CAPTURE(table.name);
  std::vector<uint16_t> all(1 << 16);
  std::vector<float> wide(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = static_cast<uint16_t>(i);
  }
  table.instructions->widen(all.data(), wide.data(), all.size());
  size_t wrong = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const float expected = to_float(all[i]);
    wrong += std::isnan(expected) ? !std::isnan(wide[i]) : wide[i] != expected;
  }
  CHECK(wrong == 0);
}

TEST_CASE("sums of float16 may exceed what float16 holds") {
  const Table table = GENERATE(from_range(tables()));
  for (const size_t tokens : {size_t{1}, size_t{40}}) {
    CAPTURE(table.name, tokens);
    Problem problem({2, tokens, 24, 37, Activation::kFloat16}, Decay::kOne, 9);
    for (float& value : problem.value) {
      value = to_float(to_half(10000 * value));
    }
    const Run found = run(problem, table, 1, false);
    compare(found, problem);
    CHECK(*std::max_element(found.output.begin(), found.output.end()) > 65504);
  }
}

} // namespace

// The launcher on a fake CUDA driver: which kernels run on which GPU, the order of their arguments,
// and how errors of the driver are reported.
//
// Kernels stay loaded from case to case. Three cases need kernels that are not loaded yet, whatever
// the order of cases: they use GPUs whose results no other case checks.

#include <memory>
#include <thread>

#include "gpu_problem.h"

namespace {

using namespace fwl;
using namespace fwl::test;
using gpu::Activation;

constexpr Activation kActivations[] = {Activation::kFloat32, Activation::kFloat16,
                                       Activation::kBFloat16};

void check_results(int sm) {
  constexpr int64_t kSizes[][4] = {{1, 1, 64, 48}, {3, 1, 37, 130}, {600, 1, 3, 5},
                                   {2, 5, 16, 32}, {1, 200, 80, 7}, {2, 130, 129, 33}};
  fake::driver().sm = sm;
  for (const Activation activation : kActivations) {
    for (const auto& [rows, tokens, size_k, size_v] : kSizes) {
      for (const bool in_place : {false, true}) {
        const gpu::Sizes sizes{rows, tokens, size_k, size_v, activation};
        Problem problem(sizes, 7);
        problem.keep_reference();
        if (in_place) {
          gpu::launch(sizes, problem.tensors(in_place), nullptr);
        } else {
          std::vector<char> workspace(gpu::workspace_bound(sizes), '\xff');
          gpu::launch(sizes, problem.tensors(in_place), workspace.data(), nullptr);
        }
        problem.check(in_place);
      }
    }
  }
  CHECK(fake::driver().allocated.empty()); // workspaces are freed
}

TEST_CASE_METHOD(FakeDriver, "threads load the same kernels and launch on memory of their own",
                 "[threads]") {
  driver.sm = 86;
  const size_t loaded = driver.loaded;
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 8; ++i) {
    const gpu::Sizes sizes{2, i % 2 ? 1 : 40, 24, 40, kActivations[i / 2 % 3]};
    problems.push_back(std::make_unique<Problem>(sizes, i));
    problems.back()->keep_reference();
  }
  for (const auto& problem : problems) {
    threads.emplace_back([&] {
      gpu::prepare(problem->sizes);
      gpu::launch(problem->sizes, problem->tensors(false), nullptr);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const auto& problem : problems) {
    problem->check(false);
  }
  const size_t again = driver.loaded;
  CHECK(again > loaded);
  for (const auto& problem : problems) {
    gpu::prepare(problem->sizes);
  }
  CHECK(driver.loaded == again);
  check_results(86);
}

TEST_CASE_METHOD(FakeDriver, "after prepare a launch loads nothing") {
  driver.sm = 90;
  const gpu::Sizes sizes{1, 100, 64, 64, Activation::kBFloat16};
  const size_t before = driver.loaded, prepared = driver.prepared;
  gpu::prepare(sizes);
  const size_t loaded = driver.loaded;
  CHECK(loaded > before);
  CHECK(driver.prepared > prepared); // prepare loads code into the context
  Problem problem(sizes, 1);
  gpu::launch(sizes, problem.tensors(false), nullptr);
  CHECK(driver.loaded == loaded);
  check_results(90);
}

// Matches an exception of a type whose message contains these words.
template <class Error> auto says(const std::string& words) {
  return Catch::Predicate<Error>(
      [=](const Error& error) {
        return std::string(error.what()).find(words) != std::string::npos;
      },
      "says '" + words + "'");
}

TEST_CASE_METHOD(FakeDriver,
                 "errors name the function of the driver that failed, and nothing leaks") {
  const auto launch = [](int64_t rows, int64_t tokens, int64_t size_k) {
    const gpu::Sizes sizes{rows, tokens, size_k, 24, Activation::kFloat16};
    Problem problem(sizes, 1);
    gpu::launch(sizes, problem.tensors(false), nullptr);
  };
  driver.sm = 70;
  CHECK_THROWS_MATCHES(launch(1, 1, 8), gpu::DriverError,
                       says<gpu::DriverError>("capability is 7.0, and they need 7.5"));
  driver.sm = 100;
  for (const std::string function : {"cuCtxGetDevice", "cuLibraryLoadData", "cuLibraryGetKernel",
                                     "cuMemAllocAsync", "cuLaunchKernel"}) {
    CAPTURE(function);
    driver.failing = function;
    const size_t loaded = driver.loaded;
    CHECK_THROWS_MATCHES(launch(1, 3, 8), gpu::DriverError,
                         says<gpu::DriverError>(function + " failed: "));
    CHECK(driver.allocated.empty());
    if (function != "cuLaunchKernel") {
      CHECK(driver.loaded == loaded);
    }
  }
  driver.failing = "";
  CHECK_NOTHROW(launch(1, 3, 8)); // the next call succeeds again
  check_results(100);
}

TEST_CASE("sizes that no kernel supports are refused") {
  for (const gpu::Sizes& sizes :
       {gpu::Sizes{0, 1, 1, 1, Activation::kFloat32}, gpu::Sizes{1, 0, 1, 1, Activation::kFloat32},
        gpu::Sizes{1, 1, 1 << 16, 1 << 15, Activation::kFloat32}}) {
    CHECK_THROWS_MATCHES(gpu::make_plan(sizes, 89, true), std::invalid_argument,
                         says<std::invalid_argument>("expected "));
  }
}

TEST_CASE_METHOD(FakeDriver, "each GPU runs its own kernels, or others that it supports") {
  constexpr struct {
    int device;
    int kernels;
    bool ptx;
  } kCases[] = {{75, 75, false}, {80, 80, false},   {86, 86, false},   {87, 86, false},
                {89, 89, false}, {90, 90, false},   {100, 100, false}, {103, 89, true},
                {110, 89, true}, {120, 120, false}, {121, 89, true},   {130, 89, true}};
  for (const auto& [device, kernels, ptx] : kCases) {
    CAPTURE(device);
    const gpu::Sizes sizes{1, 1, 32, 32, Activation::kFloat16};
    Problem problem(sizes, 1);
    driver.sm = device;
    driver.launched.clear();
    int stream = 0;
    gpu::launch(sizes, problem.tensors(false), &stream);
    CHECK_FALSE(driver.launched.empty());
    for (const fake::Launched& each : driver.launched) {
      CHECK(each.variant->sm == kernels);
      CHECK(each.ptx == ptx);
      CHECK(each.stream == &stream);
    }
  }
}

TEST_CASE_METHOD(FakeDriver, "pointers that are not aligned run kernels without wide loads") {
  driver.sm = 80;
  const gpu::Sizes sizes{1, 1, 64, 64, Activation::kFloat32};
  for (const size_t shift : {0, 4}) {
    CAPTURE(shift);
    Problem problem(sizes, 2);
    gpu::Tensors tensors = problem.tensors(false);
    std::vector<char> key(problem.key.size() + 16 + shift);
    char* const start = key.data() + (16 - reinterpret_cast<uintptr_t>(key.data()) % 16) % 16;
    std::copy(problem.key.begin(), problem.key.end(), start + shift);
    tensors.key = start + shift;
    problem.keep_reference();
    driver.launched.clear();
    gpu::launch(sizes, tensors, nullptr);
    problem.check(false);
    REQUIRE_FALSE(driver.launched.empty());
    CHECK(driver.launched[0].variant->aligned == (shift == 0));
  }
}

TEST_CASE_METHOD(FakeDriver, "the other GPUs' kernels compute the op") {
  for (const int sm : {75, 80, 89, 120, 121}) {
    check_results(sm);
  }
}

TEST_CASE_METHOD(FakeDriver,
                 "a long text runs in segments, each of which continues the one before") {
  const gpu::Sizes sizes{2, 5000, 4, 1024, Activation::kFloat32};
  Problem problem(sizes, 3);
  problem.keep_reference();
  gpu::launch(sizes, problem.tensors(false), nullptr);
  CHECK(driver.launched.size() == 4); // two kernels per segment
  problem.check(false);
}

TEST_CASE("no plan needs a larger workspace than workspace_bound says") {
  std::mt19937 generator(5);
  for (int i = 0; i < 300; ++i) {
    const auto below = [&](int64_t limit) {
      return 1 + static_cast<int64_t>(generator() % static_cast<unsigned>(limit));
    };
    const gpu::Sizes largest{below(40), below(3000), below(2000), below(2000),
                             kActivations[generator() % 3]};
    const size_t bound = gpu::workspace_bound(largest);
    for (const gpu::Multiprocessors& each : gpu::multiprocessors) {
      const gpu::Sizes sizes{below(largest.rows), below(largest.tokens), largest.size_k,
                             largest.size_v, largest.activation};
      for (const bool aligned : {true, false}) {
        CAPTURE(each.sm, sizes.rows, sizes.tokens, sizes.size_k, sizes.size_v, sizes.activation);
        CHECK(gpu::make_plan(sizes, each.sm, aligned).workspace_bytes <= bound);
      }
    }
  }
}

} // namespace

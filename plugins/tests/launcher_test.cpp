// The launcher against a double of the CUDA driver: which kernels run on which GPU, that their
// arguments are in order, and what errors of the driver become.
//
// With the argument `plan` it prints the plans of the sizes on its standard input, which a Python
// test compares with plan.py; with `threads` it runs only what uses several threads.

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <thread>

#include "gpu_problem.h"

namespace {

using namespace fwl;
using namespace fwl::test;
using gpu::Activation;

constexpr Activation kActivations[] = {Activation::kFloat32, Activation::kFloat16,
                                       Activation::kBFloat16};

std::string name_of(const gpu::Sizes& sizes, int sm) {
  return "B " + std::to_string(sizes.rows) + ", T " + std::to_string(sizes.tokens) + ", Dk " +
         std::to_string(sizes.size_k) + ", Dv " + std::to_string(sizes.size_v) + ", type " +
         std::to_string(static_cast<int>(sizes.activation)) + ", SM " + std::to_string(sm);
}

void test_results() {
  constexpr int64_t kSizes[][4] = {{1, 1, 64, 48}, {3, 1, 37, 130}, {600, 1, 3, 5},
                                   {2, 5, 16, 32}, {1, 200, 80, 7}, {2, 130, 129, 33}};
  for (const int sm : {75, 80, 86, 89, 90, 100, 120, 121}) {
    for (const Activation activation : kActivations) {
      for (const auto& [rows, tokens, size_k, size_v] : kSizes) {
        for (const bool in_place : {false, true}) {
          const gpu::Sizes sizes{rows, tokens, size_k, size_v, activation};
          fake::driver().sm = sm;
          Problem problem(sizes, 7);
          problem.keep_reference();
          if (in_place) {
            gpu::launch(sizes, problem.tensors(in_place), nullptr);
          } else {
            std::vector<char> workspace(gpu::workspace_bound(sizes), '\xff');
            gpu::launch(sizes, problem.tensors(in_place), workspace.data(), nullptr);
          }
          problem.check(name_of(sizes, sm), in_place);
        }
      }
    }
  }
  expect(fake::driver().allocated.empty(), "workspaces are not given back");
}

// A text that is longer than a segment: later segments go on from what the first wrote.
void test_segments() {
  fake::driver().sm = 89;
  const gpu::Sizes sizes{2, 5000, 4, 1024, Activation::kFloat32};
  Problem problem(sizes, 3);
  problem.keep_reference();
  fake::driver().launched.clear();
  gpu::launch(sizes, problem.tensors(false), nullptr);
  expect(fake::driver().launched.size() == 4, "a long text is not run in two segments");
  problem.check("two segments", false);
}

void test_which_kernels() {
  constexpr struct {
    int device;
    int kernels;
    bool ptx;
  } kCases[] = {{75, 75, false}, {80, 80, false},   {86, 86, false},   {87, 86, false},
                {89, 89, false}, {90, 90, false},   {100, 100, false}, {103, 89, true},
                {110, 89, true}, {120, 120, false}, {121, 89, true},   {130, 89, true}};
  for (const auto& [device, kernels, ptx] : kCases) {
    const gpu::Sizes sizes{1, 1, 32, 32, Activation::kFloat16};
    Problem problem(sizes, 1);
    fake::driver().sm = device;
    fake::driver().launched.clear();
    int stream = 0;
    gpu::launch(sizes, problem.tensors(false), &stream);
    for (const fake::Launched& each : fake::driver().launched) {
      expect(each.variant->sm == kernels && each.ptx == ptx && each.stream == &stream,
             "SM " + std::to_string(device) + " runs kernels of SM " +
                 std::to_string(each.variant->sm));
    }
    expect(!fake::driver().launched.empty(), "nothing was launched");
  }
}

void test_unaligned_pointers() {
  fake::driver().sm = 80;
  const gpu::Sizes sizes{1, 1, 64, 64, Activation::kFloat32};
  for (const size_t shift : {0, 4}) {
    Problem problem(sizes, 2);
    gpu::Tensors tensors = problem.tensors(false);
    std::vector<char> key(problem.key.size() + 16 + shift);
    char* const start = key.data() + (16 - reinterpret_cast<uintptr_t>(key.data()) % 16) % 16;
    std::copy(problem.key.begin(), problem.key.end(), start + shift);
    tensors.key = start + shift;
    problem.keep_reference();
    fake::driver().launched.clear();
    gpu::launch(sizes, tensors, nullptr);
    problem.check("shifted by " + std::to_string(shift), false);
    expect(fake::driver().launched[0].variant->aligned == (shift == 0),
           "pointers shifted by " + std::to_string(shift) + " take the wrong kernel");
  }
}

void test_prepare() {
  fake::driver().sm = 90;
  const gpu::Sizes sizes{1, 100, 64, 64, Activation::kBFloat16};
  gpu::prepare(sizes);
  const size_t loaded = fake::driver().loaded;
  Problem problem(sizes, 1);
  gpu::launch(sizes, problem.tensors(false), nullptr);
  expect(fake::driver().loaded == loaded, "a launch loads code although it was prepared");
  expect(fake::driver().prepared > 0, "prepare does not load code into the context");
}

template <class Error, class Function>
void expect_error(const Function& function, const std::string& words) {
  try {
    function();
    expect(false, "no error: " + words);
  } catch (const Error& error) {
    expect(std::string(error.what()).find(words) != std::string::npos,
           std::string("'") + error.what() + "' does not say '" + words + "'");
  }
}

void test_errors() {
  // Sizes whose kernels nothing has loaded yet.
  const auto launch = [](int64_t rows, int64_t tokens, int64_t size_k) {
    const gpu::Sizes sizes{rows, tokens, size_k, 24, Activation::kFloat16};
    Problem problem(sizes, 1);
    gpu::launch(sizes, problem.tensors(false), nullptr);
  };
  fake::Driver& driver = fake::driver();
  driver.sm = 70;
  expect_error<gpu::DriverError>([&] { launch(1, 1, 8); }, "capability is 7.0, and they need 7.5");
  driver.sm = 100;
  for (const char* function : {"cuCtxGetDevice", "cuLibraryLoadData", "cuLibraryGetKernel",
                               "cuMemAllocAsync", "cuLaunchKernel"}) {
    driver.failing = function;
    const size_t loaded = driver.loaded;
    expect_error<gpu::DriverError>([&] { launch(1, 3, 8); }, std::string(function) + " failed: ");
    expect(driver.allocated.empty(), std::string(function) + ": the workspace is lost");
    expect(driver.loaded == loaded || driver.failing == "cuLaunchKernel",
           std::string(function) + ": a library is lost");
  }
  driver.failing = "";
  launch(1, 3, 8); // an error is not for ever
  for (const gpu::Sizes& sizes :
       {gpu::Sizes{0, 1, 1, 1, Activation::kFloat32}, gpu::Sizes{1, 0, 1, 1, Activation::kFloat32},
        gpu::Sizes{1, 1, 1 << 16, 1 << 15, Activation::kFloat32}}) {
    expect_error<std::invalid_argument>([&] { gpu::make_plan(sizes, 89, true); }, "expected ");
  }
}

void test_workspace_bound() {
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
        expect(gpu::make_plan(sizes, each.sm, aligned).workspace_bytes <= bound,
               name_of(sizes, each.sm) + ": the workspace is larger than promised");
      }
    }
  }
}

// Threads that load the same kernels and launch on memory of their own.
void test_threads() {
  fake::driver().sm = 86;
  const size_t loaded = fake::driver().loaded;
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
    problem->check("8 threads", false);
  }
  const size_t again = fake::driver().loaded;
  expect(again > loaded, "nothing was loaded");
  for (const auto& problem : problems) {
    gpu::prepare(problem->sizes);
  }
  expect(fake::driver().loaded == again, "a kernel was loaded twice");
}

int print_plans() {
  int64_t rows, tokens, size_k, size_v;
  int activation, sm, aligned;
  while (std::cin >> rows >> tokens >> size_k >> size_v >> activation >> sm >> aligned) {
    const gpu::Plan plan =
        gpu::make_plan({rows, tokens, size_k, size_v, kActivations[activation]}, sm, aligned != 0);
    std::cout << plan.workspace_bytes;
    for (const gpu::Launch& each : plan.launches) {
      std::cout << " | " << each.variant->symbol << ' ' << each.variant->aligned << ' '
                << each.variant->split << ' ' << each.grid << ' ' << each.first_segment;
      for (const gpu::Parameter parameter :
           gpu::signatures[static_cast<size_t>(each.variant->kernel)]) {
        if (parameter >= gpu::kFirstSize) {
          std::cout << ' ' << each.scalars[static_cast<size_t>(parameter)];
        }
      }
    }
    std::cout << '\n';
  }
  return EXIT_SUCCESS;
}

} // namespace

int main(int count, char** arguments) {
  const std::string part = count > 1 ? arguments[1] : "";
  if (part == "plan") {
    return print_plans();
  }
  fake::driver().images = gpu::fwl_gpu_images;
  test_threads();
  if (part == "threads") {
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  test_errors();
  test_which_kernels();
  test_unaligned_pointers();
  test_prepare();
  test_results();
  test_segments();
  test_workspace_bound();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

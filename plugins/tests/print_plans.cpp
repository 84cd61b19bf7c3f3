// Reads sizes from standard input and prints the plan for each line, which a test in Python
// compares with plan.py.

#include <iostream>

#include "kernels/gpu/launcher/plan.h"

int main() {
  using namespace fwl;
  constexpr gpu::Activation kActivations[] = {gpu::Activation::kFloat32, gpu::Activation::kFloat16,
                                              gpu::Activation::kBFloat16};
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
}

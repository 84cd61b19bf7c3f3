// TensorRT for tests of what runs engines: it takes the engines that `engine_text` writes, computes
// on the CPU what ./sum_model.h does, and refuses calls in an order that TensorRT would refuse.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fwl::fake {

struct TensorRt {
  int32_t version = 101401;
  std::string failing;     // a function that fails
  long enqueues_left = -1; // until one fails; negative: none does
  std::vector<std::string> violations;
  int runtimes = 0, engines = 0, contexts = 0;
};

// An engine: rows and tokens are the most that it takes.
inline std::string engine_text(int rows, int tokens, bool in_place = false, bool plugin = false,
                               bool embedded = false, bool other_type = false) {
  std::string text = "double";
  for (const int value :
       {rows, tokens, int{in_place}, int{plugin}, int{embedded}, int{other_type}}) {
    text += " " + std::to_string(value);
  }
  return text;
}

} // namespace fwl::fake

extern "C" fwl::fake::TensorRt* fwl_fake_tensorrt();

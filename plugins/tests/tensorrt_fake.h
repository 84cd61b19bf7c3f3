// A fake TensorRT for tests of code that runs engines. It loads the engines that `engine_text`
// writes, computes the model of ./sum_model.h on the CPU, and fails where TensorRT would fail.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fwl::fake {

struct TensorRt {
  int32_t version = 101401;
  std::string failing;     // name of the function that fails
  long enqueues_left = -1; // enqueues that succeed before one fails; negative: none fails
  std::vector<std::string> violations; // wrong uses that no return value reports
  int runtimes = 0, engines = 0, contexts = 0;
};

// Returns the content of an engine file. `rows` and `tokens` are the largest sizes of its profiles.
inline std::string engine_text(int rows, int tokens, bool in_place = false, bool plugin = false,
                               bool embedded = false, bool other_type = false) {
  std::string text = "fake";
  for (const int value :
       {rows, tokens, int{in_place}, int{plugin}, int{embedded}, int{other_type}}) {
    text += " " + std::to_string(value);
  }
  return text;
}

} // namespace fwl::fake

extern "C" fwl::fake::TensorRt* fwl_fake_tensorrt();

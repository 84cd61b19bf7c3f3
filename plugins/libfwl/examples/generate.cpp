// Continues a prompt of token ids, always with the most likely token.
//
//     generate BUNDLE COUNT ID...
//
// Set FWL_RUNTIME to the path of libonnxruntime.so if it is not where dlopen finds it.

#include <algorithm>
#include <cstdlib>
#include <iostream>

#include "fwl/fwl.hpp"

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: generate BUNDLE COUNT ID...\n";
    return 2;
  }
  try {
    fwl::Options options;
    if (const char* runtime = std::getenv("FWL_RUNTIME")) {
      options.runtime_library = runtime;
    }
    const fwl::Model model(arguments[1], options);
    fwl::Session session = model.session();
    std::vector<int64_t> ids;
    for (int i = 3; i < count; ++i) {
      ids.push_back(std::stoll(arguments[i]));
    }
    for (int left = std::stoi(arguments[2]); left > 0; --left) {
      const std::vector<float> logits = session.feed(ids); // reads, learns, predicts
      ids = {std::max_element(logits.begin(), logits.end()) - logits.begin()};
      std::cout << ids[0] << (left > 1 ? ' ' : '\n') << std::flush;
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}

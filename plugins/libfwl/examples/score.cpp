// Prints the perplexity of a text while the model learns from it. FILE holds the token ids as
// numbers separated by white space.
//
//     score BUNDLE FILE [STATE]
//
// Set FWL_RUNTIME to the path of libonnxruntime.so if it is not where dlopen finds it.
//
// With STATE, it starts from the state in that file, if it exists, and saves the state there at the
// end.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

#include "fwl/fwl.hpp"

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::cerr << "usage: score BUNDLE FILE [STATE]\n";
    return 2;
  }
  try {
    fwl::Options options;
    if (const char* runtime = std::getenv("FWL_RUNTIME")) {
      options.runtime_library = runtime;
    }
    const fwl::Model model(arguments[1], options);
    fwl::Session session = model.session();
    const std::string state = count == 4 ? arguments[3] : "";
    if (!state.empty() && std::ifstream(state)) {
      session.load_state(state);
    }
    std::ifstream file(arguments[2]);
    const std::vector<int64_t> ids(std::istream_iterator<int64_t>(file), {});
    const size_t vocabulary = session.vocab_size();
    if (!file.eof() || ids.size() < 2) {
      throw std::runtime_error(std::string("'") + arguments[2] +
                               "' does not hold 2 or more token ids, separated by white space");
    }
    for (const int64_t id : ids) { // also the last one, which is predicted but never read
      if (id < 0 || id >= static_cast<int64_t>(vocabulary)) {
        throw std::runtime_error("token id " + std::to_string(id) + " is out of range");
      }
    }
    const auto chunk = static_cast<size_t>(model.info().max_tokens);
    double loss = 0;
    for (size_t start = 0; start + 1 < ids.size(); start += chunk) {
      const size_t end = std::min(start + chunk, ids.size() - 1);
      const std::vector<float> logits = session.feed(
          {ids.begin() + static_cast<ptrdiff_t>(start), ids.begin() + static_cast<ptrdiff_t>(end)},
          FWL_LOGITS_ALL);
      for (size_t i = start; i < end; ++i) {
        const float* const row = logits.data() + (i - start) * vocabulary;
        const double top = *std::max_element(row, row + vocabulary);
        double sum = 0;
        for (size_t v = 0; v < vocabulary; ++v) {
          sum += std::exp(row[v] - top);
        }
        loss += top + std::log(sum) - row[ids[i + 1]];
      }
    }
    if (!state.empty()) {
      session.save_state(state);
    }
    std::printf("%.9g\n", std::exp(loss / static_cast<double>(ids.size() - 1)));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}

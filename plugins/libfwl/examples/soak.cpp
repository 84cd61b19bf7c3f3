// Runs for a long time and checks that memory grows by less than 1 %: first decode steps in one
// session, then rounds of opening, feeding, resetting and closing a session. Exits with 1 if memory
// grows.
//
//     soak BUNDLE STEPS ROUNDS
//
// Set FWL_RUNTIME to the path of libonnxruntime.so if it is not where dlopen finds it.

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fwl/fwl.hpp"

namespace {

constexpr double kMaxGrowth = 0.01;

struct Memory {
  double resident = 0;  // MB
  double anonymous = 0; // MB, a part of it: leaks add to this; the rest are pages of files
};

// Reads smaps_rollup, which is exact; the counters in status and statm lag behind.
Memory memory_now() {
  Memory memory;
  std::ifstream rollup("/proc/self/smaps_rollup");
  std::string line;
  while (std::getline(rollup, line)) {
    std::istringstream words(line);
    std::string name;
    double kibibytes = 0;
    words >> name >> kibibytes;
    if (name == "Rss:") {
      memory.resident = kibibytes * 1024 / 1e6;
    } else if (name == "Anonymous:") {
      memory.anonymous = kibibytes * 1024 / 1e6;
    }
  }
  if (memory.resident == 0) {
    throw std::runtime_error(
        "cannot read /proc/self/smaps_rollup, which needs Linux 4.14 or newer");
  }
  return memory;
}

// Prints the maximum and the value after a tenth of the run, when everything is warm. Returns
// whether the growth is small enough.
bool report(const char* which, double early, double highest) {
  const double growth = highest / early - 1;
  std::cout << "  " << which << ": " << early << " MB after a tenth, at most " << highest
            << " MB later (" << 100 * growth << " %)" << std::endl;
  return growth < kMaxGrowth;
}

// Calls a function `count` times and measures memory after each tenth. Returns whether it stayed
// flat.
template <class Function> bool watch(const char* what, long count, const Function& function) {
  const auto began = std::chrono::steady_clock::now();
  Memory early, highest;
  for (long i = 0; i < count; ++i) {
    function(i);
    if (const long done = i + 1; done * 10 / count > i * 10 / count) {
      const Memory now = memory_now();
      if (early.resident == 0) {
        early = now;
      }
      highest.resident = std::max(highest.resident, now.resident);
      highest.anonymous = std::max(highest.anonymous, now.anonymous);
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  std::cout << what << ": " << count << " in " << seconds.count() << " s" << std::endl;
  const bool flat = report("resident", early.resident, highest.resident);
  return report("anonymous", early.anonymous, highest.anonymous) && flat;
}

} // namespace

int main(int count, char** arguments) {
  const long steps = count == 4 ? std::atol(arguments[2]) : 0;
  const long rounds = count == 4 ? std::atol(arguments[3]) : 0;
  if (steps < 1 || rounds < 1) {
    std::cerr << "usage: soak BUNDLE STEPS ROUNDS\n";
    return 2;
  }
  try {
    fwl::Options options;
    options.threads = 1;
    if (const char* runtime = std::getenv("FWL_RUNTIME")) {
      options.runtime_library = runtime;
    }
    const fwl::Model model(arguments[1], options);
    const int64_t vocabulary = model.info().vocab_size;
    fwl::Session session = model.session();
    const bool read =
        watch("steps", steps, [&](long i) { session.feed({(i * 31 + i / 7) % vocabulary}); });
    const bool opened = watch("rounds", rounds, [&](long i) {
      fwl::Session other = model.session();
      other.feed({i % vocabulary, (i + 1) % vocabulary});
      other.reset();
    });
    return read && opened ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}

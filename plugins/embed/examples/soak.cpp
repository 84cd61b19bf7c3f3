// Runs long and says whether memory stays where it is: decode steps in one session, then rounds of
// opening, feeding, resetting and closing sessions.
//
//   soak BUNDLE STEPS ROUNDS        FWL_RUNTIME=path of libonnxruntime.so

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include <unistd.h>

#include "fwl/fwl.hpp"

namespace {

double resident_megabytes() {
  size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6;
}

// Runs `count` times, and prints the memory after a tenth, when all is warm, and at the end.
template <class Function> void watch(const char* what, long count, const Function& function) {
  const auto began = std::chrono::steady_clock::now();
  double early = 0;
  for (long i = 0; i < count; ++i) {
    function(i);
    if (i == count / 10) {
      early = resident_megabytes();
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  const double late = resident_megabytes();
  std::cout << what << ": " << count << " in " << seconds.count() << " s, resident " << early
            << " MB after a tenth, " << late << " MB at the end (" << 100 * (late / early - 1)
            << " %)" << std::endl;
}

} // namespace

int main(int count, char** arguments) {
  if (count != 4) {
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
    watch("steps", std::atol(arguments[2]),
          [&](long i) { session.feed({(i * 31 + i / 7) % vocabulary}); });
    watch("rounds", std::atol(arguments[3]), [&](long i) {
      fwl::Session other = model.session();
      other.feed({i % vocabulary, (i + 1) % vocabulary});
      other.reset();
    });
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}

// A fuzzer for compilers without libFuzzer: changes the seeds at random and counts what the reader
// makes of them. It prints one line of JSON, and writes an input that it cannot survive to
// `crash-<name>`.
//
//     fuzz_state [--inputs N] [--seed N] [--fail crash|hang|memory] [FILE...]
//
// FILEs are further seeds; with `--inputs 0` each of them is read once as it is. `--fail` does what
// the fuzzer is to notice.

#include <sys/time.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "target.h"

extern "C" void __sanitizer_set_death_callback(void (*callback)());

// No input may ask for a gigabyte at once.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_allocation_size_mb=1024:allocator_may_return_null=0:handle_abort=1:"
         "quarantine_size_mb=64";
}

namespace {

constexpr int kSecondsPerInput = 10;
constexpr size_t kLongest = 1 << 16;
constexpr long kMostKilobytes = 1 << 20; // of the whole process, which includes the sanitizer's own

std::string current;      // the input that is being read
std::string crash_file;   // where it goes
const char* verdict = ""; // why, if that is known

void save_current() {
  std::FILE* const file = std::fopen(crash_file.c_str(), "wb");
  if (file != nullptr) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
  }
  std::fprintf(stderr, "%s; the input is in %s\n", verdict, crash_file.c_str());
}

void stop_hang(int) {
  verdict = "it hangs";
  std::abort();
}

void set_timer(int seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_REAL, &timer, nullptr);
}

class Mutator {
public:
  Mutator(std::vector<std::string> seeds, uint64_t seed)
      : seeds_(std::move(seeds)), words_(fwl::fuzz::words()), generator_(seed) {}

  std::string next() {
    std::string content = seeds_[below(seeds_.size())];
    for (size_t changes = 1 + below(below(4) == 0 ? 16 : 3); changes > 0; --changes) {
      change(content);
    }
    if (content.size() > kLongest) {
      content.resize(kLongest);
    }
    return below(2) == 0 ? content : fwl::fuzz::repaired(content);
  }

private:
  size_t below(size_t count) { return count == 0 ? 0 : generator_() % count; }

  // Returns the start of a range of the content, and its length in `size`.
  size_t range(const std::string& content, size_t& size) {
    const size_t first = below(content.size() + 1);
    size = std::min(content.size() - first, below(4) == 0 ? below(400) : below(12));
    return first;
  }

  void change(std::string& content) {
    size_t size = 0;
    const size_t first = range(content, size);
    const size_t other = below(content.size() + 1);
    const std::string& donor = seeds_[below(seeds_.size())];
    switch (below(10)) {
    case 0:
      content.erase(first, size);
      break;
    case 1:
      content.insert(other, content.substr(first, size));
      break;
    case 2:
      content.insert(first, donor.substr(below(donor.size()), below(200)));
      break;
    case 3:
      content.resize(first);
      break;
    case 4: // exchange the ends of two files
      content = content.substr(0, first) + donor.substr(below(donor.size()));
      break;
    case 5:
      content.insert(first, words_[below(words_.size())]);
      break;
    case 6:
      content.replace(first, size, words_[below(words_.size())]);
      break;
    case 7:
      change_number(content, first);
      break;
    default:
      if (first < content.size()) {
        content[first] = below(2) == 0 ? static_cast<char>(below(256))
                                       : static_cast<char>(content[first] ^ (1 << below(8)));
      }
    }
  }

  // Replaces the next decimal number of a text.
  void change_number(std::string& content, size_t first) {
    constexpr const char* kNumbers[] = {"0",
                                        "1",
                                        "-1",
                                        "2",
                                        "4",
                                        "255",
                                        "65536",
                                        "2147483647",
                                        "4294967296",
                                        "9007199254740993",
                                        "9223372036854775807",
                                        "18446744073709551615",
                                        "1e308",
                                        "1e999",
                                        "1.5",
                                        "1000000000000000000000"};
    const size_t start = content.find_first_of("0123456789", first);
    if (start != std::string::npos) {
      const size_t end = content.find_first_not_of("0123456789", start);
      content.replace(start, end == std::string::npos ? end : end - start,
                      kNumbers[below(std::size(kNumbers))]);
    }
  }

  std::vector<std::string> seeds_;
  std::vector<std::string> words_;
  std::mt19937_64 generator_;
};

std::string content_of(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

// Does what no reader should, if the user asks for it.
void fail(const std::string& kind) {
  if (kind == "crash") {
    volatile size_t past_the_end = current.capacity() + 1;
    current.data()[past_the_end] = 'x';
  } else if (kind == "hang") {
    pause();
  } else if (kind == "memory") {
    const std::string large(size_t{1100} << 20, 'x');
    current = large.substr(0, 1);
  }
}

// Returns the most memory that this process has had. getrusage would count that of the process
// which started it too.
long peak_kilobytes() {
  std::ifstream status("/proc/self/status");
  long peak = 0;
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) {
      peak = std::atol(line.c_str() + std::strlen("VmHWM:"));
    }
  }
  return peak;
}

bool read_one(std::string content, const std::string& failure = "") {
  current = std::move(content);
  set_timer(kSecondsPerInput);
  fail(failure);
  const bool accepted = fwl::fuzz::accepts(current);
  set_timer(0);
  return accepted;
}

} // namespace

int main(int count, char** arguments) {
  const char* const slash = std::strrchr(arguments[0], '/');
  const std::string name = slash != nullptr ? slash + 1 : arguments[0];
  crash_file = "crash-" + name;
  verdict = "it crashes";
  std::signal(SIGALRM, stop_hang);
  __sanitizer_set_death_callback(save_current);
  long inputs = 10000;
  uint64_t seed = 16;
  std::string failure;
  std::vector<std::string> given;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--inputs") == 0 && i + 1 < count) {
      inputs = std::atol(arguments[++i]);
    } else if (std::strcmp(arguments[i], "--seed") == 0 && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else if (std::strcmp(arguments[i], "--fail") == 0 && i + 1 < count) {
      failure = arguments[++i];
    } else {
      given.push_back(content_of(arguments[i]));
    }
  }
  std::vector<std::string> seeds = fwl::fuzz::seeds();
  for (const std::string& good : seeds) {
    if (!read_one(good)) {
      std::fprintf(stderr, "%s: a good file was refused\n", name.c_str());
      return 1;
    }
  }
  long accepted = 0, refused = 0;
  for (const std::string& content : given) {
    ++(read_one(content) ? accepted : refused);
  }
  seeds.insert(seeds.end(), given.begin(), given.end());
  Mutator mutator(seeds, seed);
  for (long i = 0; i < inputs; ++i) {
    ++(read_one(mutator.next(), failure) ? accepted : refused);
  }
  const long peak = peak_kilobytes();
  std::printf("{\"target\": \"%s\", \"inputs\": %ld, \"refused\": %ld, \"accepted\": %ld, "
              "\"crashes\": 0, \"hangs\": 0, \"peak_mib\": %ld}\n",
              name.c_str(), accepted + refused, refused, accepted, peak / 1024);
  return peak > kMostKilobytes ? 1 : 0;
}

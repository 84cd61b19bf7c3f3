// What a fuzz target provides: a reader of one kind of file, and files to start from.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fwl::fuzz {

// Returns whether the reader accepts a file with this content. A crash, or an exception other than
// the reader's own errors, is what the fuzzer looks for.
bool accepts(std::string_view content);

// Good files, which the fuzzer changes.
std::vector<std::string> seeds();

// Texts that mean something to the reader; the fuzzer inserts them.
std::vector<std::string> words();

// Mends what random changes break, such as a checksum, so that the rest of the reader is reached.
// Returns the content as it is if that cannot be done.
std::string repaired(std::string_view content);

// A file in a temporary folder of this process, for readers that take a path.
class Scratch {
public:
  explicit Scratch(const std::string& name);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void write(std::string_view content);
  const std::string& path() const { return path_; }
  const std::string& folder() const { return folder_; }

private:
  std::string folder_;
  std::string path_;
  int file_ = -1;
};

} // namespace fwl::fuzz

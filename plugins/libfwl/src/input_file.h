// Files that somebody else wrote, opened for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fwl::internal {

// A regular file, open for reading. Opening and reading never wait: a pipe, a device or a socket is
// not opened at all. The file is read, not mapped, so that a process that truncates it meanwhile
// does no harm.
class InputFile {
public:
  // If the file cannot be opened, `reason` says why.
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  bool is_open() const { return file_ >= 0; }
  bool is_missing() const { return missing_; } // there is nothing at the path
  const std::string& reason() const { return reason_; }
  // The file's size when it was opened, in bytes.
  uint64_t size() const { return size_; }
  // Reads exactly the next `size` bytes. Returns false if the file ends before, or on an error.
  bool read(char* target, size_t size);
  // Returns whether all bytes were read.
  bool is_at_end();

private:
  int file_ = -1;
  bool missing_ = false;
  uint64_t size_ = 0;
  std::string reason_;
};

} // namespace fwl::internal

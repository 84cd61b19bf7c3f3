#include "input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace fwl::internal {

InputFile::InputFile(const std::string& path) {
  // Looked at before it is opened, which does something on some devices, and again afterwards,
  // because another file may have taken its place.
  struct stat found{};
  if (stat(path.c_str(), &found) != 0) {
    missing_ = errno == ENOENT || errno == ENOTDIR;
    reason_ = std::strerror(errno);
    return;
  }
  if (S_ISREG(found.st_mode)) {
    file_ = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (file_ < 0 || fstat(file_, &found) != 0) {
      reason_ = std::strerror(errno);
    }
  }
  if (!S_ISREG(found.st_mode)) {
    reason_ = S_ISDIR(found.st_mode) ? "it is a folder" : "it is not a regular file";
  }
  if (!reason_.empty() && file_ >= 0) {
    close(file_);
    file_ = -1;
  }
  size_ = static_cast<uint64_t>(found.st_size);
}

InputFile::~InputFile() {
  if (file_ >= 0) {
    close(file_);
  }
}

bool InputFile::read(char* target, size_t size) {
  while (size > 0) {
    const ssize_t count = ::read(file_, target, size);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count <= 0) {
      return false;
    }
    target += count;
    size -= static_cast<size_t>(count);
  }
  return true;
}

bool InputFile::is_at_end() {
  char more;
  return !read(&more, 1);
}

} // namespace fwl::internal

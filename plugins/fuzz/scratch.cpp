#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "target.h"

namespace fwl::fuzz {

Scratch::Scratch(const std::string& name) {
  // In memory if possible: on a disk, writing takes most of the time.
  const char* const given = std::getenv("TMPDIR");
  const char* const usual = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  folder_ = std::string(given != nullptr ? given : usual) + "/fwl-fuzz-XXXXXX";
  if (mkdtemp(folder_.data()) == nullptr) {
    throw std::runtime_error("cannot make the folder " + folder_);
  }
  path_ = folder_ + "/" + name;
  file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file_ < 0) {
    throw std::runtime_error("cannot make the file " + path_);
  }
}

Scratch::~Scratch() {
  close(file_);
  unlink(path_.c_str());
  rmdir(folder_.c_str());
}

void Scratch::write(std::string_view content) {
  if (ftruncate(file_, 0) != 0 ||
      pwrite(file_, content.data(), content.size(), 0) != static_cast<ssize_t>(content.size())) {
    throw std::runtime_error("cannot write the file " + path_);
  }
}

} // namespace fwl::fuzz

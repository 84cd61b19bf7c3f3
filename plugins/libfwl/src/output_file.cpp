#include "output_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "error.h"

namespace fwl::internal {
namespace {

namespace fs = std::filesystem;

constexpr char kFolder[] = ".fwl-XXXXXX"; // a pattern of mkdtemp
constexpr char kLock[] = "/lock", kFile[] = "/file";
constexpr char kSignature[] = "written by libfwl\n"; // what a lock holds
constexpr int kMostLinks = 40;                       // like the kernel's limit

std::string last_error() {
  return std::strerror(errno);
}

// Follows the links at the end of a path, also a link to a file that does not exist yet.
fs::path followed(const fs::path& path) {
  fs::path real = path;
  std::error_code error;
  for (int links = 0; fs::is_symlink(fs::symlink_status(real, error)); ++links) {
    const fs::path next = fs::read_symlink(real, error);
    if (error || links == kMostLinks) {
      throw Failure(FWL_ERROR_IO,
                    "cannot write '" + path.string() + "': it is a link that cannot be followed");
    }
    real = real.parent_path() / next; // which is `next` if that is absolute
  }
  return real;
}

void remove_all_in(const std::string& folder) {
  unlink((folder + kFile).c_str());
  unlink((folder + kLock).c_str());
  rmdir(folder.c_str());
}

// Removes the folders of processes that no longer live.
void remove_leftovers(const std::string& parent) {
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(parent.c_str()), closedir);
  while (const dirent* const entry = entries ? readdir(entries.get()) : nullptr) {
    constexpr size_t kPrefix = sizeof(".fwl-") - 1;
    if (std::strncmp(entry->d_name, kFolder, kPrefix) != 0 ||
        std::strlen(entry->d_name) != sizeof(kFolder) - 1) {
      continue;
    }
    const std::string folder = parent + "/" + entry->d_name;
    const int lock =
        open((folder + kLock).c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (lock >= 0) {
      char held[sizeof(kSignature)] = {};
      const bool ours = read(lock, held, sizeof(held)) == sizeof(kSignature) - 1 &&
                        std::strcmp(held, kSignature) == 0;
      if (ours && flock(lock, LOCK_EX | LOCK_NB) == 0) {
        remove_all_in(folder);
      }
      close(lock);
    }
  }
}

} // namespace

OutputFile::OutputFile(const std::string& target) : target_(target) {
  const fs::path real = followed(target);
  std::error_code absent;
  const fs::file_type type = fs::status(real, absent).type();
  if (type != fs::file_type::regular && type != fs::file_type::not_found) {
    fail("it is not a regular file");
  }
  target_ = real.string();
  parent_ = real.parent_path().empty() ? "." : real.parent_path().string();
  remove_leftovers(parent_);
  make_folder();
  file_ = open((folder_ + kFile).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file_ < 0) {
    const std::string reason = last_error();
    remove_folder();
    fail(reason);
  }
}

OutputFile::~OutputFile() {
  if (file_ >= 0) {
    close(file_);
  }
  remove_folder();
}

// Makes the temporary folder with its lock.
void OutputFile::make_folder() {
  for (bool locked = false; !locked;) {
    std::string name = parent_ + "/" + kFolder;
    if (mkdtemp(name.data()) == nullptr) {
      fail(last_error());
    }
    folder_ = name;
    lock_ = open((folder_ + kLock).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (lock_ < 0) {
      const std::string reason = last_error();
      remove_folder();
      fail(reason);
    }
    // Another process may have found the lock before it was held, and removed the folder. On a file
    // system without locks nobody removes anything.
    struct stat found{};
    locked = (flock(lock_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) &&
             fstat(lock_, &found) == 0 && found.st_nlink > 0;
    constexpr ssize_t kSize = sizeof(kSignature) - 1;
    if (!locked) {
      remove_folder();
    } else if (::write(lock_, kSignature, kSize) != kSize) {
      const std::string reason = last_error();
      remove_folder();
      fail(reason);
    }
  }
}

void OutputFile::remove_folder() noexcept {
  if (!folder_.empty()) {
    remove_all_in(folder_);
    folder_.clear();
  }
  if (lock_ >= 0) {
    close(lock_);
    lock_ = -1;
  }
}

void OutputFile::write(const char* data, size_t size) {
  while (size > 0) {
    const ssize_t count = ::write(file_, data, size);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      fail(last_error());
    }
    data += count;
    size -= static_cast<size_t>(count);
  }
}

void OutputFile::commit() {
  const bool synced = fsync(file_) == 0;
  const std::string reason = synced ? "" : last_error();
  const int file = file_;
  file_ = -1;
  const bool closed = close(file) == 0;
  if (!synced) {
    fail(reason);
  }
  if (!closed || std::rename((folder_ + kFile).c_str(), target_.c_str()) != 0) {
    fail(last_error());
  }
  remove_folder();
  const int parent = open(parent_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool kept = parent < 0 || fsync(parent) == 0 || errno == EINVAL || errno == ENOTSUP;
  const std::string why = kept ? "" : last_error();
  if (parent >= 0) { // a folder that may be written to but not read cannot be synced
    close(parent);
  }
  if (!kept) {
    throw Failure(FWL_ERROR_IO, "'" + target_ +
                                    "' was written, but its folder did not reach the "
                                    "disk (" +
                                    why + "); save it again");
  }
}

void OutputFile::fail(const std::string& reason) const {
  throw Failure(FWL_ERROR_IO, "cannot write '" + target_ + "': " + reason);
}

} // namespace fwl::internal

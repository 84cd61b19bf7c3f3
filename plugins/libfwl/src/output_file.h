// Files that take the place of others once they are complete.
#pragma once

#include <cstddef>
#include <string>

namespace fwl::internal {

// A file that is written in a temporary folder beside the target. `commit` renames it to the
// target; without that it is removed. If the target is a link, the link stays and what it points to
// is replaced, whether that exists or not.
//
// A process that is killed leaves its folder behind, and the next one that writes in the same
// place removes it. Such a folder is known by the content of the file `lock` in it, which its
// process holds locked for as long as it lives, also in another container: names alone would tell
// neither whether a process still writes nor whether a folder belongs to somebody else.
class OutputFile {
public:
  // All functions throw Failure (FWL_ERROR_IO).
  explicit OutputFile(const std::string& target);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const char* data, size_t size);
  // Puts the file in its place, and waits until it is on the disk. If that last step fails, the new
  // file is there but may be lost when the power fails.
  void commit();

private:
  [[noreturn]] void fail(const std::string& reason) const;
  void make_folder();
  void remove_folder() noexcept;

  std::string target_;
  std::string parent_; // the target's folder
  std::string folder_; // the temporary one; "" once it was removed
  int lock_ = -1;
  int file_ = -1;
};

} // namespace fwl::internal

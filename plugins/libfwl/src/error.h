#pragma once

#include <stdexcept>
#include <string>

#include "fwl/fwl.h"

namespace fwl::internal {

// What a function of fwl.h returns.
class Failure : public std::runtime_error {
public:
  Failure(fwl_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  fwl_status status() const noexcept { return status_; }

private:
  fwl_status status_;
};

// Something that another backend does without is not there.
class Absent final : public Failure {
public:
  using Failure::Failure;
};

// Text from a file that may be anything, for a message.
inline std::string printable(const char* text) {
  std::string shown;
  for (; *text != '\0'; ++text) {
    shown += *text >= ' ' && *text <= '~' ? *text : '?';
  }
  return shown;
}

} // namespace fwl::internal

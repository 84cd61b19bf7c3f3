#pragma once

#include <stdexcept>
#include <string>

#include "fwl/fwl.h"

namespace fwl::internal {

// An error that a function of fwl.h returns as its status and message.
class Failure : public std::runtime_error {
public:
  Failure(fwl_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  fwl_status status() const noexcept { return status_; }

private:
  fwl_status status_;
};

// The runtime cannot be used here, because something is missing that another runtime may not need.
class Absent final : public Failure {
public:
  using Failure::Failure;
};

// Returns text of unknown origin in a form that a message can hold: other characters become '?'.
inline std::string printable(const char* text) {
  std::string shown;
  for (; *text != '\0'; ++text) {
    shown += *text >= ' ' && *text <= '~' ? *text : '?';
  }
  return shown;
}

} // namespace fwl::internal

// Engines in a bundle, and which of them runs here; see fwl_export/engines/metadata.py.
#pragma once

#include <array>
#include <string>

#include "bundle.h"

namespace fwl::internal {

struct Engine {
  std::string name; // without ".engine"
  std::string version;
  std::string variant; // "tensorrt" or "rtx"
  int sm = 0;
  bool plugin = false;   // computes the fast-weight updates
  bool embedded = false; // the engine carries it
  bool in_place = false;
};

// What is here, and what the program wants.
struct Place {
  std::string variant;
  std::string title; // of the variant
  std::array<int, 3> version;
  int sm;
  bool has_plugin;      // a plugin library is at hand
  bool wants_plugin;    // the program named it
  bool allows_embedded; // host code in an engine may run
};

// Throws Absent: none fits; Failure: a file is damaged, or the one that fits needs what it lacks.
Engine choose_engine(const Bundle& bundle, const Place& place);

// The first three numbers of "10.14.1.48". Zeros where there are fewer.
std::array<int, 3> version_of(const std::string& text);

std::string version_text(const std::array<int, 3>& version);

} // namespace fwl::internal

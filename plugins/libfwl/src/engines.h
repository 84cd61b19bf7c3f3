// The engines in a bundle and the choice of the one to run. The Python twins are
// fwl_export/engines/metadata.py and choose.py.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"

namespace fwl::internal {

struct Engine {
  std::string name;      // of its file, without ".engine"
  std::string version;   // of TensorRT
  std::string variant;   // "tensorrt" or "rtx"
  int sm = 0;            // compute capability that it was built for, without the dot
  bool plugin = false;   // fwl's plugin computes the fast-weight updates
  bool embedded = false; // the engine carries the plugin's library
  bool in_place = false; // the plugin writes the new state over the old one
  // Names of the tensors for which it does so. Absent in files of earlier versions.
  std::optional<std::vector<std::string>> in_place_tensors;
};

// Where an engine is to run, and what the program asked for.
struct Place {
  std::string variant;
  std::string title; // the variant's name in messages
  std::array<int, 3> version;
  int sm;
  bool has_plugin;      // there is a plugin library to load
  bool wants_plugin;    // the program gave its path
  bool allows_embedded; // the program lets engines bring host code
};

// Throws Absent if no engine fits the place, and Failure if a file is damaged or the engine that
// fits needs a plugin that is missing or not allowed.
Engine choose_engine(const Bundle& bundle, const Place& place);

// Returns the first three numbers of text such as "10.14.1.48", zeros where there are fewer.
std::array<int, 3> version_of(const std::string& text);

std::string version_text(const std::array<int, 3>& version);

} // namespace fwl::internal

// The header of safetensors files; refuses what the package safetensors refuses, and more.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "sha256.h"

namespace fwl::internal {

// Where a tensor lies in a file.
struct StoredTensor {
  std::string type; // safetensors' name, e.g. "F32"
  std::vector<int64_t> shape;
  uint64_t first, last; // its bytes, counted from the end of the header
};

struct SafetensorsHeader {
  std::map<std::string, StoredTensor> tensors; // in ascending order of the names' bytes
  std::map<std::string, std::string> metadata; // in ascending order of the keys' bytes

  // Returns the sha256 of tensors and metadata, without the metadata's own "sha256";
  // fwl_export/bundle/state_file.py says how it is computed. `add_data` adds the bytes of a tensor.
  std::string
  sha256(const std::function<void(const std::string& name, Sha256& hash)>& add_data) const;

  // Returns the header as it stands in a file, with its length before it.
  std::string text() const;
};

// Reads a header. `data_bytes` is the number of bytes that follow it, all of which must belong to
// exactly one tensor. Throws Malformed.
SafetensorsHeader parse_safetensors(std::string_view header, uint64_t data_bytes);

} // namespace fwl::internal

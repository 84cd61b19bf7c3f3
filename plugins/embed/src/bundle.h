// A bundle's folder and manifest; see fwl_export/bundle.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fwl::embed {

enum class Type { kFloat32, kFloat16, kInt64 };

size_t bytes_of(Type type);

// One tensor of the state.
struct TensorSpec {
  std::string name;           // without "past." or "present."
  std::vector<int64_t> shape; // of one row
  Type type;

  size_t elements() const; // of one row
  size_t bytes() const { return elements() * bytes_of(type); }
};

struct Bundle {
  std::string model_path; // checked
  std::string model_id;
  std::string precision;
  int64_t vocab_size;
  int64_t max_tokens;
  int64_t anchor_interval;
  int64_t max_positions; // tokens that a row may read; 0: without end
  std::vector<TensorSpec> state;

  size_t state_bytes() const;
};

// Throws Failure: no bundle is there, it is of another schema, or a file is not what its manifest
// says.
Bundle read_bundle(const std::string& folder);

} // namespace fwl::embed

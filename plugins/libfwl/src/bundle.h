// A bundle's folder and manifest; see fwl_export/bundle/manifest.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fwl::internal {

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

// A file, as the manifest describes it.
struct FileEntry {
  std::string sha256;
  uint64_t bytes;
};

struct Bundle {
  std::string folder;
  std::map<std::string, FileEntry> files; // by their names in the bundle
  std::string model_id;
  std::string precision;
  int64_t vocab_size;
  int64_t max_tokens;
  int64_t anchor_interval;
  int64_t max_positions; // tokens that a row may read; 0: without end
  std::vector<TensorSpec> state;
  std::string identity; // of its folder and manifest, see check_unchanged

  size_t state_bytes() const;
};

// All throw Failure.

// No bundle is there, or it is of another schema. Its files are not read yet.
Bundle read_bundle(const std::string& folder);

// Returns a file's content, which is what the manifest says, or it throws.
std::string checked_content(const Bundle& bundle, const std::string& name);

// Checks the ONNX file and its external data; returns its path.
std::string checked_model(const Bundle& bundle);

// Throws if the bundle was replaced or changed since the manifest was read.
void check_unchanged(const Bundle& bundle);

} // namespace fwl::internal

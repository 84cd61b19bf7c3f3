// A bundle's folder and manifest; the Python twin is fwl_export/bundle/manifest.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fwl::internal {

enum class Type { kFloat32, kFloat16, kInt64 };

size_t bytes_of(Type type);

constexpr char kModelFile[] = "model.onnx";

// One tensor of the state.
struct TensorSpec {
  std::string name;           // without "past." or "present."
  std::vector<int64_t> shape; // without the axis of rows
  Type type;

  // Elements and bytes of one row.
  size_t elements() const;
  size_t bytes() const { return elements() * bytes_of(type); }
};

// What the manifest says about a file.
struct FileEntry {
  std::string sha256;
  uint64_t bytes;
};

struct Bundle {
  std::string folder;
  std::map<std::string, FileEntry> files; // by their paths inside the bundle
  std::string model_id;
  std::string precision;
  int64_t vocab_size;
  int64_t max_tokens;
  int64_t anchor_interval;
  int64_t max_positions; // the most tokens that a row may read; 0: no limit
  std::vector<TensorSpec> state;
  std::string identity; // of folder and manifest when they were read; see check_unchanged

  size_t state_bytes() const; // of one row
};

// All of these functions throw Failure.

// Reads the manifest, and no other file yet. Throws if there is no bundle or it has another schema.
Bundle read_bundle(const std::string& folder);

// Returns the content of a file. Throws if it is not the file that the manifest describes. Whoever
// uses a file uses this content, and does not open the file again, which could be another one then.
std::string checked_content(const Bundle& bundle, const std::string& name);

// Throws if the bundle was replaced or changed after its manifest was read; explains the failure of
// something else.
void check_unchanged(const Bundle& bundle);

} // namespace fwl::internal

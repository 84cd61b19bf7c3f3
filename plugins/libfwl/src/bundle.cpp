#include "bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "error.h"
#include "input_file.h"
#include "json_text.h"
#include "op_spec.h"
#include "sha256.h"

namespace fwl::internal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kSchemaVersion = 3;
constexpr char kManifestFile[] = "manifest.json";

// Limits on what a manifest says, far beyond what any model needs.
constexpr uint64_t kManifestBytes = 4 << 20;
constexpr uint64_t kMostStateBytes = uint64_t{1} << 36; // of one row
constexpr size_t kMostTensors = 4096, kMostSizes = 8, kLongestName = 128;
constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;
constexpr size_t kSha256Digits = 64;

[[noreturn]] void fail(const std::string& message) {
  throw Failure(FWL_ERROR_BUNDLE, message);
}

bool is_below(const fs::path& path, const fs::path& base) {
  return std::mismatch(base.begin(), base.end(), path.begin(), path.end()).first == base.end();
}

// Returns the folder in which the Hugging Face cache keeps the contents of files: `blobs` beside
// the `snapshots` that `base`, a path without links, lies in. Empty if there is none.
fs::path hub_blobs(const fs::path& base) {
  std::error_code ignored;
  for (fs::path revision = base; revision.has_relative_path(); revision = revision.parent_path()) {
    const fs::path snapshots = revision.parent_path();
    const fs::path blobs = snapshots.parent_path() / "blobs";
    if (snapshots.filename() == "snapshots" &&
        fs::is_directory(fs::symlink_status(blobs, ignored))) {
      return blobs;
    }
  }
  return {};
}

// Refuses a path that leads out of the bundle's folder through a link. The contents in the Hugging
// Face cache that the folder lies in count as inside; docs/formats/bundle.md has the rule.
void check_links(const fs::path& folder, const fs::path& path) {
  std::error_code ignored; // what cannot be resolved, such as a link to itself, is empty
  const fs::path real = fs::weakly_canonical(path, ignored);
  const fs::path base = fs::weakly_canonical(folder, ignored);
  const fs::path blobs = hub_blobs(base);
  const bool cached = !blobs.empty() && real.parent_path() == blobs;
  if (real.empty() || base.empty() || (!is_below(real, base) && !cached)) {
    fail("bundle '" + folder.string() + "' names the path '" +
         path.lexically_relative(folder).string() +
         "', which leaves the bundle's folder through a link. If the link is yours, copy the "
         "bundle with `cp -rL`; otherwise do not use this bundle");
  }
}

// Returns the path of a file of the bundle, after checking that it is inside the bundle's folder.
fs::path inside(const fs::path& folder, const std::string& name) {
  const fs::path part(name);
  bool leaves = name.empty() || part.is_absolute() || name.find('\\') != std::string::npos;
  for (const fs::path& step : part) {
    leaves = leaves || step == "..";
  }
  if (leaves) {
    fail("bundle '" + folder.string() + "' names the path '" + name +
         "', which leaves the bundle's folder; do not use this bundle");
  }
  check_links(folder, folder / part);
  return folder / part;
}

// Reads a file whose size is known. Nothing is allocated unless the file has that size.
std::string read_file(const Bundle& bundle, const std::string& name, uint64_t bytes) {
  InputFile file(inside(bundle.folder, name).string());
  if (file.is_missing()) {
    fail("bundle '" + bundle.folder + "' lacks the file '" + name +
         "'; copy the bundle again, or export the model again");
  }
  if (!file.is_open()) {
    fail("bundle '" + bundle.folder + "': '" + name + "' cannot be read: " + file.reason());
  }
  std::string content;
  if (file.size() == bytes) {
    content.resize(bytes);
    if (!file.read(content.data(), content.size()) || !file.is_at_end()) {
      content.clear();
    }
  }
  return content;
}

std::string manifest_text(const std::string& folder) {
  const std::string path = (fs::path(folder) / kManifestFile).string();
  std::error_code ignored;
  if (fs::is_symlink(fs::symlink_status(path, ignored))) {
    check_links(folder, path);
  }
  InputFile file(path);
  if (!file.is_open()) {
    fail("'" + folder + "' is not a bundle: it has no manifest.json" +
         (file.is_missing() ? "" : " that can be read (" + file.reason() + ")") +
         "; `fwl-export export` writes one");
  }
  if (file.size() > kManifestBytes) {
    fail(path + " has " + std::to_string(file.size()) + " bytes, but a manifest has at most " +
         std::to_string(kManifestBytes) + "; do not use this bundle");
  }
  std::string content(file.size(), ' ');
  if (!file.read(content.data(), content.size())) {
    fail(path + " was changed while it was read; open the bundle again");
  }
  return content;
}

// Returns text that differs once the folder or its manifest was replaced or changed: devices,
// inodes and ctimes. Renaming a folder changes its ctime, even if it is renamed back.
std::string identity_of(const std::string& folder) {
  std::string identity;
  const auto add = [&](const std::string& path, int (*look)(const char*, struct stat*)) {
    struct stat found{};
    if (look(path.c_str(), &found) == 0) {
      for (const auto number :
           {static_cast<uint64_t>(found.st_dev), static_cast<uint64_t>(found.st_ino),
            static_cast<uint64_t>(found.st_ctim.tv_sec),
            static_cast<uint64_t>(found.st_ctim.tv_nsec)}) {
        identity += std::to_string(number) + ' ';
      }
    }
  };
  add(folder, lstat);
  add(folder, stat);
  add((fs::path(folder) / kManifestFile).string(), lstat);
  add((fs::path(folder) / kManifestFile).string(), stat);
  return identity;
}

Type type_named(const std::string& name) {
  for (const auto& [known, type] : {std::pair{"float32", Type::kFloat32},
                                    {"float16", Type::kFloat16},
                                    {"int64", Type::kInt64}}) {
    if (name == known) {
      return type;
    }
  }
  throw Malformed("the state has a tensor of the unknown type '" + name + "'");
}

TensorSpec read_spec(const json& data) {
  TensorSpec spec{text(member(data, "name"), "name of a state tensor", kLongestName),
                  {},
                  type_named(text(member(data, "dtype"), "dtype"))};
  if (spec.name.empty() || spec.name == "__metadata__") { // a name that state files cannot hold
    throw Malformed("the state has a tensor called '" + spec.name + "'");
  }
  uint64_t elements = 1;
  for (const json& size : array(member(data, "shape"), "shape of " + spec.name, kMostSizes)) {
    spec.shape.push_back(integer(size, "shape of " + spec.name, 1));
    if (__builtin_mul_overflow(elements, static_cast<uint64_t>(spec.shape.back()), &elements) ||
        elements > kMostStateBytes) {
      throw Malformed("state '" + spec.name + "' is too large");
    }
  }
  return spec;
}

std::vector<TensorSpec> read_state(const json& data) {
  std::vector<TensorSpec> state;
  std::set<std::string> names;
  uint64_t bytes = 0;
  for (const json& entry : array(data, "state", kMostTensors)) {
    state.push_back(read_spec(entry));
    bytes += state.back().bytes();
    if (!names.insert(state.back().name).second) {
      throw Malformed("the state has two tensors called '" + state.back().name + "'");
    }
    if (bytes > kMostStateBytes) {
      throw Malformed("the state of a row has more than " + std::to_string(kMostStateBytes) +
                      " bytes");
    }
  }
  if (state.empty() || state[0].name != "position" || state[0].type != Type::kInt64 ||
      state[0].elements() != 1) {
    throw Malformed("the state does not start with the position");
  }
  return state;
}

std::map<std::string, FileEntry> read_files(const json& data) {
  std::map<std::string, FileEntry> files;
  for (const auto& [name, entry] : object(data, "files").items()) {
    files[text(name, "name of a file")] = {
        text(member(entry, "sha256"), "sha256 of " + name, kSha256Digits),
        static_cast<uint64_t>(integer(member(entry, "bytes"), "bytes of " + name, 0))};
  }
  return files;
}

// Refuses a bundle whose fast-weight updates are of a version that would compute something else. In
// the older version, half precision overflows.
void check_op(const json& manifest, const std::string& path, const std::string& precision) {
  const json& data = object(member(manifest, "op"), "op");
  const int64_t version = integer(member(data, "version"), "version of the op", 0);
  const std::string name = std::string(op::kDomain) + "::" + op::kName;
  if (version < op::kFloat32Version || version > op::kVersion) {
    fail(path + ": " + name + " has version " + std::to_string(version) +
         ", but this libfwl runs versions " + std::to_string(op::kFloat32Version) + " to " +
         std::to_string(op::kVersion) +
         "; install the libfwl of the fwl-export release that wrote the bundle");
  }
  if (version < op::kVersion && precision != "fp32" && precision != "int8w") {
    fail(path + ": the model has the precision " + printable(precision.c_str()) + " with version " +
         std::to_string(version) + " of " + name +
         ", whose sums overflow in half precision; export the model again");
  }
}

// Returns a number that may be missing.
int64_t optional_integer(const json& data, const std::string& name) {
  return data.contains(name) ? integer(data[name], name, 0) : 0;
}

void read_manifest(const json& manifest, Bundle& bundle) {
  const json& config = object(member(manifest, "config"), "config");
  bundle.model_id = text(member(manifest, "model_id"), "model_id", kSha256Digits);
  bundle.precision = text(member(manifest, "precision"), "precision", 16);
  bundle.max_tokens = integer(member(manifest, "max_tokens"), "max_tokens", 1, kLargestSize);
  bundle.vocab_size = integer(member(config, "vocab_size"), "vocab_size", 1, kLargestSize);
  bundle.anchor_interval =
      optional_integer(object(member(config, "fast_weights"), "fast_weights"), "anchor_interval");
  bundle.max_positions =
      optional_integer(object(member(config, "backbone"), "backbone"), "max_positions");
  bundle.state = read_state(member(manifest, "state"));
  bundle.files = read_files(member(manifest, "files"));
}

} // namespace

size_t bytes_of(Type type) {
  return type == Type::kInt64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

size_t TensorSpec::elements() const {
  size_t count = 1;
  for (const int64_t size : shape) {
    count *= static_cast<size_t>(size);
  }
  return count;
}

size_t Bundle::state_bytes() const {
  size_t total = 0;
  for (const TensorSpec& spec : state) {
    total += spec.bytes();
  }
  return total;
}

Bundle read_bundle(const std::string& folder) {
  const std::string path = (fs::path(folder) / kManifestFile).string();
  Bundle bundle;
  bundle.folder = folder;
  bundle.identity = identity_of(folder);
  try {
    const json manifest = parse_json(manifest_text(folder));
    const json& version = member(manifest, "schema_version");
    if (!version.is_number_unsigned() || version != kSchemaVersion) {
      fail(path + ": schema_version is " + printable(version.dump().c_str()) +
           ", but this libfwl reads " + std::to_string(kSchemaVersion) +
           "; install the libfwl of the fwl-export release that wrote the bundle");
    }
    read_manifest(manifest, bundle);
    check_op(manifest, path, bundle.precision);
  } catch (const Malformed& error) {
    fail(path + " is malformed (" + printable(error.what()) + "); export the model again");
  }
  for (const auto& file : bundle.files) {
    inside(folder, file.first);
  }
  return bundle;
}

std::string checked_content(const Bundle& bundle, const std::string& name) {
  const auto entry = bundle.files.find(name);
  if (entry == bundle.files.end()) {
    fail("bundle '" + bundle.folder + "' has no '" + printable(name.c_str()) +
         "' in its manifest; export the model again");
  }
  const std::string content = read_file(bundle, name, entry->second.bytes);
  Sha256 hash;
  hash.update(content.data(), content.size());
  if (content.size() != entry->second.bytes || hash.hex() != entry->second.sha256) {
    fail("'" + name + "' in bundle '" + bundle.folder +
         "' is not what the manifest says; it was changed or truncated: copy the bundle again, or "
         "export the model again");
  }
  return content;
}

void check_unchanged(const Bundle& bundle) {
  if (identity_of(bundle.folder) != bundle.identity) {
    fail("bundle '" + bundle.folder +
         "' was replaced or changed while it was opened; open it again");
  }
}

} // namespace fwl::internal

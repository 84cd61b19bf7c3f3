#include "bundle.h"

#include <sys/stat.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.h"
#include "sha256.h"

namespace fwl::internal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kSchemaVersion = 3;
constexpr char kModelFile[] = "model.onnx";

[[noreturn]] void fail(const std::string& message) {
  throw Failure(FWL_ERROR_BUNDLE, message);
}

// Returns the path of a file of the bundle, after checking that it is inside the bundle's folder.
fs::path inside(const fs::path& folder, const std::string& name) {
  const fs::path part(name);
  bool leaves = name.empty() || part.is_absolute() || name.find('\\') != std::string::npos;
  for (const fs::path& step : part) {
    leaves = leaves || step == "..";
  }
  const fs::path path = folder / part;
  std::error_code ignored;
  const fs::path real = fs::weakly_canonical(path, ignored);
  const fs::path base = fs::weakly_canonical(folder, ignored);
  const auto [base_end, unused] = std::mismatch(base.begin(), base.end(), real.begin(), real.end());
  (void)unused;
  if (leaves || base_end != base.end()) {
    fail("bundle '" + folder.string() + "' names the path '" + name +
         "', which leaves the bundle's folder; do not use this bundle");
  }
  return path;
}

// Passes a file's content to `take`, block by block, and checks its size and hash at the end.
template <class Take>
fs::path read_checked(const Bundle& bundle, const std::string& name, const Take& take) {
  const auto entry = bundle.files.find(name);
  if (entry == bundle.files.end()) {
    fail("bundle '" + bundle.folder + "' has no '" + name +
         "' in its manifest; export the model again");
  }
  const fs::path path = inside(bundle.folder, name);
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    fail("bundle '" + bundle.folder + "' lacks the file '" + name +
         "'; copy the bundle again, or export the model again");
  }
  Sha256 hash;
  uint64_t size = 0;
  std::vector<char> block(1 << 20);
  while (stream && size <= entry->second.bytes) {
    stream.read(block.data(), static_cast<std::streamsize>(block.size()));
    const size_t count = static_cast<size_t>(stream.gcount());
    hash.update(reinterpret_cast<const unsigned char*>(block.data()), count);
    take(block.data(), count);
    size += count;
  }
  if (hash.hex() != entry->second.sha256 || size != entry->second.bytes) {
    fail("'" + name + "' in bundle '" + bundle.folder +
         "' is not what the manifest says; it was changed or truncated: copy the bundle again, or "
         "export the model again");
  }
  return path;
}

std::string manifest_text(const std::string& folder) {
  std::ifstream stream(fs::path(folder) / "manifest.json", std::ios::binary);
  if (!stream) {
    fail("'" + folder +
         "' is not a bundle: it has no manifest.json; `fwl-export export` writes one");
  }
  return std::string(std::istreambuf_iterator<char>(stream), {});
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
  add((fs::path(folder) / "manifest.json").string(), stat);
  return identity;
}

Type type_named(const std::string& name) {
  if (name == "float32") {
    return Type::kFloat32;
  }
  if (name == "float16") {
    return Type::kFloat16;
  }
  if (name == "int64") {
    return Type::kInt64;
  }
  fail("the bundle's state has a tensor of type '" + name +
       "', which this libfwl does not know; update libfwl");
}

TensorSpec read_spec(const json& data) {
  TensorSpec spec{data.at("name"), data.at("shape"), type_named(data.at("dtype"))};
  for (const int64_t size : spec.shape) {
    if (size < 1) {
      fail("the bundle's state '" + spec.name + "' has a size of " + std::to_string(size) +
           "; expected 1 or more. Export the model again");
    }
  }
  return spec;
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
  const std::string path = (fs::path(folder) / "manifest.json").string();
  Bundle bundle;
  bundle.folder = folder;
  bundle.identity = identity_of(folder);
  try {
    const json manifest = json::parse(manifest_text(folder));
    const json& version = manifest.at("schema_version");
    if (version != kSchemaVersion) {
      fail(path + ": schema_version is " + version.dump() + ", but this libfwl reads " +
           std::to_string(kSchemaVersion) +
           "; install the libfwl of the fwl-export release that wrote the bundle");
    }
    bundle.model_id = manifest.at("model_id");
    bundle.precision = manifest.at("precision");
    bundle.max_tokens = manifest.at("max_tokens");
    bundle.vocab_size = manifest.at("config").at("vocab_size");
    bundle.anchor_interval =
        manifest.at("config").at("fast_weights").value("anchor_interval", int64_t{0});
    bundle.max_positions = manifest.at("config").at("backbone").value("max_positions", int64_t{0});
    for (const json& spec : manifest.at("state")) {
      bundle.state.push_back(read_spec(spec));
    }
    for (const auto& [name, entry] : manifest.at("files").items()) {
      bundle.files[name] = {entry.at("sha256"), entry.at("bytes")};
    }
  } catch (const json::exception& error) {
    fail(path + " is malformed (" + printable(error.what()) + "); export the model again");
  }
  if (bundle.max_tokens < 1 || bundle.vocab_size < 1 || bundle.anchor_interval < 0 ||
      bundle.state.empty() || bundle.state[0].name != "position" ||
      bundle.state[0].type != Type::kInt64 || bundle.state[0].elements() != 1) {
    fail(path + " is malformed: sizes are out of range, or the state does not start with the "
                "position; export the model again");
  }
  return bundle;
}

std::string checked_content(const Bundle& bundle, const std::string& name) {
  std::string content;
  read_checked(bundle, name, [&](const char* data, size_t count) { content.append(data, count); });
  return content;
}

std::string checked_model(const Bundle& bundle) {
  const auto nothing = [](const char*, size_t) {};
  const fs::path path = read_checked(bundle, kModelFile, nothing);
  for (const auto& file : bundle.files) {
    if (file.first != kModelFile && file.first.rfind(kModelFile, 0) == 0) {
      read_checked(bundle, file.first, nothing); // external data
    }
  }
  return path.string();
}

void check_unchanged(const Bundle& bundle) {
  if (identity_of(bundle.folder) != bundle.identity) {
    fail("bundle '" + bundle.folder +
         "' was replaced or changed while it was opened; open it again");
  }
}

} // namespace fwl::internal

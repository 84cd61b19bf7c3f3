#include "bundle.h"

#include <array>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.h"
#include "sha256.h"

namespace fwl::embed {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kSchemaVersion = 3;
constexpr char kModelFile[] = "model.onnx";

[[noreturn]] void fail(const std::string& message) {
  throw Failure(FWL_ERROR_BUNDLE, message);
}

// Returns the path of a bundle's file, after checking that it is inside and what it should be.
fs::path checked_file(const fs::path& folder, const std::string& name, const json& entry) {
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
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    fail("bundle '" + folder.string() + "' lacks the file '" + name +
         "'; copy it again or export again");
  }
  Sha256 hash;
  uint64_t size = 0;
  std::vector<char> block(1 << 20);
  while (stream) {
    stream.read(block.data(), static_cast<std::streamsize>(block.size()));
    const size_t count = static_cast<size_t>(stream.gcount());
    hash.update(reinterpret_cast<const unsigned char*>(block.data()), count);
    size += count;
  }
  if (hash.hex() != entry.at("sha256").get<std::string>() ||
      size != entry.at("bytes").get<uint64_t>()) {
    fail("'" + name + "' in bundle '" + folder.string() +
         "' is not what the manifest says; it was changed or cut off: copy it again or export "
         "again");
  }
  return path;
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
  fail("the bundle's state has a tensor of type '" + name + "'; update libfwl");
}

TensorSpec read_spec(const json& data) {
  TensorSpec spec{data.at("name"), data.at("shape"), type_named(data.at("dtype"))};
  for (const int64_t size : spec.shape) {
    if (size < 1) {
      fail("the bundle's state '" + spec.name + "' has a size of " + std::to_string(size));
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
  const fs::path manifest_path = fs::path(folder) / "manifest.json";
  std::ifstream stream(manifest_path);
  if (!stream) {
    fail("'" + folder +
         "' is not a bundle: it has no manifest.json; `fwl-export export` writes "
         "one");
  }
  try {
    const json manifest = json::parse(stream);
    const json& version = manifest.at("schema_version");
    if (version != kSchemaVersion) {
      fail(manifest_path.string() + ": schema_version is " + version.dump() +
           ", but this libfwl reads " + std::to_string(kSchemaVersion) +
           "; install the libfwl of the fwl-export that wrote it");
    }
    Bundle bundle;
    bundle.model_id = manifest.at("model_id");
    bundle.precision = manifest.at("precision");
    bundle.max_tokens = manifest.at("max_tokens");
    bundle.vocab_size = manifest.at("config").at("vocab_size");
    bundle.anchor_interval =
        manifest.at("config").at("fast_weights").value("anchor_interval", int64_t{0});
    for (const json& spec : manifest.at("state")) {
      bundle.state.push_back(read_spec(spec));
    }
    if (bundle.max_tokens < 1 || bundle.vocab_size < 1 || bundle.anchor_interval < 0 ||
        bundle.state.empty() || bundle.state[0].name != "position" ||
        bundle.state[0].type != Type::kInt64 || bundle.state[0].elements() != 1) {
      fail(manifest_path.string() + " is malformed; export the model again");
    }
    const json& files = manifest.at("files");
    bool found = false;
    for (const auto& [name, entry] : files.items()) {
      if (name.rfind(kModelFile, 0) == 0) { // and its external data
        const fs::path path = checked_file(folder, name, entry);
        if (name == kModelFile) {
          bundle.model_path = path.string();
          found = true;
        }
      }
    }
    if (!found) {
      fail("bundle '" + folder + "' has no '" + kModelFile + "' in its manifest");
    }
    return bundle;
  } catch (const json::exception& error) {
    fail(manifest_path.string() + " is malformed (" + printable(error.what()) +
         "); export the model again");
  }
}

} // namespace fwl::embed

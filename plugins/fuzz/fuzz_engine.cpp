// The metadata of an engine.

#include <unistd.h>

#include "../libfwl/src/engines.h"
#include "../libfwl/src/error.h"
#include "../libfwl/src/sha256.h"
#include "target.h"

namespace fwl::fuzz {
namespace {

using namespace fwl::internal;

// Whoever writes a bundle's files writes their hashes into the manifest too.
Bundle bundle_of(const std::string& folder, std::string_view content) {
  Bundle bundle{};
  Sha256 hash;
  hash.update(content.data(), content.size());
  bundle.folder = folder;
  bundle.model_id = "id";
  bundle.state = {{"position", {}, Type::kInt64}, {"fast.up.kernel", {6, 5}, Type::kFloat32}};
  bundle.files = {{"engines/a.json", {hash.hex(), content.size()}},
                  {"engines/a.engine", {"00ff", 100}}};
  return bundle;
}

} // namespace

bool accepts(std::string_view content) {
  static Scratch scratch("a.json");
  scratch.write(content);
  // The scratch file is in the folder itself, so "engines" is a link to the folder.
  static const bool linked = symlink(".", (scratch.folder() + "/engines").c_str()) == 0;
  (void)linked;
  const Place place{"tensorrt", "TensorRT", {10, 14, 1}, 90, true, false, false};
  try {
    choose_engine(bundle_of(scratch.folder(), content), place);
    return true;
  } catch (const Failure&) {
    return false;
  }
}

std::vector<std::string> seeds() {
  return {R"({"schema_version": 1, "model_id": "id", "sha256": "00ff", "flavour": "tensorrt",
  "version": "10.14.1.48", "sm": 90, "update_path": "plugin", "plugin_embedded": false,
  "in_place_state": true, "in_place_tensors": ["fast.up.kernel"], "profiles": [[1, 8], [1, 256]]})",
          R"({"schema_version":1,"model_id":"id","sha256":"00ff","flavour":"tensorrt",
  "version":"10.14.1","sm":90,"update_path":"body","plugin_embedded":true,"in_place_state":false,
  "in_place_tensors":null})"};
}

std::vector<std::string> words() {
  return {"null",
          "true",
          "false",
          "{}",
          "[]",
          "[[",
          "\"tensorrt\"",
          "\"rtx\"",
          "\"plugin\"",
          "\xff",
          "-1",
          "\\u0000",
          "\"10.14.1\"",
          "NaN",
          "\"sm\":90,",
          "\"model_id\":\"id\",",
          "\"99999999999999999999.1.1\"",
          std::string(1, '\0'),
          "{\"a\":",
          "\xef\xbb\xbf"};
}

std::string repaired(std::string_view content) {
  return std::string(content);
}

} // namespace fwl::fuzz
